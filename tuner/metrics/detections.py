"""Reads detections files for GenEval: what was found in each image, beside what its prompt asked for.

The format is stated in docs/metrics.md ("Detections file"). The reader is liberal in spelling and strict in meaning:
whatever it cannot place for certain is a UsageError that names the image and the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagevar.errors import UsageError
from stagevar.geneval import COLORS, Detection, Summary, Verdict, check_metadata, classify_color, judge, summarise
from stagevar.text_files import read_json_values
from tuner.metrics.base import Prompt

_NAME_KEYS = ("name", "filename", "file_name", "image", "image_id", "id", "path")
_CLASS_KEYS = ("class", "class_name", "label", "category", "name")
_SCORE_KEYS = ("score", "confidence", "conf", "prob", "probability")
_BOX_KEYS = ("box", "box_xyxy", "bbox", "xyxy", "bbox_xyxy")
_XYWH_KEYS = ("box_xywh", "xywh", "bbox_xywh")
_COLOR_KEYS = ("color", "colour")
_COLOR_SCORE_KEYS = ("color_scores", "colour_scores", "color_probs", "colour_probs", "color_logits", "colour_logits")


@dataclass(frozen=True)
class DetectedImage:
    """One image of a detections file: its name, its GenEval metadata line, everything a detector found in it."""

    name: str
    metadata: Mapping[str, Any]
    detections: tuple[Detection, ...]


@dataclass(frozen=True)
class GenEvalReport:
    """Verdicts in file order and their summary."""

    images: tuple[DetectedImage, ...]
    verdicts: tuple[Verdict, ...]
    summary: Summary


def read_detections(path: str | Path, metadata_path: str | Path | None = None) -> list[DetectedImage]:
    """The images of a detections file, in file order.

    `metadata_path` is GenEval's `evaluation_metadata.jsonl`, for files whose entries carry none: they are matched by
    `index` (line number from 0), else by `prompt`, else by the five-digit folder in the image's name.
    Raises UsageError for what cannot be read.
    """
    prompts = None if metadata_path is None else read_metadata(metadata_path)
    images = []
    for position, (key, entry) in enumerate(_entries(Path(path))):
        name = str(key if key is not None else _first(entry, _NAME_KEYS, default=f"image {position}"))
        metadata = _metadata(name, entry, prompts)
        try:
            check_metadata(metadata)
            images.append(DetectedImage(name, metadata, tuple(_detections(entry))))
        except UsageError as error:
            raise UsageError(f"{path}, {name}: {error}") from None
    if not images:
        raise UsageError(f"{path}: no images in it; expected a list of objects with metadata and detections")
    return images


def read_metadata(path: str | Path) -> list[Mapping[str, Any]]:
    """GenEval metadata, one JSON object a line or a list of them. Raises UsageError naming the line at fault."""
    lines = []
    for number, metadata in read_json_values(path):
        try:
            check_metadata(metadata)
        except UsageError as error:
            raise UsageError(f"{path} line {number}: {error}") from None
        lines.append(metadata)
    if not lines:
        raise UsageError(f"{path}: no metadata lines in it")
    return lines


def score_detections(images: Sequence[DetectedImage], **rules: float) -> GenEvalReport:
    """Judge every image by the official rules; `rules` are the keyword options of `stagevar.geneval.judge`."""
    verdicts = []
    for image in images:
        try:
            verdicts.append(judge(image.metadata, image.detections, **rules))
        except UsageError as error:
            raise UsageError(f"{image.name}: {error}") from None
    rows = [
        {"tag": image.metadata["tag"], "metadata": json.dumps(image.metadata), "correct": verdict.correct}
        for image, verdict in zip(images, verdicts, strict=True)
    ]
    return GenEvalReport(tuple(images), tuple(verdicts), summarise(rows))


def geneval_metadata(metric: str, prompt: Prompt) -> Mapping[str, Any]:
    """The GenEval metadata that a prompt is. Raises UsageError if it is a bare caption."""
    if not isinstance(prompt, Mapping) or "include" not in prompt:
        raise UsageError(f"{metric}: prompt {prompt!r:.60} carries no GenEval metadata (tag, include)")
    return prompt


def geneval_summary(rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """GenEval's score of judged images (rows with "value" 0 or 1): the mean of the tag means, and what goes with it."""
    summary = summarise(
        {"tag": prompt["tag"], "metadata": json.dumps(prompt), "correct": row["value"] > 0.5}
        for row, prompt in zip(rows, prompts, strict=True)
    )
    return {
        "overall": summary.overall,
        "tags": summary.tags,
        "images_per_tag": summary.images_per_tag,
        "correct_images": summary.correct_images,
        "correct_prompts": summary.correct_prompts,
    }


def _entries(path: Path) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """(name or None, entry) from a JSON list, an object of images by name, or JSON lines."""
    values = read_json_values(path)
    content: Any = [value for _, value in values]
    if len(content) == 1 and isinstance(content[0], Mapping):
        content = content[0]
        for wrapper in ("images", "results", "entries"):
            if isinstance(content.get(wrapper), (list, Mapping)):
                content = content[wrapper]
                break
    if isinstance(content, Mapping) and ("detections" in content or "details" in content or "objects" in content):
        content = [content]
    named = content.items() if isinstance(content, Mapping) else ((None, entry) for entry in content)
    for position, (name, entry) in enumerate(named):
        if name is not None and isinstance(entry, list):  # {"image": [detections]}, metadata from --metadata
            entry = {"detections": entry}
        if not isinstance(entry, Mapping):
            raise UsageError(
                f"{path}, {name or f'image {position}'}: is {entry!r:.60}, expected an object with "
                "metadata and detections"
            )
        yield name, entry


def _metadata(name: str, entry: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    metadata = entry.get("metadata", entry if "tag" in entry or "include" in entry else None)
    if isinstance(metadata, str):  # the official results file keeps it as a JSON string
        try:
            metadata = json.loads(metadata)
        except json.JSONDecodeError as error:
            raise UsageError(f"{name}: metadata is a string that is not JSON ({error})") from None
    if metadata is entry:
        metadata = {key: entry[key] for key in ("tag", "include", "exclude", "prompt") if key in entry}
    if metadata is not None:
        return metadata
    if prompts is None:
        raise UsageError(f"{name}: has no metadata; add it, or pass the prompts' file with --metadata")
    if isinstance(entry.get("index"), int):
        index = entry["index"]
        if 0 <= index < len(prompts):
            return prompts[index]
        raise UsageError(f"{name}: index {index} is outside the {len(prompts)} lines of the metadata file")
    if "prompt" in entry:
        matches = [line for line in prompts if line.get("prompt") == entry["prompt"]]
        if matches:
            return matches[0]
        raise UsageError(f"{name}: prompt {entry['prompt']!r} is not in the metadata file")
    folders = [part for part in Path(name).parts if part.isdigit() and len(part) == 5]
    if folders and int(folders[0]) < len(prompts):
        return prompts[int(folders[0])]
    raise UsageError(f"{name}: give index, prompt or a five-digit folder in its name, to find it in the metadata file")


def _detections(entry: Mapping[str, Any]) -> Iterator[Detection]:
    if "details" in entry and "detections" not in entry:
        details = entry["details"]
        try:
            details = json.loads(details) if isinstance(details, str) else details
        except json.JSONDecodeError as error:
            raise UsageError(f"details is a string that is not JSON ({error})") from None
        # The official results file lists them best first, equal scores later-first; reversed, the rules see them as
        # the detector gave them.
        for class_name, rows in _by_class("details", details):
            for row in reversed(rows):
                yield _detection({"box": row}, class_name)
        return
    found = entry.get("detections", entry.get("objects"))
    if isinstance(found, list):
        for row in found:
            yield _detection(row, None)
        return
    for class_name, rows in _by_class("detections", found):
        for row in rows:
            yield _detection(row if isinstance(row, Mapping) else {"box": row}, class_name)


def _by_class(key: str, found: Any) -> list[tuple[str, list[Any]]]:
    if not isinstance(found, Mapping) or not all(isinstance(rows, list) for rows in found.values()):
        raise UsageError(f"{key} is {found!r:.60}, expected a list of objects with class, score and box")
    return list(found.items())


def _detection(row: Any, class_name: str | None) -> Detection:
    if not isinstance(row, Mapping):
        raise UsageError(f"detection {row!r:.60} is not an object with class, score and box")
    class_name = _first(row, _CLASS_KEYS, default=None) if class_name is None else class_name
    if not isinstance(class_name, str):
        raise UsageError(f"detection {dict(row)!r:.60} has no class name")
    box = [_number(value, class_name, "box") for value in _box(row, class_name)]
    score = _first(row, _SCORE_KEYS, default=None)
    if score is None and len(box) == 5:
        score = box[4]
    color = _first(row, _COLOR_KEYS, default=None)
    color_scores = _first(row, _COLOR_SCORE_KEYS, default=None)
    if color is None and color_scores is not None:
        color = _color_from_scores(color_scores, class_name)
    texture = row.get("texture")
    for key, value in (("color", color), ("texture", texture)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"detection of {class_name!r} has {key} {value!r}, expected a name")
    return Detection(class_name, _number(score, class_name, "score"), tuple(box[:4]), color, texture)


def _box(row: Mapping[str, Any], class_name: str) -> list[Any]:
    box = _first(row, _BOX_KEYS, default=None)
    if isinstance(box, list) and len(box) in (4, 5):
        return box
    box_xywh = _first(row, _XYWH_KEYS, default=None)
    if box is None and isinstance(box_xywh, list) and len(box_xywh) == 4:
        x, y, width, height = (_number(value, class_name, "box") for value in box_xywh)
        return [x, y, x + width, y + height]
    raise UsageError(f"detection of {class_name!r} has box {box!r:.60}, expected [x0, y0, x1, y1]")


def _color_from_scores(scores: Any, class_name: str) -> str:
    if isinstance(scores, Mapping):
        unknown = sorted(set(scores) - set(COLORS))
        if unknown:
            raise UsageError(f"detection of {class_name!r} scores colour {unknown[0]!r}, expected {', '.join(COLORS)}")
        scores = [scores.get(color, float("-inf")) for color in COLORS]
    elif not isinstance(scores, list):
        raise UsageError(f"detection of {class_name!r} has colour scores {scores!r:.60}, expected ten numbers")
    return classify_color([_number(value, class_name, "colour score") for value in scores])


def _number(value: Any, class_name: str, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"detection of {class_name!r} has {what} {value!r:.40}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"detection of {class_name!r} has a {what} beyond floating point") from None


def _first(row: Mapping[str, Any], keys: Sequence[str], *, default: Any) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), default)
