"""GenEval on real images: a COCO detector from transformers, open_clip's color classifier, the official rules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image

from stagevar.errors import UsageError
from stagevar.prompts.class_names import class_name
from stagevar.prompts.geneval import Detection, Metadata, check_metadata, judge
from tuner.metrics.base import BenchmarkMetric, Prompt
from tuner.metrics.detections import geneval_metadata, geneval_summary
from tuner.metrics.model_files import from_pretrained, pretrained_model
from tuner.metrics.prompt_sets import COCO_CLASSES

DETECTORS = {
    "mask2former": "facebook/mask2former-swin-small-coco-instance",  # the official detector's architecture and data
    "rtdetr": "PekingU/rtdetr_r50vd",
    "owlv2": "google/owlv2-base-patch16-ensemble",
}


@dataclass(frozen=True)
class Found:
    """A detected object; `mask_HW` is boolean, at image size, None from box detectors. A detector that determines `color` or
    `texture` itself sets them; no classifier is asked then."""

    class_name: str
    score: float
    box_xyxy: tuple[float, float, float, float]
    mask_HW: np.ndarray | None = None
    color: str | None = None
    texture: str | None = None


class Detector(Protocol):
    """Finds COCO objects; anything with these two methods can be GenEval's detector."""

    def __call__(self, images: Sequence[Image.Image], floor: float) -> list[list[Found]]:
        """Per image, objects scored above `floor`, classes in GenEval's wording, boxes in pixels."""
        ...

    def describe(self) -> dict[str, object]:
        """Names and versions, JSON values only."""
        ...


class GenEval(BenchmarkMetric):
    """1 if the image shows what the prompt's GenEval metadata asks for, else 0.

    Args:
        detector: mask2former (closest to the official one), rtdetr, owlv2, or an object that follows `Detector`.
        detector_model: hub name or local folder in place of the default.
        clip_model, clip_pretrained: the color classifier's.
        threshold, counting_threshold: the official 0.3 and 0.9, chosen for Mask2Former's scores; other detectors score on
            another scale (docs/metrics.md).

    Source: djghosh13/geneval. What differs: transformers' weights of the same network in place of mmdet's.
    """

    name: ClassVar[str] = "geneval"

    def __init__(
        self,
        *,
        device: str = "cpu",
        detector: str | Detector = "mask2former",
        detector_model: str | None = None,
        clip_model: str = "ViT-L-14",
        clip_pretrained: str = "openai",
        color_classifier: Any = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        batch_size: int = 4,
    ) -> None:
        self.threshold, self.counting_threshold, self.batch_size = threshold, counting_threshold, batch_size
        self.detector = load_detector(detector, detector_model, device) if isinstance(detector, str) else detector
        if color_classifier is None:
            from tuner.metrics.clip import ColorClassifier

            color_classifier = ColorClassifier(device=device, model=clip_model, pretrained=clip_pretrained)
        self.color_classifier = color_classifier

    def detections(self, images: Sequence[Image.Image], prompts: Sequence[Metadata]) -> list[list[Detection]]:
        """Per image, all objects above the prompt's threshold; objects whose class the prompt colors have their color."""
        results = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            lowest = min(self.threshold, self.counting_threshold)
            for image, prompt, found in zip(
                images[part], prompts[part], self.detector(images[part], lowest), strict=True
            ):
                floor = self.counting_threshold if prompt["tag"] == "counting" else self.threshold
                results.append(self._colored(image, prompt, [item for item in found if item.score > floor]))
        return results

    def _colored(self, image: Image.Image, prompt: Metadata, found: list[Found]) -> list[Detection]:
        wanted = {class_name(clause["class"]) for clause in prompt.get("include", ()) if "color" in clause}
        colors: dict[int, str] = {}
        for name in sorted(wanted):
            indices = [
                index for index, item in enumerate(found) if class_name(item.class_name) == name and item.color is None
            ]
            if not indices:
                continue
            masks = [found[index].mask_HW for index in indices]
            named = self.color_classifier(
                image,
                name,
                [found[index].box_xyxy for index in indices],
                None if masks[0] is None else masks,
            )
            colors.update(zip(indices, named, strict=True))
        return [
            Detection(item.class_name, item.score, item.box_xyxy, item.color or colors.get(index), item.texture)
            for index, item in enumerate(found)
        ]

    def _rows(self, images_uint8_BHW3: np.ndarray, prompts: Sequence[Prompt]) -> list[dict[str, object]]:
        metadata = [geneval_metadata(self.name, prompt) for prompt in prompts]
        for line in metadata:
            check_metadata(line)
        asked = {class_name(clause["class"]) for line in metadata for clause in line["include"]}
        for name in sorted(asked - set(COCO_CLASSES)):
            warnings.warn(
                f"class {name!r:.60}, which a prompt asks for, is not one of COCO's 80: a COCO detector never finds it"
            )
        pictures = [Image.fromarray(image) for image in images_uint8_BHW3]
        rows = []
        for line, found in zip(metadata, self.detections(pictures, metadata), strict=True):
            verdict = judge(line, found, threshold=self.threshold, counting_threshold=self.counting_threshold)
            rows.append(
                {
                    "value": float(verdict.correct),
                    "reason": verdict.reason,
                    "detections": [
                        {"class": item.class_name, "score": item.score, "box": list(item.box_xyxy)}
                        | ({"color": item.color} if item.color else {})
                        for item in found
                    ],
                }
            )
        return rows

    def summary(self, rows: Sequence[Mapping[str, object]], prompts: Sequence[Prompt]) -> dict[str, object]:
        return geneval_summary(rows, prompts)

    def describe(self) -> dict[str, object]:
        classifier: dict[str, object] = getattr(self.color_classifier, "describe", lambda: {})()
        return super().describe() | {
            "detector": self.detector.describe(),
            "color_classifier": classifier,
            "threshold": self.threshold,
            "counting_threshold": self.counting_threshold,
        }


# Detectors ---------------------------------------------------------------------------------------------------------


def load_detector(kind: str, model: str | None = None, device: str = "cpu") -> Detector:
    """A transformers detector by kind. Raises UsageError if it is unknown, unavailable, or knows too few classes."""
    if kind not in DETECTORS:
        raise UsageError(f"detector {kind!r}: expected one of {', '.join(DETECTORS)}")
    source = model or DETECTORS[kind]
    builders: dict[str, Callable[[str, str], Detector]] = {
        "mask2former": Mask2Former,
        "rtdetr": RtDetr,
        "owlv2": Owlv2,
    }
    return builders[kind](source, device)


class _TransformersDetector:
    kind: ClassVar[str]
    model_class: ClassVar[str]
    processor_class: ClassVar[str]

    def __init__(self, source: str, device: str) -> None:
        import transformers

        self.source, self.device = source, device
        self.processor = from_pretrained(getattr(transformers, self.processor_class), source, "detector")
        self.model = pretrained_model(getattr(transformers, self.model_class), source, "detector", device=device)

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind, "model": self.source}

    def _names(self) -> dict[int, str]:
        """GenEval's names by label id; labels outside COCO's 80 are left out."""
        names = {int(label): class_name(text) for label, text in self.model.config.id2label.items()}
        missing = sorted(set(COCO_CLASSES) - set(names.values()))
        if missing:
            raise UsageError(
                f"detector {self.source} does not know {len(missing)} of GenEval's classes, such as "
                f"{missing[0]!r}; use one trained on COCO"
            )
        return {label: name for label, name in names.items() if name in COCO_CLASSES}


class Mask2Former(_TransformersDetector):
    """Instance masks; scores are class probability times mean mask probability, boxes the masks' extents.

    Source: Cheng et al. 2022; top queries over all classes, boxes with exclusive far corners, as in mmdet.
    transformers' own post-processing is not used: it limits masks to 384 pixels before it finds their extents.
    """

    kind = "mask2former"
    model_class, processor_class = "Mask2FormerForUniversalSegmentation", "AutoImageProcessor"

    def __init__(self, source: str, device: str) -> None:
        super().__init__(source, device)
        self.names = self._names()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], floor: float) -> list[list[Found]]:
        results = []
        for image in images:  # one at a time: the processor would pad a batch of unequal sizes into the masks
            inputs = self.processor(images=[image.convert("RGB")], return_tensors="pt")
            outputs = self.model(pixel_values=inputs["pixel_values"].to(self.device))
            masks_QHW = outputs.masks_queries_logits[0].float()
            results.append(
                self._decode(outputs.class_queries_logits[0].float(), masks_QHW, image.height, image.width, floor)
            )
        return results

    def _decode(
        self, class_QC: torch.Tensor, masks_QHW: torch.Tensor, height: int, width: int, floor: float
    ) -> list[Found]:
        probability_QC = class_QC.softmax(-1)[:, :-1]
        scores, flat = probability_QC.flatten().topk(min(100, probability_QC.numel()))
        found = []
        for score, index in zip(scores.tolist(), flat.tolist(), strict=True):
            query, label = divmod(index, probability_QC.shape[1])
            if score <= floor or label not in self.names:
                continue
            logits_HW = torch.nn.functional.interpolate(
                masks_QHW[query][None, None], size=(height, width), mode="bilinear", align_corners=False
            )[0, 0]
            inside_HW = logits_HW > 0
            if not inside_HW.any():
                continue
            total = score * float(logits_HW.sigmoid()[inside_HW].mean())
            if total > floor:
                mask_HW = inside_HW.cpu().numpy()
                found.append(Found(self.names[label], total, mask_box(mask_HW), mask_HW))
        return found


class RtDetr(_TransformersDetector):
    """RT-DETR (any version): boxes without masks."""

    kind = "rtdetr"
    model_class, processor_class = "AutoModelForObjectDetection", "AutoImageProcessor"

    def __init__(self, source: str, device: str) -> None:
        super().__init__(source, device)
        self.names = self._names()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], floor: float) -> list[list[Found]]:
        pictures = [image.convert("RGB") for image in images]
        outputs = self.model(**self.processor(images=pictures, return_tensors="pt").to(self.device))
        sizes = [(image.height, image.width) for image in pictures]
        return [
            [
                Found(self.names[label], score, tuple(box))
                for score, label, box in zip(
                    result["scores"].tolist(), result["labels"].tolist(), result["boxes"].tolist(), strict=True
                )
                if label in self.names and score > floor
            ]
            for result in self.processor.post_process_object_detection(outputs, threshold=floor, target_sizes=sizes)
        ]


class Owlv2(_TransformersDetector):
    """OWLv2, queried for all 80 classes ("a photo of a ..."); boxes without masks."""

    kind = "owlv2"
    model_class, processor_class = "Owlv2ForObjectDetection", "Owlv2Processor"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], floor: float) -> list[list[Found]]:
        queries = [f"a photo of a {name}" for name in COCO_CLASSES]
        results = []
        for image in images:
            inputs = self.processor(
                text=[queries],
                images=image.convert("RGB"),
                return_tensors="pt",
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
            )
            outputs = self.model(**inputs.to(self.device))
            result = self.processor.post_process_grounded_object_detection(
                outputs, threshold=floor, target_sizes=[(image.height, image.width)]
            )[0]
            results.append(
                [
                    Found(COCO_CLASSES[label], score, tuple(box))
                    for score, label, box in zip(
                        result["scores"].tolist(), result["labels"].tolist(), result["boxes"].tolist(), strict=True
                    )
                    if score > floor
                ]
            )
        return results


def mask_box(mask_HW: np.ndarray) -> tuple[float, float, float, float]:
    """Extent (x0, y0, x1, y1) of a boolean mask in pixels; x1, y1 one past the last."""
    columns, rows = np.flatnonzero(mask_HW.any(0)), np.flatnonzero(mask_HW.any(1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
