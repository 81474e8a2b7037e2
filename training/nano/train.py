"""Trains nano: `python -m training.nano.train {tokenizer,transformer,clip,all} --preset 64px --out DIR`.

Torch only. Every step draws its own scenes and random numbers from (seed, step), so a run stopped and resumed at any
step takes the same path as one that never stopped, and no scene is ever seen twice. `--minutes` ends a run early and
leaves a checkpoint; the same command with `--resume` continues. `--steps` fixes the learning-rate schedule (constant,
then linear to zero over the last part) and may be raised on resume while the rate is still constant.

Matrices inside the networks are trained by Muon, everything else by AdamW. Products run in bfloat16 if the machine
multiplies faster in it (timed at the start); weights stay float32; published weights are the running average (EMA).

Source: bit flips as self-correction and caption dropping after Infinity (Han et al. 2024); Muon as in torch.optim.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stagevar.errors import StagevarError, UsageError
from stagevar.models.nano.presets import PRESETS, NanoPreset, preset
from training.nano.checkpoints import load_checkpoint, save_checkpoint
from training.nano.clip import ClipJob
from training.nano.jobs import Job, TokenizerJob, TransformerJob


@dataclass(frozen=True)
class Recipe:
    """Optimization of one part. Rates are peaks; `cooldown` is the share of steps over which they fall to zero."""

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
        steps=4500, batch=48, muon_rate=0.02, adam_rate=2e-3, warmup=100, cooldown=0.5, clip_norm=1.0
    ),
    "clip": Recipe(steps=600, batch=128, muon_rate=0.01, adam_rate=1e-3, warmup=100, cooldown=0.5),
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


def build_job(
    part: str,
    config: NanoPreset,
    out: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    compiled: bool = False,
) -> Job:
    """The job of a part, initialized from the seed. The transformer reads `out`/tokenizer.safetensors."""
    torch.manual_seed(seed)
    if part == "tokenizer":
        return TokenizerJob(config, device, dtype)
    if part == "transformer":
        return TransformerJob(config, device, dtype, out / "tokenizer.safetensors", compiled)
    return ClipJob(config, device, dtype)


class Trainer:
    """Steps a job; holds optimizers and the running average; reads and writes checkpoints."""

    def __init__(self, job: Job, recipe: Recipe, out: Path):
        self.job, self.recipe, self.out, self.step = job, recipe, out, 0
        self.parameters = {n: p for n, p in job.model.named_parameters() if p.requires_grad}
        muon = {n: p for n, p in self.parameters.items() if job.uses_muon(n, p)}
        adam = {n: p for n, p in self.parameters.items() if n not in muon}
        self.optimizers = {
            "muon": (torch.optim.Muon(muon.values(), lr=recipe.muon_rate, weight_decay=0.0, momentum=0.95), muon),
            "adam": (torch.optim.AdamW(adam.values(), lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0), adam),
        }
        self.rates = {"muon": recipe.muon_rate, "adam": recipe.adam_rate}
        self.forget_average()

    def forget_average(self) -> None:
        """Starts the running average at the current weights, as after loading some."""
        self.average = {n: p.detach().clone() for n, p in self.job.model.state_dict().items()}

    def _factor(self) -> float:
        """Learning-rate factor of the coming step: warm-up, constant, linear to zero."""
        recipe = self.recipe
        left = (recipe.steps - self.step) / max(1.0, recipe.cooldown * recipe.steps)
        return min(1.0, (self.step + 1) / recipe.warmup, left)

    def advance(self) -> tuple[float, dict[str, float]]:
        """One optimization step; returns the loss and the job's figures."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)
        rng = np.random.default_rng([self.recipe.seed, self.step])
        loss, figures = self.job.loss(rng, self.recipe.batch, self.step / self.recipe.steps)
        self.job.model.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip_norm)
            figures["norm"] = norm.item()
        factor = self._factor()
        for name, (optimizer, _) in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * factor
            optimizer.step()
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
        """Checkpoint (weights, average, optimizer state) and the published files of the average."""
        tensors = {f"model/{n}": t for n, t in self.job.model.state_dict().items()}
        tensors |= {f"average/{n}": t for n, t in self.average.items()}
        for kind, (optimizer, named) in self.optimizers.items():
            for name, parameter in named.items():
                for key, value in optimizer.state[parameter].items():
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
        """Resumes from the checkpoint in the output folder."""
        tensors, state = load_checkpoint(self.folder)
        self.step = state["step"]
        device = next(iter(self.parameters.values())).device
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            groups.setdefault(kind, {})[rest] = tensor.to(device)
        self.job.model.load_state_dict(groups["model"])
        self.average = groups["average"]
        for kind, (optimizer, named) in self.optimizers.items():
            for entry, tensor in groups.get(kind, {}).items():
                name, key = entry.rsplit("/", 1)
                # AdamW keeps its step counter on the CPU.
                optimizer.state[named[name]][key] = tensor.cpu() if key == "step" else tensor


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
    p.add_argument("--preset", default="64px", choices=sorted(PRESETS))
    p.add_argument("--out", type=Path, required=True, help="folder for checkpoints and published weights")
    p.add_argument("--steps", type=int, help="length of the learning-rate schedule (default: the recipe's)")
    p.add_argument("--batch", type=int, help="images per step (default: the recipe's)")
    p.add_argument("--minutes", type=float, default=1e9, help="stop this run after this many minutes")
    p.add_argument("--save-minutes", type=float, default=8.0, help="minutes between checkpoints")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    p.add_argument("--start", type=Path, help="folder of published weights to start from")
    p.add_argument(
        "--decoder-only", action="store_true", help="train only the tokenizer's decoder; its codes stay bit-identical"
    )
    p.add_argument("--muon-rate", type=float, help="peak learning rate of the hidden matrices (default: the recipe's)")
    p.add_argument("--adam-rate", type=float, help="peak learning rate of everything else (default: the recipe's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action="store_true", help="torch.compile: twice as fast, needs a C++ compiler")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        config, device = preset(args.preset), torch.device(args.device)
        if args.decoder_only and (args.part != "tokenizer" or not (args.start or args.resume)):
            raise UsageError(
                "--decoder-only is for the tokenizer with --start: an untrained encoder has no bits to keep"
            )
        for name in ("steps", "batch"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise UsageError(f"--{name} {value} must be at least 1")
        args.out.mkdir(parents=True, exist_ok=True)
        dtype = fast_dtype(device)
        deadline = time.monotonic() + args.minutes * 60
        for part in ("tokenizer", "transformer", "clip") if args.part == "all" else (args.part,):
            names = ("steps", "batch", "seed", "muon_rate", "adam_rate")
            changes = {k: getattr(args, k) for k in names if getattr(args, k) is not None}
            job = build_job(part, config, args.out, device, dtype, args.seed, args.compile)
            if args.decoder_only:
                job.freeze_encoder()
            trainer = Trainer(job, replace(RECIPES[part], **changes), args.out)
            if args.resume and trainer.folder.exists():
                trainer.restore()
            elif args.start:
                job.load_published(args.start)
                trainer.forget_average()
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
