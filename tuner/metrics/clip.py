"""Everything that needs a CLIP model: CLIP score, image similarity, HPSv2, GenEval's color classifier.

The only module that imports open_clip. A model is an open_clip architecture with a pretrained tag or a local file, an
open_clip `hf-hub:` or `local-dir:` name, or "nano", the small model shipped for nano's scenes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import open_clip
import torch
from PIL import Image

from stagevar.errors import UsageError
from stagevar.prompts.geneval import COLORS, classify_color
from tuner.metrics.base import Metric, Prompt, needed, prompt_text
from tuner.metrics.downloads import HPSV2
from tuner.metrics.memoized_features import MemoizedFeatures
from tuner.metrics.model_files import hub_file, refuse_missing


class ClipModel:
    """An open_clip model with its own preprocessing and tokenizer, in fp32, evaluated in batches.

    Args:
        model: an architecture such as "ViT-L-14", or "hf-hub:org/repo", "local-dir:/folder" or "nano".
        pretrained: for an architecture, a tag that open_clip knows for it or a path to weights (safetensors, or a pickle of
            tensors only); ignored otherwise.
        resize_mode: "shortest", "longest" or "squash" to replace the model's own preprocessing.

    Raises:
        UsageError: if the architecture, tag or file is unknown or the weights are not available.
    """

    def __init__(
        self,
        model: str = "ViT-L-14",
        pretrained: str = "openai",
        *,
        device: str = "cpu",
        batch_size: int = 64,
        resize_mode: str | None = None,
    ) -> None:
        self.device, self.batch_size = device, batch_size
        self.model: Any  # whose towers are called by open_clip's names
        if model == "nano":
            self.source = "nano"
            self.model, self.preprocess, self.tokenizer = _load_nano()
        else:
            self.source = model if ":" in model else f"{model}/{_short(pretrained)}"
            self.model, self.preprocess, self.tokenizer = _load_open_clip(model, pretrained, resize_mode)
        self.model.eval().requires_grad_(False).to(device)
        self.logit_scale = float(self.model.logit_scale.exp())
        self.known_text_features = MemoizedFeatures(self.text_features)
        self.known_image_features = MemoizedFeatures(self.image_features)

    @torch.inference_mode()
    def image_features(self, images: np.ndarray | Sequence[Image.Image]) -> torch.Tensor:
        """Unit features (B, D) on the CPU, of uint8 (B, H, W, 3) or of PIL images."""
        pictures = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
        parts = []
        for start in range(0, len(pictures), self.batch_size):
            batch = torch.stack([self.preprocess(picture) for picture in pictures[start : start + self.batch_size]])
            parts.append(self.model.encode_image(batch.to(self.device), normalize=True).float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit features (B, D) on the CPU; texts are truncated to the context length, as open_clip does, see `is_cut`."""
        parts = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(list(texts[start : start + self.batch_size]))
            parts.append(self.model.encode_text(tokens.to(self.device), normalize=True).float().cpu())
        return torch.cat(parts)

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Per text, whether it is longer than the context, so that the text tower does not see its end."""
        length = self.tokenizer([""]).shape[1]
        # Twice the length shows at least one token that would be cut; an empty text shows what short texts are padded with.
        padding_T = self.tokenizer([""], context_length=2 * length)[0, length:]
        return [
            bool((self.tokenizer([text], context_length=2 * length)[0, length:] != padding_T).any()) for text in texts
        ]

    def remarks(self, prompts: Sequence[Prompt]) -> list[str]:
        """A sentence on how many prompts the text tower truncates, if any."""
        texts = list(dict.fromkeys(prompt_text(prompt) for prompt in prompts))
        cut = [text for text, beyond in zip(texts, self.is_cut(texts), strict=True) if beyond]
        if not cut:
            return []
        return [
            f"{len(cut)} of {len(texts)} prompts are longer than the {self.tokenizer(['']).shape[1]} tokens that the CLIP text "
            f"tower reads; the rest of each is ignored. The first: {cut[0][:60]!r}"
        ]

    def describe(self) -> dict[str, object]:
        """Model name and a hash of its weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return {"clip": self.source, "weights_sha256": digest.hexdigest(), "open_clip": open_clip.__version__}


@functools.cache
def shared_clip(model: str, pretrained: str, device: str, batch_size: int) -> ClipModel:
    """The one ClipModel with these arguments: a score and a similarity that use the same CLIP load it once."""
    return ClipModel(model, pretrained, device=device, batch_size=batch_size)


class ClipScore(Metric):
    """100 x cosine of image and prompt, not below 0.

    Source: Hessel et al. 2021 (CLIPScore, factor 2.5); the factor 100 is torchmetrics' and the VAR literature's.
    """

    name: ClassVar[str] = "clip_score"
    needs_prompt: ClassVar[bool] = True

    def __init__(
        self, *, device: str = "cpu", model: str = "ViT-L-14", pretrained: str = "openai", batch_size: int = 64
    ) -> None:
        self.clip = shared_clip(model, pretrained, device, batch_size)

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        image_BD = self.clip.image_features(images_uint8_BHW3)
        text_BD = self.clip.known_text_features([prompt_text(prompt) for prompt in prompts])
        return (100.0 * (image_BD * text_BD).sum(1)).clamp(min=0.0).numpy()

    def remarks(self, prompts: Sequence[Prompt]) -> list[str]:
        return self.clip.remarks(prompts)

    def describe(self) -> dict[str, object]:
        return super().describe() | self.clip.describe()


class ClipImageSimilarity(Metric):
    """Cosine of the CLIP image features of the image and its reference, at most 1."""

    name: ClassVar[str] = "clip_image_similarity"
    needs_reference: ClassVar[bool] = True

    def __init__(
        self, *, device: str = "cpu", model: str = "ViT-L-14", pretrained: str = "openai", batch_size: int = 64
    ) -> None:
        self.clip = shared_clip(model, pretrained, device, batch_size)

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        image_BD = self.clip.image_features(images_uint8_BHW3)
        reference_BD = self.clip.known_image_features(needed(reference_images_uint8_BHW3))
        return (image_BD * reference_BD).sum(1).numpy()

    def describe(self) -> dict[str, object]:
        return super().describe() | self.clip.describe()


class HumanPreferenceScore(Metric):
    """HPSv2: cosine of image and prompt in a ViT-H-14 fine-tuned on human choices (about 0.2 to 0.35).

    `weights` is the published checkpoint (HPS_v2.1_compressed.pt): a local path, by default the hub's copy.
    Source: github tgxs002/HPSv2, hpsv2/img_score.py: plain open_clip ViT-H-14, no logit scale, the image shrunk to fit
    and padded. Its own package is not used: it vendors an old open_clip. We run fp32 instead of its AMP.
    """

    name: ClassVar[str] = "hpsv2"
    needs_prompt: ClassVar[bool] = True

    def __init__(
        self,
        *,
        device: str = "cpu",
        weights: str = f"hub:{HPSV2}",
        model: str = "ViT-H-14",
        batch_size: int = 16,
    ) -> None:
        self.clip = ClipModel(
            model, hub_file(weights, "HPSv2"), device=device, batch_size=batch_size, resize_mode="longest"
        )

    def _score(
        self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt], reference_images_uint8_BHW3: np.ndarray | None
    ) -> np.ndarray:
        image_BD = self.clip.image_features(images_uint8_BHW3)
        text_BD = self.clip.known_text_features([prompt_text(prompt) for prompt in prompts])
        return (image_BD * text_BD).sum(1).numpy()

    def remarks(self, prompts: Sequence[Prompt]) -> list[str]:
        return self.clip.remarks(prompts)

    def describe(self) -> dict[str, object]:
        return super().describe() | self.clip.describe()


class ColorClassifier:
    """GenEval's zero-shot color of one object: ten colors, three templates each, argmax of cosines.

    Source: djghosh13/geneval evaluate_images.py. The object is masked, with #999 around it, then cropped to its box; the
    features of a color's three sentences are averaged and normalized again (clip_benchmark's classifier).
    """

    def __init__(
        self, *, device: str = "cpu", model: str = "ViT-L-14", pretrained: str = "openai", batch_size: int = 16
    ) -> None:
        self.clip = shared_clip(model, pretrained, device, batch_size)
        self._heads: dict[str, torch.Tensor] = {}

    def __call__(
        self,
        image: Image.Image,
        class_name: str,
        boxes_xyxy: Sequence[Sequence[float]],
        masks_HW: Sequence[np.ndarray] | None = None,
    ) -> list[str]:
        """Color names of the objects given by boxes in pixels and, optionally, boolean masks (H, W)."""
        if not boxes_xyxy:
            return []
        image = image.convert("RGB")
        blank = Image.new("RGB", image.size, color="#999")
        crops = []
        for index, box in enumerate(boxes_xyxy):
            picture = image
            if masks_HW is not None:
                mask = Image.fromarray(np.asarray(masks_HW[index], dtype=np.uint8) * 255)
                picture = Image.composite(image, blank, mask)
            crops.append(picture.crop(_pixel_box(box)))
        scores_NC = self.clip.image_features(crops) @ self._head(class_name).T
        return [classify_color(row) for row in scores_NC.tolist()]

    def _head(self, class_name: str) -> torch.Tensor:
        """Unit text features (10, D) for one class."""
        if class_name not in self._heads:
            sentences = [
                template.format(color)
                for color in COLORS
                for template in (
                    f"a photo of a {{}} {class_name}",
                    f"a photo of a {{}}-colored {class_name}",
                    "a photo of a {} object",
                )
            ]
            mean_CD = self.clip.text_features(sentences).unflatten(0, (len(COLORS), 3)).mean(1)
            self._heads[class_name] = mean_CD / mean_CD.norm(dim=1, keepdim=True)
        return self._heads[class_name]

    def describe(self) -> dict[str, object]:
        return self.clip.describe()


def _pixel_box(box_xyxy: Sequence[float]) -> tuple[int, int, int, int]:
    """The box in whole pixels, as PIL's crop rounds them, at least one pixel wide and high."""
    x0, y0, x1, y1 = (round(value) for value in box_xyxy)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


# Loading -----------------------------------------------------------------------------------------------------------


def _load_open_clip(model: str, pretrained: str, resize_mode: str | None) -> tuple[torch.nn.Module, Any, Any]:
    if ":" not in model:
        if model not in open_clip.list_models():
            raise UsageError(f"open_clip has no architecture {model!r}; see open_clip.list_models()")
        tags = open_clip.list_pretrained_tags_by_model(model)
        if not Path(pretrained).is_file() and pretrained not in tags:
            raise UsageError(f"CLIP {model}: {pretrained!r} is neither a file nor a tag ({', '.join(tags) or 'none'})")
    with refuse_missing(f"CLIP {model}/{_short(pretrained)}", option="pretrained"):
        built, _, preprocess = open_clip.create_model_and_transforms(
            model,
            pretrained=None if ":" in model else pretrained,
            image_resize_mode=resize_mode,
            weights_only=True,
            require_pretrained=True,
        )
        return built, preprocess, open_clip.get_tokenizer(model)


def _load_nano() -> tuple[torch.nn.Module, Any, Any]:
    """The package's own CLIP; nano's weights folder is an open_clip local folder."""
    folder = Path(str(files("stagevar.models.nano") / "weights"))
    if not (folder / "open_clip_model.safetensors").is_file():
        raise UsageError("nano's CLIP is not in this installation; train it with python -m training.nano.train clip")
    return _load_open_clip(f"local-dir:{folder}", "", None)


def _short(pretrained: str) -> str:
    return Path(pretrained).name
