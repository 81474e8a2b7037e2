"""The parts of nano that can be trained: losses over fresh batches of scenes, and the files that each part publishes.

The tokenizer is trained coarse to fine. Half of a batch stops at an early scale and is decoded from that partial sum;
the gradient reaches the encoder through the low-pass of the latent that the partial sum approximates, so that what
decides a scene moves to coarse scales. (Straight through the latent itself would push it out of the codes' range.)

The transformer learns what to draw from the coarse scales: most steps see only those. Two linear heads that are thrown away
afterwards tie words to places sooner than bits alone do: one names the object that covers each cell, the other reads from a
word's features on which side of another its object must be.

Source: bit flips as self-correction and caption dropping after Infinity (Han et al. 2024); the low-pass straight-through
estimator and the heads are our own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from stagevar.errors import WeightsError
from stagevar.models.infinity.transformer import Infinity
from stagevar.models.nano import drawing, scenes
from stagevar.models.nano.presets import NanoPreset
from stagevar.models.nano.text import NanoTextEncoder
from stagevar.models.nano.tokenizer import NanoTokenizer


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

    def load_published(self, folder: Path) -> None:
        """Starts from published weights; what is not published keeps its initial values."""
        for file, tensors in self.files(self.model.state_dict()).items():
            found = read_weights(folder / file, "name a folder of nano's weights")
            for name, tensor in tensors.items():
                if name not in found or found[name].shape != tensor.shape:
                    raise WeightsError(f"{folder / file} does not fit this preset at {name!r}; start without --start")
            self.take(file, found)

    @abstractmethod
    def take(self, file: str, tensors: dict[str, Tensor]) -> None:
        """Puts the tensors of one published file into the model."""

    def uses_muon(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is a hidden matrix."""
        return parameter.ndim == 2


class TokenizerJob(Job):
    """Pixels through the residual quantizer and back, straight through the signs.

    Of a batch, half is reconstructed in full; half of those with bits of the last two scales flipped, so that the
    decoder forgives a transformer's late mistakes (these teach only the decoder). The other half stops at a scale drawn
    from `STOPS`.
    """

    name = "tokenizer"
    commitment, max_late_flip = 2.0, 0.5
    # Odds of the side at which a sample of the second half stops; sides that a preset lacks are left out.
    STOPS: ClassVar[dict[int, float]] = {11: 0.5, 10: 0.5, 8: 0.35, 6: 0.12, 4: 0.03, 3: 0.02, 2: 0.02, 1: 0.01}

    def __init__(self, config: NanoPreset, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.model = NanoTokenizer(config).to(device)
        odds = np.array([self.STOPS.get(s, 0.0) for s in config.scales[:-1]] + [0.0])
        self.stop_odds = odds / odds.sum()

    def freeze_encoder(self) -> None:
        """Trains the decoder alone from here on: no bit changes, so a transformer that was trained on them stays right."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith("encode_"))

    def lowpass(self, latent_BdHW: Tensor, scale: int) -> Tensor:
        """What the code sum after a scale approximates: the latent averaged to that grid and drawn out again."""
        grids = self.config.grids
        if grids[scale] == grids[-1]:
            return latent_BdHW
        small = F.interpolate(latent_BdHW, size=grids[scale], mode="area")
        return F.interpolate(small, size=grids[-1], mode="bilinear", align_corners=False)

    def loss(self, rng: np.random.Generator, batch: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        image = draw_images(scenes.sample(batch, rng), self.config, self.device)
        scales, parted = len(self.config.scales), batch // 2
        stops = torch.from_numpy(np.sort(rng.choice(scales, size=parted, p=self.stop_odds))).to(self.device)
        worn = (batch - parted) // 2
        flips = rng.uniform(0.0, self.max_late_flip) * (np.arange(scales) >= scales - 2)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            latent = self.model.encode(image).float()
            sums = self.model.partial_sums(latent)
            code_sum = sums[-1]
            parts = []
            for scale in stops.unique().tolist():
                rows = torch.nonzero(stops == scale)[:, 0]
                low = self.lowpass(latent[rows], scale)
                parts.append(low + (sums[scale][rows] - low).detach())
            whole = latent[parted:] + (code_sum[parted:] - latent[parted:]).detach()
            if worn:
                with torch.no_grad():
                    flipped = self.model.residual.quantize(latent[parted : parted + worn], flips.tolist())[2]
                whole = torch.cat([flipped, whole[worn:]])
            output = self.model.decode(torch.cat([*parts, whole])).float()
        error_B = (F.l1_loss(output, image, reduction="none") + 2 * F.mse_loss(output, image, reduction="none")).mean(
            (1, 2, 3)
        )
        commitment = F.mse_loss(latent, code_sum)
        clean = slice(parted + worn, None)
        figures = {
            "full_mse": F.mse_loss(output[clean], image[clean]).item(),
            "part_mse": F.mse_loss(output[:parted], image[:parted]).item(),
            "commitment": commitment.item(),
        }
        return error_B.mean() + self.commitment * commitment, figures

    def files(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"tokenizer.safetensors": weights}

    def take(self, file: str, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(tensors)


class TransformerJob(Job):
    """Bitwise next-scale prediction, teacher forced over all scales at once; the text encoder is trained along with it.

    A batch sees only the layout scales, or (a third as large, with a share that rises over the steps) every scale. Bits
    get flipped after they were taken as targets; a tenth of the captions are dropped. A token's weight falls with the
    square root of its scale's size, so that the layout is not drowned.
    """

    name = "transformer"
    # Shares of bits flipped at most, at the layout scales and after them. Infinity's recipe has 0.3 at every scale; on so
    # few steps that hides the layout, while later scales learn to fix each other's mistakes.
    max_flip, max_late_flip = 0.15, 0.3
    caption_drop, placing_weight = 0.1, 0.3
    # Weight of the naming loss by side. Who stands where is drawn at sides 2 and 3, in a few tokens of a few prompts:
    # at the weight of the others its gradient is a hundredth of the whole and the order of two objects is not learned.
    NAMING: ClassVar[dict[int, float]] = {2: 2.0, 3: 1.0}
    naming_weight = 0.2
    # Share of the tasks in the data, in the order of scenes.TASKS: the harder ones more often.
    task_weights = (0.3, 1.4, 1.6, 0.4, 3.0, 2.2, 0.7)
    # (progress, share of the batches that see every scale from there on).
    WHOLE_SHARE: ClassVar[tuple[tuple[float, float], ...]] = ((0.0, 0.1), (0.4, 0.2), (0.75, 0.5))

    def __init__(
        self, config: NanoPreset, device: torch.device, dtype: torch.dtype, tokenizer: Path, compiled: bool = False
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.tokenizer = NanoTokenizer(config).to(device).requires_grad_(False)
        self.tokenizer.load_state_dict(read_weights(tokenizer, "run `python -m training.nano.train tokenizer` first"))
        transformer = Infinity(config.infinity())
        transformer.init_weights()
        naming = nn.Linear(config.width, sum(scenes.NAMES))
        placing = nn.Linear(config.text_dim, 1 + len(scenes.RELATIONS))
        for head in (naming, placing):
            # From zero a head is silent at first, so it does not disturb a warm start.
            nn.init.zeros_(head.weight)
        parts = {"transformer": transformer, "text": NanoTextEncoder(config), "naming": naming, "placing": placing}
        self.model = nn.ModuleDict(parts).to(device)
        transformer.set_grids(config.grids)
        # Two shapes, of the layout scales and of all; the compiler makes a variant of each.
        forward = transformer.features_train
        self.forward = torch.compile(forward, dynamic=False) if compiled else forward

    def uses_muon(self, name: str, parameter: Tensor) -> bool:
        outer = ("embed", "head.", "positions", "cfg_uncond", "naming", "placing")
        return parameter.ndim == 2 and not any(part in name for part in outer)

    @classmethod
    def world(
        cls, config: NanoPreset, rng: np.random.Generator, batch: int, progress: float
    ) -> tuple[scenes.SceneBatch, int]:
        """The scenes of one step, and how many scales of them it sees."""
        share = [share for begins, share in cls.WHOLE_SHARE if progress >= begins][-1]
        scales = config.layout_scales
        if rng.random() < share:
            batch, scales = max(1, batch // 3), len(config.scales)
        return scenes.sample(batch, rng, task_weights=cls.task_weights), scales

    def loss(self, rng: np.random.Generator, batch: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        world, scales = self.world(self.config, rng, batch, progress)
        image = draw_images(world, self.config, self.device)
        ids_BT, _ = self.model["text"].tokenize(world.captions)
        ids_BT = F.pad(ids_BT, (0, scenes.LONGEST_CAPTION + 1 - ids_BT.shape[1]))  # one shape for the compiler
        late = np.arange(len(self.config.scales)) >= self.config.layout_scales - 1
        flips = (rng.uniform(size=late.size) * np.where(late, self.max_late_flip, self.max_flip)).tolist()
        null_B = torch.from_numpy(rng.random(len(world)) < self.caption_drop).to(self.device)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                latent = self.tokenizer.encode(image).float()
                targets, inputs, _ = self.tokenizer.residual.quantize(latent, flips)
            text_BTD, mask_B11T = self.model["text"](ids_BT.to(self.device))
            x_BLC, logits_BLV = self.forward(text_BTD, mask_B11T, inputs[: scales - 1], null_B)
        sides = self.config.scales[:scales]
        weight_L = torch.cat([torch.full((s * s,), 1.0 / s) for s in sides]).to(self.device)
        weight_L = weight_L / weight_L.mean()
        pairs = logits_BLV.float().unflatten(-1, (-1, 2))
        target_BLt = torch.cat(targets[:scales], dim=1).float()
        entropy_BLt = F.binary_cross_entropy_with_logits(pairs[..., 1] - pairs[..., 0], target_BLt, reduction="none")
        entropy_L = entropy_BLt.mean((0, 2))
        naming_L = self._naming_loss(x_BLC.float(), world, sides, null_B)
        figures = {}
        for name, loss_L in (("bits", entropy_L), ("names", naming_L)):
            parts = loss_L.detach().split([s * s for s in sides])
            figures |= {f"{name}{side}": part.mean().item() for side, part in zip(sides, parts, strict=True)}
        placing = self._placing_loss(text_BTD.float(), world)
        figures["places"] = placing.item()
        named_L = torch.cat([torch.full((s * s,), self.NAMING.get(s, self.naming_weight)) for s in sides]).to(
            self.device
        )
        loss = ((entropy_L + named_L * naming_L) * weight_L).mean() + self.placing_weight * placing
        return loss, figures

    def _placing_loss(self, text_BTD: Tensor, world: scenes.SceneBatch) -> Tensor:
        """Entropy of the side on which a word's object must be, read from the word's features.

        Whether "left of" puts a word's object to the left depends on the words before it: bits teach that too slowly, so
        without this loss the order of two objects stays a coin flip.
        """
        side_BT = torch.zeros(text_BTD.shape[:2], dtype=torch.long)
        for row_T, caption in zip(side_BT, world.captions, strict=True):
            sides = torch.tensor(sides_of(caption.split()))
            row_T[: len(sides)] = sides
        return F.cross_entropy(self.model["placing"](text_BTD).flatten(0, 1), side_BT.flatten().to(text_BTD.device))

    def _naming_loss(self, x_BLC: Tensor, world: scenes.SceneBatch, sides: Sequence[int], null_B: Tensor) -> Tensor:
        """Divergence per token (L,) between what covers a cell and what the head reads from the trunk's features."""
        wanted_BLn = torch.from_numpy(np.concatenate([scenes.cells(world, s) for s in sides], axis=1)).to(x_BLC.device)
        found_BLn = self.model["naming"](F.layer_norm(x_BLC, x_BLC.shape[-1:]))
        loss_BL = torch.zeros(x_BLC.shape[:2], device=x_BLC.device)
        for wanted, found in zip(wanted_BLn.split(scenes.NAMES, -1), found_BLn.split(scenes.NAMES, -1), strict=True):
            loss_BL = loss_BL + F.kl_div(found.log_softmax(-1), wanted, reduction="none").sum(-1)
        # Without a caption there is nothing to name by.
        return (loss_BL * (~null_B)[:, None]).mean(0)

    def files(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        # Half precision keeps each file well under 15 MiB; the runtime casts on load.
        parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "text": {}}
        for name, tensor in weights.items():
            part, key = name.split(".", 1)
            if part in parts:  # the two heads are thrown away
                parts[part][key] = tensor.half()
        return {"transformer.safetensors": parts["transformer"], "text_encoder.safetensors": parts["text"]}

    def take(self, file: str, tensors: dict[str, Tensor]) -> None:
        self.model["transformer" if file.startswith("transformer") else "text"].load_state_dict(tensors)


def sides_of(words: Sequence[str]) -> list[int]:
    """Per word of a caption, where its object must be: 0 anywhere, else 1 + the index in `scenes.RELATIONS`.

    Words before the relation belong to what stands there, words after it to what stands opposite.
    """
    first_words = [relation.split()[0] for relation in scenes.RELATIONS]
    at = next((index for index, word in enumerate(words) if word in first_words), None)
    if at is None:
        return [0] * len(words)
    side = first_words.index(words[at])
    return [1 + side] * at + [0] + [1 + (side ^ 1)] * (len(words) - at - 1)


def draw_images(world: scenes.SceneBatch, config: NanoPreset, device: torch.device) -> Tensor:
    """Scenes as images (B, 3, H, W) in [-1, 1] on the device."""
    return torch.from_numpy(drawing.draw(world, config.image_size)).to(device).mul_(2).sub_(1)


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """A safetensors file as float32. Raises WeightsError if it is missing."""
    if not path.exists():
        raise WeightsError(f"no {path.name} in {path.parent}; {remedy}")
    return {name: tensor.float() for name, tensor in load_file(path).items()}
