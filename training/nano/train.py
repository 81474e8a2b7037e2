"""Trains nano: `python -m training.nano.train {tokenizer,transformer,clip,all} --preset cpu --out DIR`.

Torch only. Every step draws its own scenes and random numbers from (seed, step), so a run stopped and resumed at any
step takes the same path as one that never stopped, and no scene is ever seen twice. `--minutes` ends a piece early and
leaves a checkpoint; the same command with `--resume` goes on. `--steps` fixes the learning-rate schedule (constant,
then linear to zero over the last part) and may be raised on resume while the rate is still constant.

Matrices inside the networks are trained by Muon, everything else by AdamW. Products run in bfloat16 where the machine
multiplies faster in it (timed at the start), weights stay float32; published weights are the running average (EMA).

Source: bit flips as self-correction and caption dropping after Infinity (Han et al. 2024); Muon as in torch.optim.
"""

from __future__ import annotations

import argparse
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stagevar.errors import StagevarError, UsageError, WeightsError
from stagevar.models.infinity import Infinity
from stagevar.nano import scenes
from stagevar.nano.presets import PRESETS, NanoPreset, preset
from stagevar.nano.text import NanoTextEncoder
from stagevar.nano.tokenizer import NanoTokenizer
from training.nano.checkpoints import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Recipe:
    """Optimisation of one part. Rates are peaks; `cooldown` is the share of steps over which they fall to zero."""

    steps: int
    batch: int
    muon_rate: float
    adam_rate: float
    warmup: int = 50
    cooldown: float = 0.4
    ema: float = 0.998
    clip_norm: float = 0.0
    seed: int = 0


RECIPES = {
    "tokenizer": Recipe(steps=5500, batch=64, muon_rate=0.02, adam_rate=2e-3, cooldown=0.5),
    "transformer": Recipe(
        steps=7600, batch=32, muon_rate=0.02, adam_rate=2e-3, warmup=100, cooldown=0.6, clip_norm=1.0
    ),
    "clip": Recipe(steps=1300, batch=128, muon_rate=0.01, adam_rate=1e-3, warmup=100, cooldown=0.5),
}


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a matrix product in it beats float32 on this device, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


class Job(ABC):
    """One trainable part: its parameters, its loss, and the files it publishes."""

    name: str
    model: nn.Module

    @abstractmethod
    def loss(self, rng: np.random.Generator, batch: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of one fresh batch and figures for the log. `progress` runs from 0 to 1 over the steps."""

    @abstractmethod
    def files(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Published files: name to tensors, from (averaged) weights."""

    def uses_muon(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is a hidden matrix."""
        return parameter.ndim == 2


class TokenizerJob(Job):
    """Pixels through the residual quantiser and back, straight through the signs.

    A fifth of the samples reach the decoder as a partial sum of scales, or with 3 % of their bits flipped, so that it
    shows coarse scales sensibly and forgives a transformer's mistakes. These never reach the encoder: through the
    straight-through gradient they push the latent out of the range that the codes can reach.
    """

    name = "tokenizer"
    flips, decoder_only, commitment = 0.03, 0.2, 2.0

    def __init__(self, config: NanoPreset, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.model = NanoTokenizer(config).to(device)

    def loss(self, rng: np.random.Generator, batch: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        image = draw_images(scenes.sample(batch, rng), self.config, self.device)
        scales, aside = len(self.config.scales), int(self.decoder_only * batch)
        # The first quarter of the samples set aside keep all scales and only suffer flips.
        stop = torch.from_numpy(rng.integers(scales, size=aside)).to(self.device)
        stop[: aside // 4] = scales - 1
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            latent = self.model.encode(image).float()
            code_sum = self.model.partial_sums(latent)[-1]
            through = latent + (code_sum - latent).detach()
            worn = self.model.partial_sums(latent[:aside], self.flips)[stop, torch.arange(aside, device=self.device)]
            output = self.model.decode(torch.cat([worn, through[aside:]])).float()
        reconstruction = F.l1_loss(output, image) + 2 * F.mse_loss(output, image)
        commitment = F.mse_loss(latent, code_sum)
        full = F.mse_loss(output[aside:], image[aside:]).item()
        figures = {"full_mse": full, "commitment": commitment.item()}
        return reconstruction + self.commitment * commitment, figures

    def files(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"tokenizer.safetensors": weights}


class TransformerJob(Job):
    """Bitwise next-scale prediction, teacher forced over all scales at once; the text encoder learns along.

    The first scales of every image get bits flipped after they were taken as targets; a tenth of the captions are
    dropped. A token's weight falls with the square root of its scale's size, so that the layout is not drowned.
    """

    name = "transformer"
    max_flip, caption_drop = 0.15, 0.1
    # Share of the tasks in the data, in the order of scenes.TASKS: the harder ones more often.
    task_weights = (0.3, 1.4, 1.1, 0.4, 2.4, 2.4, 0.7)

    def __init__(
        self, config: NanoPreset, device: torch.device, dtype: torch.dtype, tokenizer: Path, compiled: bool = False
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.tokenizer = NanoTokenizer(config).to(device).requires_grad_(False)
        self.tokenizer.load_state_dict(read_weights(tokenizer, "run `python -m training.nano.train tokenizer` first"))
        transformer = Infinity(config.infinity())
        transformer.init_weights()
        self.model = nn.ModuleDict({"transformer": transformer, "text": NanoTextEncoder(config)}).to(device)
        transformer.set_grids(config.grids)
        self.forward = torch.compile(transformer.forward_train) if compiled else transformer.forward_train
        weights = torch.cat([torch.full((s * s,), 1.0 / s) for s in config.scales])
        self.weight_L = (weights / weights.mean()).to(device)

    def uses_muon(self, name: str, parameter: Tensor) -> bool:
        outer = ("embed", "head.", "positions", "cfg_uncond")
        return parameter.ndim == 2 and not any(part in name for part in outer)

    def loss(self, rng: np.random.Generator, batch: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        world = scenes.sample(batch, rng, task_weights=self.task_weights)
        image = draw_images(world, self.config, self.device)
        ids_BT, _ = self.model["text"].tokenize(world.captions)
        ids_BT = F.pad(ids_BT, (0, scenes.LONGEST_CAPTION + 1 - ids_BT.shape[1]))  # one shape for the compiler
        flips = rng.uniform(0.0, self.max_flip, len(self.config.scales)).tolist()
        null_B = torch.from_numpy(rng.random(batch) < self.caption_drop).to(self.device)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                latent = self.tokenizer.encode(image).float()
                targets, inputs, _ = self.tokenizer.residual.quantise(latent, flips)
            text_BTD, mask_B11T = self.model["text"](ids_BT.to(self.device))
            logits = self.forward(text_BTD, mask_B11T, inputs, null_B)
        pairs = logits.float().unflatten(-1, (-1, 2))
        target_BLt = torch.cat(targets, dim=1).float()
        entropy_BLt = F.binary_cross_entropy_with_logits(pairs[..., 1] - pairs[..., 0], target_BLt, reduction="none")
        entropy_L = entropy_BLt.mean((0, 2))
        by_scale = entropy_L.detach().split([s * s for s in self.config.scales])
        figures = {f"scale{k}": part.mean().item() for k, part in enumerate(by_scale)}
        return (entropy_L * self.weight_L).mean(), figures

    def files(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        # Half precision keeps each file well under 15 MiB; the runtime casts on load.
        parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "text": {}}
        for name, tensor in weights.items():
            part, key = name.split(".", 1)
            parts[part][key] = tensor.half()
        return {"transformer.safetensors": parts["transformer"], "text_encoder.safetensors": parts["text"]}


def draw_images(world: scenes.SceneBatch, config: NanoPreset, device: torch.device) -> Tensor:
    """Scenes as images (B, 3, H, W) in [-1, 1] on the device."""
    return torch.from_numpy(scenes.draw(world, config.image_size)).to(device).mul_(2).sub_(1)


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """A safetensors file as float32. Raises WeightsError where it is missing."""
    if not path.exists():
        raise WeightsError(f"no {path.name} in {path.parent}; {remedy}")
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def build_job(
    part: str,
    config: NanoPreset,
    out: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    compiled: bool = False,
) -> Job:
    """The job of a part, initialised from the seed. The transformer reads `out`/tokenizer.safetensors."""
    torch.manual_seed(seed)
    if part == "tokenizer":
        return TokenizerJob(config, device, dtype)
    if part == "transformer":
        return TransformerJob(config, device, dtype, out / "tokenizer.safetensors", compiled)
    from training.nano.clip import ClipJob

    return ClipJob(config, device, dtype)


class Trainer:
    """Steps a job; holds optimisers and the running average; reads and writes checkpoints."""

    def __init__(self, job: Job, recipe: Recipe, out: Path):
        self.job, self.recipe, self.out, self.step = job, recipe, out, 0
        self.parameters = dict(job.model.named_parameters())
        muon = {n: p for n, p in self.parameters.items() if job.uses_muon(n, p)}
        adam = {n: p for n, p in self.parameters.items() if n not in muon}
        self.optimisers = {
            "muon": (torch.optim.Muon(muon.values(), lr=recipe.muon_rate, weight_decay=0.0, momentum=0.95), muon),
            "adam": (torch.optim.AdamW(adam.values(), lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0), adam),
        }
        self.rates = {"muon": recipe.muon_rate, "adam": recipe.adam_rate}
        self.average = {n: p.detach().clone() for n, p in job.model.state_dict().items()}

    def _factor(self) -> float:
        """Learning-rate factor of the coming step: warm-up, constant, linear to zero."""
        recipe = self.recipe
        left = (recipe.steps - self.step) / max(1.0, recipe.cooldown * recipe.steps)
        return min(1.0, (self.step + 1) / recipe.warmup, left)

    def advance(self) -> tuple[float, dict[str, float]]:
        """One optimisation step; returns the loss and the job's figures."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)
        rng = np.random.default_rng([self.recipe.seed, self.step])
        loss, figures = self.job.loss(rng, self.recipe.batch, self.step / self.recipe.steps)
        self.job.model.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip_norm)
            figures["norm"] = norm.item()
        factor = self._factor()
        for name, (optimiser, _) in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self.rates[name] * factor
            optimiser.step()
        self.step += 1
        keep = min(self.recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            for name, tensor in self.job.model.state_dict().items():
                self.average[name].lerp_(tensor, 1 - keep)
        return loss.item(), figures

    # ------------------------------------------------------------------------------------------------- persistence

    @property
    def folder(self) -> Path:
        return self.out / f"{self.job.name}.checkpoint"

    def save(self) -> None:
        """Checkpoint (weights, average, optimiser state) and the published files of the average."""
        tensors = {f"model/{n}": t for n, t in self.job.model.state_dict().items()}
        tensors |= {f"average/{n}": t for n, t in self.average.items()}
        for kind, (optimiser, named) in self.optimisers.items():
            for name, parameter in named.items():
                for key, value in optimiser.state[parameter].items():
                    tensors[f"{kind}/{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        save_checkpoint(self.folder, tensors, {"step": self.step, "recipe": asdict(self.recipe)})
        self.publish()

    def publish(self) -> None:
        """Writes the averaged weights as the runtime loads them."""
        for name, tensors in self.job.files(self.average).items():
            temporary = self.out / (name + ".new")
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary)
            temporary.rename(self.out / name)

    def restore(self) -> None:
        """Takes up the checkpoint in the output folder."""
        tensors, state = load_checkpoint(self.folder)
        self.step = state["step"]
        device = next(iter(self.parameters.values())).device
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            groups.setdefault(kind, {})[rest] = tensor.to(device)
        self.job.model.load_state_dict(groups["model"])
        self.average = groups["average"]
        for kind, (optimiser, named) in self.optimisers.items():
            for entry, tensor in groups.get(kind, {}).items():
                name, key = entry.rsplit("/", 1)
                # AdamW keeps its step counter on the CPU.
                optimiser.state[named[name]][key] = tensor.cpu() if key == "step" else tensor


def run(trainer: Trainer, minutes: float, save_minutes: float, log_every: int = 50) -> None:
    """Steps until the recipe's end or until the minutes are used, saving now and then and at the end."""
    start = saved = time.monotonic()
    total: dict[str, float] = {}
    counted = 0
    while trainer.step < trainer.recipe.steps and time.monotonic() - start < minutes * 60:
        loss, figures = trainer.advance()
        counted += 1
        for name, value in {"loss": loss, **figures}.items():
            total[name] = total.get(name, 0.0) + value
        if trainer.step % log_every == 0:
            means = " ".join(f"{name} {value / counted:.4f}" for name, value in total.items())
            print(f"{trainer.job.name} step {trainer.step} {time.monotonic() - start:.0f} s {means}", flush=True)
            total, counted = {}, 0
        if time.monotonic() - saved > save_minutes * 60:
            trainer.save()
            saved = time.monotonic()
    trainer.save()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m training.nano.train", description=__doc__.splitlines()[0])
    p.add_argument("part", choices=["tokenizer", "transformer", "clip", "all"])
    p.add_argument("--preset", default="cpu", choices=sorted(PRESETS))
    p.add_argument("--out", type=Path, required=True, help="folder for checkpoints and published weights")
    p.add_argument("--steps", type=int, help="length of the learning-rate schedule (default: the recipe's)")
    p.add_argument("--batch", type=int, help="images per step (default: the recipe's)")
    p.add_argument("--minutes", type=float, default=1e9, help="stop this piece after so many minutes")
    p.add_argument("--save-minutes", type=float, default=8.0, help="minutes between checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action="store_true", help="torch.compile: twice as fast, needs a C++ compiler")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        config, device = preset(args.preset), torch.device(args.device)
        for name in ("steps", "batch"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise UsageError(f"--{name} {value} must be at least 1")
        args.out.mkdir(parents=True, exist_ok=True)
        dtype = fast_dtype(device)
        deadline = time.monotonic() + args.minutes * 60
        for part in ("tokenizer", "transformer", "clip") if args.part == "all" else (args.part,):
            changes = {k: getattr(args, k) for k in ("steps", "batch", "seed") if getattr(args, k) is not None}
            job = build_job(part, config, args.out, device, dtype, args.seed, args.compile)
            trainer = Trainer(job, replace(RECIPES[part], **changes), args.out)
            if args.resume and trainer.folder.exists():
                trainer.restore()
            count = sum(p.numel() for p in trainer.parameters.values())
            where = f"from step {trainer.step} of {trainer.recipe.steps}"
            print(f"{part}: {count} parameters, {dtype}, {where}", flush=True)
            run(trainer, (deadline - time.monotonic()) / 60, args.save_minutes)
    except StagevarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
