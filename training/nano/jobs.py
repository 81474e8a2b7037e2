"""What is trained: a part's model, its loss on fresh scenes, and the files it publishes.

Source: bit flips as self-correction and caption dropping after Infinity (Han et al. 2024).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from stagevar.errors import WeightsError
from stagevar.models.infinity import Infinity
from stagevar.nano import scenes
from stagevar.nano.presets import NanoPreset
from stagevar.nano.text import NanoTextEncoder
from stagevar.nano.tokenizer import NanoTokenizer


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

    def from_files(self, files: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The inverse of `files`: weights by the model's own names."""
        return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}

    def uses_muon(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is a hidden matrix."""
        return parameter.ndim == 2


class TokenizerJob(Job):
    """Pixels through the residual quantizer and back, coarse to fine.

    Two thirds of a batch are decoded from the code sum of the first scales only, so that meaning moves into them. Their
    gradient reaches the encoder through the low-pass of the latent, which is what such a sum approximates; straight
    through the latent itself it pushes the latent out of the range that the codes can reach. A quarter of the other
    samples lose some of their last two scales' bits, so that the decoder forgives a transformer's late mistakes; these
    train the decoder alone.

    Source: scale dropout after the tokenizer of Infinity (Han et al. 2024) and nested dropout (Rippel et al. 2014); the
    straight-through estimate by the low-pass is our own.
    """

    name = "tokenizer"
    partial, commitment, max_late_flip = 0.68, 2.0, 0.3
    # Where partial samples stop: the scale before the last, the one before that, one more; the rest is spread evenly.
    stop_shares = (0.46, 0.42, 0.08)

    def __init__(self, config: NanoPreset, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.model = NanoTokenizer(config).to(device)
        count = len(config.scales)
        shares = np.full(count - 1, 0.04 / (count - 1))
        shares[::-1][: len(self.stop_shares)] += self.stop_shares[: count - 1]
        self.stop_probability = shares / shares.sum()

    def loss(self, rng: np.random.Generator, batch: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        image = draw_images(scenes.sample(batch, rng), self.config, self.device)
        count, partial = len(self.config.scales), int(self.partial * batch)
        flipped = (batch - partial) // 4
        flips = [0.0] * (count - 2) + rng.uniform(0.0, self.max_late_flip, 2).tolist()
        # Sorted, so that samples that stop alike lie together and are filtered in one call.
        stops = np.sort(rng.choice(count - 1, size=partial, p=self.stop_probability))
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            latent = self.model.encode(image).float()
            sums = self.model.partial_sums(latent)
            reached = []
            for stop in np.unique(stops):
                rows = torch.from_numpy(np.flatnonzero(stops == stop)).to(self.device)
                smooth = self.model.lowpass(latent[rows], int(stop))
                reached.append(smooth + (sums[stop][rows] - smooth).detach())
            worn = self.model.partial_sums(latent[partial : partial + flipped], flips)[-1]
            whole = latent[partial + flipped :] + (sums[-1][partial + flipped :] - latent[partial + flipped :]).detach()
            output = self.model.decode(torch.cat([*reached, worn, whole])).float()
        error_B = (F.l1_loss(output, image, reduction="none") + 2 * F.mse_loss(output, image, reduction="none")).mean(
            (1, 2, 3)
        )
        commitment = F.mse_loss(latent, sums[-1])
        # Both halves count alike, however many samples they have.
        reconstruction = error_B[partial:].mean() + (error_B[:partial].mean() if partial else 0.0)
        figures = {
            "full_mse": F.mse_loss(output[partial + flipped :], image[partial + flipped :]).item(),
            "partial_mse": F.mse_loss(output[:partial], image[:partial]).item(),
            "commitment": commitment.item(),
        }
        return reconstruction + self.commitment * commitment, figures

    def files(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"tokenizer.safetensors": weights}


# Share of the tasks in the transformer's data, in the order of scenes.TASKS: the harder ones more often.
TASK_WEIGHTS = (0.3, 1.4, 1.1, 0.4, 2.4, 2.4, 0.7)
# From which progress on which share of the transformer's steps sees every scale, on a third of the scenes.
WHOLE_SHARE = ((0.0, 0.15), (0.35, 0.35), (0.6, 0.7))


def step_scenes(
    rng: np.random.Generator, batch: int, progress: float, config: NanoPreset
) -> tuple[scenes.SceneBatch, int]:
    """The scenes of one step of the transformer, and how many scales the step trains."""
    share = [share for start, share in WHOLE_SHARE if progress >= start][-1]
    whole = rng.random() < share
    world = scenes.sample(max(1, batch // 3) if whole else batch, rng, task_weights=TASK_WEIGHTS)
    return world, len(config.scales) if whole else config.meaning_scales


class TransformerJob(Job):
    """Bitwise next-scale prediction, teacher forced over several scales at once; the text encoder learns along.

    Most steps see only the scales before the fidelity stage, a quarter of the tokens, because meaning is learned there;
    the share of steps that see all scales rises with progress. Bits are flipped after they were taken as targets; a
    tenth of the captions are dropped. A token's weight falls with the side of its scale, so that the layout is not
    drowned by the fidelity stage.
    """

    name = "transformer"
    max_flip, caption_drop = 0.15, 0.1

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
        self.sides_L = torch.cat([torch.full((s * s,), float(s)) for s in config.scales]).to(device)

    def uses_muon(self, name: str, parameter: Tensor) -> bool:
        outer = ("embed", "head.", "positions", "cfg_uncond")
        return parameter.ndim == 2 and not any(part in name for part in outer)

    def loss(self, rng: np.random.Generator, batch: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        world, count = step_scenes(rng, batch, progress, self.config)
        batch = len(world)
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
            logits = self.forward(text_BTD, mask_B11T, inputs[: count - 1], null_B)
        pairs = logits.float().unflatten(-1, (-1, 2))
        target_BLt = torch.cat(targets[:count], dim=1).float()
        entropy_BLt = F.binary_cross_entropy_with_logits(pairs[..., 1] - pairs[..., 0], target_BLt, reduction="none")
        entropy_L = entropy_BLt.mean((0, 2))
        by_scale = entropy_L.detach().split([s * s for s in self.config.scales[:count]])
        figures = {f"scale{k}": part.mean().item() for k, part in enumerate(by_scale)}
        weight_L = 1 / self.sides_L[: len(entropy_L)]
        return (entropy_L * weight_L).sum() / weight_L.sum(), figures

    def files(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        # Half precision keeps each file well under 15 MiB; the runtime casts on load.
        parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "text": {}}
        for name, tensor in weights.items():
            part, key = name.split(".", 1)
            parts[part][key] = tensor.half()
        return {"transformer.safetensors": parts["transformer"], "text_encoder.safetensors": parts["text"]}

    def from_files(self, files: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        prefixes = {"transformer.safetensors": "transformer", "text_encoder.safetensors": "text"}
        return {f"{prefixes[file]}.{name}": tensor for file, part in files.items() for name, tensor in part.items()}


def draw_images(world: scenes.SceneBatch, config: NanoPreset, device: torch.device) -> Tensor:
    """Scenes as images (B, 3, H, W) in [-1, 1] on the device."""
    return torch.from_numpy(scenes.draw(world, config.image_size)).to(device).mul_(2).sub_(1)


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """A safetensors file as float32. Raises WeightsError where it is missing."""
    if not path.exists():
        raise WeightsError(f"no {path.name} in {path.parent}; {remedy}")
    return {name: tensor.float() for name, tensor in load_file(path).items()}
