"""Perceptual comparisons with the full schedule's image: LPIPS, DISTS, DINO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, cast

import numpy as np
import torch
import torchvision
from torch import nn

from stagevar.errors import UsageError, WeightsError
from tuner.metrics.base import Metric, Prompt, needed
from tuner.metrics.memoized_features import MemoizedFeatures
from tuner.metrics.model_files import from_pretrained, pretrained_model, read_state_dict, url_state_dict
from tuner.metrics.pixels import to_unit_range

# Trunks as LPIPS and DISTS were calibrated on them: torchvision's first ImageNet weights.
_TRUNKS = {
    "alex": (torchvision.models.alexnet, torchvision.models.AlexNet_Weights.IMAGENET1K_V1),
    "vgg": (torchvision.models.vgg16, torchvision.models.VGG16_Weights.IMAGENET1K_V1),
    "squeeze": (torchvision.models.squeezenet1_1, torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1),
}


class Lpips(Metric):
    """LPIPS v0.1, 0 for equal images, lower is better.

    Args:
        net: alex (default), vgg or squeeze.
        weights: torchvision's state dict of that network as a local file, else from torch's download cache.

    The calibrated heads come with the lpips package.
    Source: Zhang et al. 2018; package lpips 0.1.4, inputs in -1..1.
    """

    name: ClassVar[str] = "lpips"
    higher_is_better: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def __init__(self, *, device: str = "cpu", net: str = "alex", weights: str | None = None, batch_size: int = 16):
        import lpips

        trunk = _trunk(net, weights)
        self.device, self.batch_size, self.net, self.weights = device, batch_size, net, weights
        self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        _copy_features(trunk, self.model.net)
        self.model.eval().requires_grad_(False).to(device)

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        pairs = _pairs(images_uint8_BHW3, needed(reference_images_uint8_BHW3), self.batch_size, self.device)
        with torch.inference_mode():
            return (
                torch.cat([self.model(image * 2 - 1, reference * 2 - 1).flatten() for image, reference in pairs])
                .cpu()
                .numpy()
            )

    def describe(self) -> dict[str, object]:
        return super().describe() | {"net": self.net, "weights": self.weights or "torchvision"}


class Dists(Metric):
    """DISTS, 0 for equal images, lower is better.

    `weights` is torchvision's VGG-16 state dict as a local file, else from torch's download cache. The learned alpha and
    beta come with torchmetrics. Images keep their size, as in torchmetrics (the authors' script first shrinks to 256).
    Source: Ding et al. 2020; torchmetrics' network, built once instead of once per call.
    """

    name: ClassVar[str] = "dists"
    higher_is_better: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def __init__(self, *, device: str = "cpu", weights: str | None = None, batch_size: int = 16) -> None:
        self.device, self.batch_size, self.weights = device, batch_size, weights
        self.model = _dists_network(_trunk("vgg", weights)).eval().requires_grad_(False).to(device)

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        pairs = _pairs(images_uint8_BHW3, needed(reference_images_uint8_BHW3), self.batch_size, self.device)
        with torch.inference_mode():
            return torch.cat([self.model(image, reference).reshape(-1) for image, reference in pairs]).cpu().numpy()

    def describe(self) -> dict[str, object]:
        return super().describe() | {"weights": self.weights or "torchvision"}


class DinoSimilarity(Metric):
    """Cosine of DINO class tokens of image and reference, at most 1.

    `model` is a transformers vision model (DINO, DINOv2, DINOv3): a hub name or a local folder.
    Source: DreamBooth's DINO score uses facebook/dino-vits16, the default.
    """

    name: ClassVar[str] = "dino"
    needs_reference: ClassVar[bool] = True

    def __init__(self, *, device: str = "cpu", model: str = "facebook/dino-vits16", batch_size: int = 32) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.device, self.batch_size, self.source = device, batch_size, model
        self.processor = from_pretrained(AutoImageProcessor, model, "DINO")
        # The class token is read before the pooler, since published DINO checkpoints have none.
        self.model = pretrained_model(AutoModel, model, "DINO", device=device, optional=("pooler.",))
        self.known_features = MemoizedFeatures(self.features)

    def features(self, images_uint8_BHW3: np.ndarray) -> torch.Tensor:
        """Unit class tokens (B, D) on the CPU."""
        return nn.functional.normalize(self.class_tokens(images_uint8_BHW3), dim=1)

    @torch.inference_mode()
    def class_tokens(self, images_uint8_BHW3: np.ndarray) -> torch.Tensor:
        """Class tokens (B, D) on the CPU, not normalized."""
        parts = []
        for start in range(0, len(images_uint8_BHW3), self.batch_size):
            inputs = self.processor(
                images=list(images_uint8_BHW3[start : start + self.batch_size]), return_tensors="pt"
            )
            parts.append(self.model(**inputs.to(self.device)).last_hidden_state[:, 0].float().cpu())
        return torch.cat(parts)

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        return (
            (self.features(images_uint8_BHW3) * self.known_features(needed(reference_images_uint8_BHW3))).sum(1).numpy()
        )

    def describe(self) -> dict[str, object]:
        return super().describe() | {"model": self.source}


def _pairs(
    images: np.ndarray, references: np.ndarray, batch_size: int, device: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        yield to_unit_range(images[part], device), to_unit_range(references[part], device)


def _trunk(net: str, weights: str | None) -> nn.Module:
    """A torchvision classifier with real `features` from a file or torch's cache; its classifier stays empty.

    Strict: a missing or unknown key of `features` is an error.
    """
    if net not in _TRUNKS:
        raise UsageError(f"LPIPS net {net!r}: expected one of {', '.join(_TRUNKS)}")
    build, default = _TRUNKS[net]
    state = read_state_dict(weights) if weights else url_state_dict(default.url, f"ImageNet weights of {net}")
    with torch.device("meta"):  # the unused classifier is most of VGG's half gigabyte
        model = build(weights=None)
    try:
        model.features.load_state_dict(
            {
                key.removeprefix("features."): value.float()
                for key, value in state.items()
                if key.startswith("features.")
            },
            assign=True,
        )
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise WeightsError(f"{weights or default.url} does not fit {net}: {line:.150}") from None
    return model


def _copy_features(trunk: nn.Module, slices: nn.Module) -> None:
    """Fills LPIPS's slices from a trunk; their children keep the numbers of torchvision's `features`."""
    features = cast(nn.Sequential, trunk.features)
    for slice_module in slices.children():
        for number, layer in slice_module.named_children():
            layer.load_state_dict(features[int(number)].state_dict())


def _dists_network(trunk: nn.Module) -> nn.Module:
    from torchmetrics.functional.image import dists

    @contextmanager
    def given_trunk() -> Iterator[None]:
        # torchmetrics has no way to pass VGG weights: its constructor always downloads. Replaced for this one call.
        original, dists.vgg16 = dists.vgg16, lambda weights: trunk
        try:
            yield
        finally:
            dists.vgg16 = original

    with given_trunk():
        return dists.DISTSNetwork()
