"""Reads detections files for GenEval: what was found in each image, and what its prompt asked for.

docs/metrics.md ("Detections file") has the format. The reader is lenient about spelling and strict about meaning: anything
ambiguous is a UsageError that names the image and the key.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stagevar.errors import UsageError, did_you_mean
from stagevar.prompts.class_names import class_name, color_name
from stagevar.prompts.geneval import (
    COLORS,
    Detection,
    Metadata,
    Summary,
    Verdict,
    check_metadata,
    classify_color,
    judge,
    summarize,
)
from stagevar.text_files import parse_json, read_json_values
from tuner.metrics.base import Prompt, value_of
from tuner.metrics.prompt_sets import COCO_CLASSES

_NAME_KEYS = ("name", "filename", "file_name", "image", "image_id", "id", "path")
_CLASS_KEYS = ("class", "class_name", "label", "category", "name")
_SCORE_KEYS = ("score", "confidence", "conf", "prob", "probability")
_BOX_KEYS = ("box", "box_xyxy", "bbox", "xyxy", "bbox_xyxy")
_XYWH_KEYS = ("box_xywh", "xywh", "bbox_xywh")
_COLOR_KEYS = ("color", "colour")
#: How far above 1 a single-precision probability may end up.
_ROUNDING = 1e-6
_COLOR_SCORE_KEYS = ("color_scores", "colour_scores", "color_probs", "colour_probs", "color_logits", "colour_logits")


@dataclass(frozen=True)
class DetectedImage:
    """One image of a detections file: its name, its GenEval metadata line, and everything a detector found in it."""

    name: str
    metadata: Metadata
    detections: tuple[Detection, ...]


@dataclass(frozen=True)
class GenEvalReport:
    """Verdicts in file order and their summary."""

    images: tuple[DetectedImage, ...]
    verdicts: tuple[Verdict, ...]
    summary: Summary


def read_detections(path: str | Path, metadata_path: str | Path | None = None) -> list[DetectedImage]:
    """The images of a detections file, in file order.

    `metadata_path` is GenEval's `evaluation_metadata.jsonl`, for files whose entries have no metadata: they are matched by
    `index` (line number from 0), else by `prompt`, else by the five-digit folder in the image's name. Warns about prompts
    without an image. Raises UsageError for an unreadable file, and for an image that appears twice.
    """
    prompts = None if metadata_path is None else read_metadata(metadata_path)
    images: list[DetectedImage] = []
    names: set[str] = set()
    for position, (key, entry) in enumerate(_entries(Path(path))):
        name = str(key if key is not None else _first(entry, _NAME_KEYS, default=f"image {position}"))
        if name in names:
            raise UsageError(f"{path}: image {name:.80} appears twice; list every image once")
        names.add(name)
        metadata = _metadata(name, entry, prompts)
        try:
            check_metadata(metadata)
            images.append(DetectedImage(name, metadata, tuple(_detections(entry))))
        except UsageError as error:
            raise UsageError(f"{path}, {name}: {error}") from None
    if not images:
        raise UsageError(f"{path} has no images; expected a list of objects with metadata and detections")
    if prompts is not None:
        used = {json.dumps(image.metadata) for image in images}
        unused = [number for number, line in enumerate(prompts, start=1) if json.dumps(line) not in used]
        if unused:
            warnings.warn(
                f"{len(unused)} of {len(prompts)} lines of {metadata_path} have no image and are not scored; the first: "
                f"line {unused[0]}"
            )
    return images


def read_metadata(path: str | Path) -> list[Metadata]:
    """GenEval metadata, one JSON object per line or a list of them. Raises UsageError naming the line at fault."""
    lines = []
    for number, metadata in read_json_values(path):
        try:
            check_metadata(metadata)
        except UsageError as error:
            raise UsageError(f"{path} line {number}: {error}") from None
        lines.append(cast(Metadata, metadata))
    if not lines:
        raise UsageError(f"{path} has no metadata lines")
    return lines


def score_detections(images: Sequence[DetectedImage], **rules: Any) -> GenEvalReport:
    """Judges every image by the official rules; `rules` are keyword options of `stagevar.prompts.geneval.judge`.

    Warns about classes and colors that prompts and detections do not share and GenEval does not know.
    """
    _name_strangers(images)
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
    return GenEvalReport(tuple(images), tuple(verdicts), summarize(rows))


def _name_strangers(images: Sequence[DetectedImage]) -> None:
    """Warns about names that the other side lacks: most likely spelled differently, and scored as absent."""
    lines = [image.metadata for image in images]
    clauses = [clause for line in lines for clause in (*line["include"], *line.get("exclude", ()))]
    found = [detection for image in images for detection in image.detections]
    asked_classes = {class_name(clause["class"]) for clause in clauses}
    found_classes = Counter(class_name(detection.class_name) for detection in found)
    asked_colors = {color_name(clause["color"]) for clause in clauses if "color" in clause}
    found_colors = Counter(color_name(detection.color) for detection in found if detection.color)
    for what, asked, seen, known in (
        ("class", asked_classes, found_classes, COCO_CLASSES),
        ("color", asked_colors, found_colors, COLORS),
    ):
        for name in sorted(set(seen) - asked - set(known)):
            _warn(f"{what} {name!r:.60}, in {seen[name]} detections, is in no prompt", name, [*asked, *known])
        if seen:
            for name in sorted(asked - set(seen) - set(known)):
                _warn(f"{what} {name!r:.60}, which prompts ask for, is in no detection", name, [*seen, *known])


def _warn(message: str, name: str, others: Iterable[str]) -> None:
    warnings.warn(message + did_you_mean(name, sorted(set(others)), cutoff=0.6))


def geneval_metadata(metric: str, prompt: Prompt) -> Metadata:
    """A prompt as GenEval metadata. Raises UsageError if it is a bare caption."""
    if not isinstance(prompt, Mapping) or "include" not in prompt:
        raise UsageError(
            f"{metric}: prompt {prompt!r:.60} has no GenEval metadata (tag, include); give JSONL with it, or judge by "
            "metrics that read captions, such as clip_score (docs/metrics.md)"
        )
    return cast(Metadata, prompt)


def geneval_summary(rows: Sequence[Mapping[str, object]], prompts: Sequence[Prompt]) -> dict[str, object]:
    """GenEval's score of judged images (rows with "value" 0 or 1): the mean of the tag means, with details."""
    summary = summarize(
        {
            "tag": geneval_metadata("geneval", prompt)["tag"],
            "metadata": json.dumps(prompt),
            "correct": value_of(row) > 0.5,
        }
        for row, prompt in zip(rows, prompts, strict=True)
    )
    return {
        "overall": summary.overall,
        "tags": summary.tags,
        "images_per_tag": summary.images_per_tag,
        "correct_images": summary.correct_images,
        "correct_prompts": summary.correct_prompts,
    }


def _entries(path: Path) -> Iterator[tuple[str | None, Mapping[str, object]]]:
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


def _metadata(name: str, entry: Mapping[str, Any], prompts: Sequence[Metadata] | None) -> Metadata:
    metadata = entry.get("metadata", entry if "tag" in entry or "include" in entry else None)
    if isinstance(metadata, str):  # the official results file keeps it as a JSON string
        metadata = parse_json(metadata, f"{name}: metadata")
    if metadata is entry:
        metadata = {key: entry[key] for key in ("tag", "include", "exclude", "prompt") if key in entry}
    if metadata is not None:
        return cast(Metadata, metadata)
    if prompts is None:
        raise UsageError(f"{name}: has no metadata; add it, or pass the prompts' file with --metadata")
    if isinstance(entry.get("index"), int):
        index = entry["index"]
        if not 0 <= index < len(prompts):
            raise UsageError(f"{name}: index {index} is outside the {len(prompts)} lines of the metadata file")
        if entry.get("prompt", prompts[index].get("prompt")) != prompts[index].get("prompt"):
            raise UsageError(
                f"{name}: line {index + 1} of the metadata file has prompt {prompts[index].get('prompt')!r:.60}, the image "
                f"{entry['prompt']!r:.60}; index counts from 0"
            )
        return prompts[index]
    if "prompt" in entry:
        matches = [line for line in prompts if line.get("prompt") == entry["prompt"]]
        if not matches:
            raise UsageError(f"{name}: prompt {entry['prompt']!r:.80} is not in the metadata file")
        if any(line != matches[0] for line in matches):
            raise UsageError(f"{name}: prompt {entry['prompt']!r:.80} is in the metadata file twice; give the index")
        return matches[0]
    folders = [part for part in Path(name).parts if part.isdigit() and len(part) == 5]
    if folders and int(folders[0]) < len(prompts):
        return prompts[int(folders[0])]
    raise UsageError(f"{name}: give index, prompt or a five-digit folder in its name, to find it in the metadata file")


def _detections(entry: Mapping[str, object]) -> Iterator[Detection]:
    if "details" in entry and "detections" not in entry:
        details = entry["details"]
        details = parse_json(details, "details") if isinstance(details, str) else details
        # The official results file lists them best first, ties in reverse; reversed, the rules see them in the detector's
        # order.
        for label, rows in _by_class("details", details):
            for row in reversed(rows):
                yield _detection({"box": row}, label)
        return
    found = entry.get("detections", entry.get("objects"))
    if isinstance(found, list):
        for row in found:
            yield _detection(row, None)
        return
    for label, rows in _by_class("detections", found):
        for row in rows:
            yield _detection(row if isinstance(row, Mapping) else {"box": row}, label)


def _by_class(key: str, found: Any) -> list[tuple[str, list[Any]]]:
    if not isinstance(found, Mapping) or not all(isinstance(rows, list) for rows in found.values()):
        raise UsageError(f"{key} is {found!r:.60}, expected a list of objects with class, score and box")
    return list(found.items())


def _detection(row: Any, given_class: str | None) -> Detection:
    if not isinstance(row, Mapping):
        raise UsageError(f"detection {row!r:.60} is not an object with class, score and box")
    label = _first(row, _CLASS_KEYS, default=None) if given_class is None else given_class
    if not isinstance(label, str) or not label.strip():
        raise UsageError(f"detection {dict(row)!r:.60} has no class name")
    box = [_number(value, label, "box") for value in _box(row, label)]
    score = _first(row, _SCORE_KEYS, default=None)
    if score is None and len(box) == 5:
        score = box[4]
    color = _first(row, _COLOR_KEYS, default=None)
    color_scores = _first(row, _COLOR_SCORE_KEYS, default=None)
    if color is None and color_scores is not None:
        color = _color_from_scores(color_scores, label)
    texture = row.get("texture")
    for key, value in (("color", color), ("texture", texture)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"detection of {label!r} has {key} {value!r}, expected a name")
    x0, y0, x1, y1 = box[:4]
    if x1 < x0 or y1 < y0:
        raise UsageError(
            f"detection of {label!r} has box {box[:4]}, whose second corner is left of or above the first; for corner and "
            "size use box_xywh"
        )
    score = _number(score, label, "score")
    if not 0 <= score <= 1 + _ROUNDING:
        raise UsageError(f"detection of {label!r} has score {score:g}, expected 0 to 1 (divide percentages by 100)")
    return Detection(label, score, (x0, y0, x1, y1), color, texture)


def _box(row: Mapping[str, object], label: str) -> list[Any]:
    box = _first(row, _BOX_KEYS, default=None)
    if isinstance(box, list) and len(box) in (4, 5):
        return box
    box_xywh = _first(row, _XYWH_KEYS, default=None)
    if box is None and isinstance(box_xywh, list) and len(box_xywh) == 4:
        x, y, width, height = (_number(value, label, "box") for value in box_xywh)
        return [x, y, x + width, y + height]
    raise UsageError(f"detection of {label!r} has box {box!r:.60}, expected [x0, y0, x1, y1]")


def _color_from_scores(scores: Any, label: str) -> str:
    if isinstance(scores, Mapping):
        unknown = sorted(set(scores) - set(COLORS))
        if unknown:
            raise UsageError(f"detection of {label!r} scores color {unknown[0]!r}, expected {', '.join(COLORS)}")
        scores = [scores.get(color, float("-inf")) for color in COLORS]
    elif not isinstance(scores, list):
        raise UsageError(f"detection of {label!r} has color scores {scores!r:.60}, expected ten numbers")
    return classify_color([_number(value, label, "color score") for value in scores])


def _number(value: Any, label: str, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"detection of {label!r} has {what} {value!r:.40}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"detection of {label!r} has a {what} too large for floating point") from None


def _first(row: Mapping[str, object], keys: Sequence[str], *, default: Any) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), default)
