"""Figures of whole sets: FID, KID, Inception Score by torchmetrics over torch-fidelity's Inception; CMMD over CLIP."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from stagevar.errors import UsageError
from tuner.metrics.base import Prompt, SetMetric, check_images, needed
from tuner.metrics.model_files import read_state_dict, refuse_missing, url_state_dict


class InceptionFeatures(nn.Module):
    """torch-fidelity's port of the TensorFlow Inception of the FID papers: uint8 (B, 3, H, W) to (B, num_features).

    Args:
        feature: "2048" (pool) or "logits_unbiased".
        weights: its published state dict as a local file, else from torch's cache.
    """

    def __init__(self, feature: str, weights: str | None = None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.num_features = {"2048": 2048, "logits_unbiased": 1008}[feature]
        self.source = weights or URL_INCEPTION_V3
        state = read_state_dict(weights) if weights else url_state_dict(URL_INCEPTION_V3, "Inception weights")
        # torch-fidelity unpickles whatever path it is given; the file it gets here was already read as tensors only.
        with tempfile.TemporaryDirectory() as folder, refuse_missing(f"Inception from {self.source}"):
            path = Path(folder) / "inception.pt"
            torch.save(state, path)
            self.network = NoTrainInceptionV3("inception-v3-compat", [feature], str(path))

    def forward(self, images_uint8_B3HW: torch.Tensor) -> torch.Tensor:
        return self.network(images_uint8_B3HW)


class ClipFeatures(nn.Module):
    """CLIP image features in place of Inception's; the figures are not comparable with published FID or KID."""

    def __init__(self, model: str, pretrained: str, device: str) -> None:
        super().__init__()
        from tuner.metrics.clip import ClipModel

        self.clip = ClipModel(model, pretrained, device=device)
        self.source = self.clip.source
        self.num_features = int(self.clip.text_features(["a"]).shape[1])

    def forward(self, images_uint8_B3HW: torch.Tensor) -> torch.Tensor:
        features_BD = self.clip.image_features(images_uint8_B3HW.permute(0, 2, 3, 1).cpu().numpy())
        return features_BD.to(images_uint8_B3HW.device)


class DinoFeatures(nn.Module):
    """Class tokens of a DINO in place of Inception's features: closer to how people see what an image shows."""

    def __init__(self, model: str, device: str) -> None:
        super().__init__()
        from tuner.metrics.perceptual import DinoSimilarity

        self.dino, self.source = DinoSimilarity(device=device, model=model), model
        self.num_features = int(self.dino.model.config.hidden_size)

    def forward(self, images_uint8_B3HW: torch.Tensor) -> torch.Tensor:
        tokens_BD = self.dino.class_tokens(images_uint8_B3HW.permute(0, 2, 3, 1).cpu().numpy())
        return tokens_BD.to(images_uint8_B3HW.device)


class _FeatureMetric(SetMetric):
    """What the three metrics share: an extractor, and batches converted to its input.

    Args:
        extractor: "inception", "clip" (with model and pretrained), or a module from uint8 (B, 3, H, W) to
            (B, num_features).
        weights: Inception's file.
    """

    feature: ClassVar[str] = "2048"

    def __init__(
        self,
        *,
        device: str = "cpu",
        extractor: str | nn.Module = "inception",
        weights: str | None = None,
        model: str = "ViT-L-14",
        pretrained: str = "openai",
    ) -> None:
        if extractor == "inception":
            extractor = InceptionFeatures(self.feature, weights)
        elif extractor == "clip":
            extractor = ClipFeatures(model, pretrained, device)
        elif not isinstance(extractor, nn.Module):
            raise UsageError(f"{self.name}: extractor {extractor!r}, expected inception or clip")
        self.device, self.extractor = device, extractor.eval().to(device)

    @torch.inference_mode()
    def features(self, images_uint8_BHW3: np.ndarray) -> torch.Tensor:
        """Features (B, D) in float64 on the CPU."""
        return self.extractor(self._tensor(images_uint8_BHW3)).double().cpu()

    def describe(self) -> dict[str, object]:
        source = getattr(self.extractor, "source", type(self.extractor).__name__)
        return super().describe() | {"extractor": type(self.extractor).__name__, "weights": Path(str(source)).name}

    def _tensor(self, images_uint8_BHW3: np.ndarray) -> torch.Tensor:
        check_images(self.name, images_uint8_BHW3)
        return torch.from_numpy(np.ascontiguousarray(images_uint8_BHW3)).permute(0, 3, 1, 2).to(self.device)

    def _stream(self, target: Any, batches: Iterable[np.ndarray], **update: Any) -> int:
        count = 0
        for images in batches:
            target.update(self._tensor(images), **update)
            count += len(images)
        return count

    def _at_least(self, count: int, needed: int, what: str) -> None:
        if count < needed:
            raise UsageError(f"{self.name}: {count} {what}, needs at least {needed}")

    def _references(self, reference: Any) -> Any:
        if reference is None:
            raise UsageError(f"{self.name} compares two sets: pass reference images (--reference)")
        return reference


class Fid(_FeatureMetric):
    """Frechet Inception distance, lower is better.

    `score` gives the jackknife values n FID - (n - 1) FID without image i, against the references.
    Source: Heusel et al. 2017.
    """

    name: ClassVar[str] = "fid"
    higher_is_better: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def score_set(self, batches: Iterable[np.ndarray], reference_batches: Iterable[np.ndarray] | None = None) -> float:
        from torchmetrics.image.fid import FrechetInceptionDistance

        fid = FrechetInceptionDistance(feature=self.extractor).to(self.device)
        self._at_least(self._stream(fid, self._references(reference_batches), real=True), 2, "reference images")
        self._at_least(self._stream(fid, batches, real=False), 2, "images")
        return float(fid.compute())

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        count = len(images_uint8_BHW3)
        self._at_least(count, 3, "images in a batch")
        image_BD, reference_BD = self.features(images_uint8_BHW3), self.features(needed(reference_images_uint8_BHW3))
        whole = frechet_distance(image_BD, reference_BD)
        others = torch.arange(count)
        return np.array(
            [
                count * whole - (count - 1) * frechet_distance(image_BD[others != left_out], reference_BD)
                for left_out in range(count)
            ]
        )


class FidDinov2(Fid):
    """Frechet distance of DINOv2's class tokens, lower is better: FD-DINOv2.

    Args:
        model: a transformers DINOv2, a hub name or a local folder.
        extractor: a module instead, as for `fid`.

    Source: Stein et al. 2023 ("Exposing flaws of generative model evaluation metrics"), ViT-L/14. Images are prepared by the
    checkpoint's own processor.
    """

    name: ClassVar[str] = "fid_dinov2"
    higher_is_better: ClassVar[bool] = False

    def __init__(
        self,
        *,
        device: str = "cpu",
        extractor: nn.Module | None = None,
        model: str = "facebook/dinov2-large",
    ) -> None:
        super().__init__(device=device, extractor=extractor or DinoFeatures(model, device))


class Kid(_FeatureMetric):
    """Kernel Inception distance (unbiased), lower is better; can be slightly negative.

    `score_set` is the mean over `subsets` random subsets of `subset_size` images, fewer if a set is smaller, with a fixed
    seed. `score` is the U-statistic of the given images, split by image; its mean is exactly that statistic.
    Source: Binkowski et al. 2018, cubic polynomial kernel.
    """

    name: ClassVar[str] = "kid"
    higher_is_better: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def __init__(
        self,
        *,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        device: str = "cpu",
        extractor: str | nn.Module = "inception",
        weights: str | None = None,
        model: str = "ViT-L-14",
        pretrained: str = "openai",
    ) -> None:
        super().__init__(device=device, extractor=extractor, weights=weights, model=model, pretrained=pretrained)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def score_set(self, batches: Iterable[np.ndarray], reference_batches: Iterable[np.ndarray] | None = None) -> float:
        from torchmetrics.image.kid import KernelInceptionDistance

        kid = KernelInceptionDistance(feature=self.extractor, subsets=self.subsets, subset_size=2).to(self.device)
        references = self._stream(kid, self._references(reference_batches), real=True)
        count = self._stream(kid, batches, real=False)
        self._at_least(min(count, references), 2, "images in the smaller set")
        kid.subset_size = min(self.subset_size, count, references)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return float(kid.compute()[0])

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        self._at_least(len(images_uint8_BHW3), 2, "images in a batch")
        image_BD, reference_BD = self.features(images_uint8_BHW3), self.features(needed(reference_images_uint8_BHW3))
        within_B = _mean_of_others(_cubic_kernel(image_BD, image_BD))
        across_B = _cubic_kernel(image_BD, reference_BD).mean(1)
        return (within_B - 2 * across_B + _mean_of_others(_cubic_kernel(reference_BD, reference_BD)).mean()).numpy()

    def describe(self) -> dict[str, object]:
        return super().describe() | {"subsets": self.subsets, "subset_size": self.subset_size, "seed": self.seed}


class InceptionScore(_FeatureMetric):
    """Inception Score, higher is better.

    `score_set` is the mean over `splits` splits. `score` is the divergence of each image's class distribution from the mean
    of the given images'; its mean is the logarithm of their Inception Score. Source: Salimans et al. 2016.
    """

    name: ClassVar[str] = "is"
    feature: ClassVar[str] = "logits_unbiased"

    def __init__(
        self,
        *,
        splits: int = 10,
        seed: int = 0,
        device: str = "cpu",
        extractor: str | nn.Module = "inception",
        weights: str | None = None,
    ) -> None:
        if extractor == "clip":
            raise UsageError("is: extractor clip has no class probabilities; use inception")
        super().__init__(device=device, extractor=extractor, weights=weights)
        self.splits, self.seed = splits, seed

    def score_set(self, batches: Iterable[np.ndarray], reference_batches: Iterable[np.ndarray] | None = None) -> float:
        from torchmetrics.image.inception import InceptionScore as TorchmetricsScore

        metric = TorchmetricsScore(feature=self.extractor, splits=self.splits).to(self.device)
        self._at_least(self._stream(metric, batches), self.splits, "images")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return float(metric.compute()[0])

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        log_p_BC = self.features(images_uint8_BHW3).log_softmax(dim=1)
        p_BC = log_p_BC.exp()
        return (p_BC * (log_p_BC - p_BC.mean(0).log())).nansum(dim=1).numpy()

    def describe(self) -> dict[str, object]:
        return super().describe() | {"splits": self.splits, "seed": self.seed}


class Cmmd(_FeatureMetric):
    """CLIP maximum mean discrepancy, lower is better: a Gaussian kernel of width 10 on unit CLIP features, times 1000.

    It assumes nothing about the distribution's shape. It is the mean over all pairs, including each image with itself, so it
    is never below 0. `score` is the same, split by image; its mean is exactly the figure. `score_pairs` adds an interval by
    the jackknife over pairs. `extractor` is a module from uint8 (B, 3, H, W) to (B, D) in place of CLIP `model` with weights
    `pretrained`.

    Source: Jayasumana et al., "Rethinking FID" (2024): kernel, width, factor and ViT-L/14 at 336 pixels.
    """

    name: ClassVar[str] = "cmmd"
    higher_is_better: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    width, factor = 10.0, 1000.0

    def __init__(
        self,
        *,
        device: str = "cpu",
        extractor: nn.Module | None = None,
        model: str = "ViT-L-14-336",
        pretrained: str = "openai",
    ) -> None:
        super().__init__(device=device, extractor=extractor or "clip", model=model, pretrained=pretrained)

    def features(self, images_uint8_BHW3: np.ndarray) -> torch.Tensor:
        """Unit features (B, D) in float64 on the CPU."""
        return nn.functional.normalize(super().features(images_uint8_BHW3), dim=1)

    def score_set(self, batches: Iterable[np.ndarray], reference_batches: Iterable[np.ndarray] | None = None) -> float:
        references = self._references(reference_batches)
        image_ND, reference_MD = self._all(batches, "images"), self._all(references, "reference images")
        return float(self._contributions(image_ND, reference_MD).mean())

    def score_pairs(
        self, batches: Iterable[np.ndarray], reference_batches: Iterable[np.ndarray]
    ) -> tuple[float, float, float]:
        image_ND, reference_ND = self._all(batches, "images"), self._all(reference_batches, "reference images")
        count = len(image_ND)
        if count != len(reference_ND) or count < 3:
            raise UsageError(f"{self.name}: {count} images and {len(reference_ND)} references, needs at least 3 pairs")
        across_NN = self._kernel(image_ND, reference_ND)
        pairs_NN = self._kernel(image_ND, image_ND) + self._kernel(reference_ND, reference_ND) - across_NN - across_NN.T
        value = float(pairs_NN.mean())
        without_N = (pairs_NN.sum() - 2 * pairs_NN.sum(1) + pairs_NN.diagonal()) / (count - 1) ** 2
        error = float(((count - 1) / count * (without_N - without_N.mean()).square().sum()).sqrt())
        return value, max(0.0, value - 1.96 * error), value + 1.96 * error

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        image_BD, reference_BD = self.features(images_uint8_BHW3), self.features(needed(reference_images_uint8_BHW3))
        return self._contributions(image_BD, reference_BD).numpy()

    def _all(self, batches: Iterable[np.ndarray], what: str) -> torch.Tensor:
        parts = [self.features(images) for images in batches]
        if not parts:
            raise UsageError(f"{self.name}: no {what}, needs at least 1")
        return torch.cat(parts)

    def _kernel(self, a_ND: torch.Tensor, b_MD: torch.Tensor) -> torch.Tensor:
        """Kernel (N, M), times the factor; the squared distance of unit features is 2 - 2 cosine."""
        return self.factor * ((a_ND @ b_MD.T - 1) / self.width**2).exp()

    def _contributions(self, image_ND: torch.Tensor, reference_MD: torch.Tensor) -> torch.Tensor:
        within, across_NM = self._kernel(reference_MD, reference_MD).mean(), self._kernel(image_ND, reference_MD)
        return self._kernel(image_ND, image_ND).mean(1) - 2 * across_NM.mean(1) + within


def frechet_distance(image_ND: torch.Tensor, reference_MD: torch.Tensor) -> float:
    """Squared Frechet distance of the Gaussians with the two samples' means and covariances.

    The trace of the root of the product of covariances is the nuclear norm of the product of the centered samples, so
    small sets cost N x M instead of D x D. A test holds that it equals torchmetrics' figure.
    """
    offset_D = image_ND.mean(0) - reference_MD.mean(0)
    image_ND = (image_ND - image_ND.mean(0)) / (len(image_ND) - 1) ** 0.5
    reference_MD = (reference_MD - reference_MD.mean(0)) / (len(reference_MD) - 1) ** 0.5
    cross = torch.linalg.svdvals(image_ND @ reference_MD.T).sum()
    return float(offset_D.square().sum() + image_ND.square().sum() + reference_MD.square().sum() - 2 * cross)


def _cubic_kernel(a_ND: torch.Tensor, b_MD: torch.Tensor) -> torch.Tensor:
    return (a_ND @ b_MD.T / a_ND.shape[1] + 1.0) ** 3


def _mean_of_others(kernel_NN: torch.Tensor) -> torch.Tensor:
    """Row means without the diagonal (N,)."""
    return (kernel_NN.sum(1) - kernel_NN.diagonal()) / (len(kernel_NN) - 1)
