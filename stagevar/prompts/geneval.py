"""GenEval's scoring rules, from detections to verdicts to the score; no detector, no torch.

Source: Ghosh et al. 2023 (GenEval) and github djghosh13/geneval, `evaluation/evaluate_images.py` (rules) and
`evaluation/summary_scores.py` (arithmetic). What differs: `texture` is judged as color is (our extension, used by the
nano model), `Detection.color` carries the classifier's answer instead of a call to it, names of classes and colors are
compared in one spelling (`stagevar.prompts.class_names`), and metadata that cannot be followed (no include, an unknown tag
or key, a count of 0), which the published code scores or stops at, is a `UsageError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Required, TypedDict

import numpy as np

from stagevar.errors import UsageError, did_you_mean, nearest
from stagevar.prompts.class_names import class_name, color_name

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
#: GenEval's tags and nano's own, whose prompts are judged by the same rules.
KNOWN_TAGS = (*TAGS, "texture")
_CLAUSE_KEYS = ("class", "count", "color", "position", "texture")


Clause = TypedDict(
    "Clause",
    {"class": Required[str], "count": Required[int], "color": str, "texture": str, "position": list[str | int]},
    total=False,
)


class Metadata(TypedDict, total=False):
    """A line of GenEval's evaluation_metadata.jsonl.

    Attributes:
        include, exclude: clauses; the position of one is [relation, index of an earlier include].
        index, split, unseen: of nano's own prompts.
    """

    tag: Required[str]
    include: Required[list[Clause]]
    exclude: list[Clause]
    prompt: str
    index: int
    split: str
    unseen: bool


@dataclass(frozen=True)
class Detection:
    """One detected object. `box_xyxy` is (x0, y0, x1, y1) in pixels, y grows downward; `color` and `texture` are what
    a classifier calls this object, None if nothing classified it (then it matches no wanted color)."""

    class_name: str
    score: float
    box_xyxy: tuple[float, float, float, float]
    color: str | None = None
    texture: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its prompt asks for; `reason` has one line per failed clause, empty if correct."""

    correct: bool
    reason: str


def judge(
    metadata: Mapping,
    detections: Sequence[Detection],
    *,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    max_per_class: int = 16,
    position_margin: float = 0.1,
    max_overlap: float = 1.0,
) -> Verdict:
    """Judges one image.

    Args:
        metadata: a line of GenEval's `evaluation_metadata.jsonl`: tag, include [{class, count, color?, texture?,
            position? [relation, index of an earlier include]}], exclude? [{class, count}].
        threshold, counting_threshold: scores must lie strictly above the first, for the tag "counting" above the
            second.
        max_per_class: how many of each class are kept, the best first. Only the `count` best of those are asked for
            color and position; an equal score goes to the later detection, as in the published order.
        max_overlap: below 1 turns on the published optional NMS.

    Raises:
        UsageError: for metadata or detections that the rules cannot read, and for options outside their range.
    """
    check_metadata(metadata)
    check_rules(threshold, counting_threshold, max_per_class, position_margin, max_overlap)
    floor = counting_threshold if metadata["tag"] == "counting" else threshold
    objects = _kept(detections, floor, max_per_class, max_overlap)
    failures: list[str] = []
    groups: list[list[Detection] | None] = []  # per include: its matched objects, None if it failed
    for clause in metadata.get("include", ()):
        failure, found = _judge_include(clause, objects, groups, position_margin)
        if failure:
            failures.append(failure)
        groups.append(None if failure else found)
    for clause in metadata.get("exclude", ()):
        excluded = class_name(clause["class"])
        found_count = len(objects.get(excluded, ()))
        if found_count >= clause["count"]:
            failures.append(f"expected {excluded}<{clause['count']}, found {found_count}")
    return Verdict(correct=not failures, reason="\n".join(failures))


def relations(
    box_a_xyxy: Sequence[float], box_b_xyxy: Sequence[float], *, position_margin: float = 0.1
) -> tuple[str, ...]:
    """Where A lies relative to B: a subset of `RELATIONS`, in their order.

    Per axis the offset of the centers is shortened by `position_margin` times the sum of both sizes, never past 0, then
    divided by the length of the raw offset; beyond 0.5 (strictly) it counts. Empty if both rests are below 1e-3 pixels.
    Done in float64 with numpy's norm, so that ties at the boundary fall as in the published code.
    """
    corners_OPX = np.asarray([box_a_xyxy, box_b_xyxy], dtype=np.float64).reshape(2, 2, 2)  # object, corner, x|y
    center_OX = corners_OPX.mean(axis=1)
    size_OX = np.abs(corners_OPX[:, 1] - corners_OPX[:, 0])
    offset_X = center_OX[0] - center_OX[1]
    rest_X = np.maximum(np.abs(offset_X) - position_margin * (size_OX[0] + size_OX[1]), 0.0) * np.sign(offset_X)
    if (np.abs(rest_X) < 1e-3).all():
        return ()
    dx, dy = (rest_X / np.linalg.norm(offset_X)).tolist()
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return tuple(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def classify_color(scores: Sequence[float]) -> str:
    """The color with the greatest of ten scores (order of `COLORS`); the first of equals, as argmax does."""
    if len(scores) != len(COLORS):
        raise UsageError(f"{len(scores)} color scores: GenEval has {len(COLORS)} colors ({', '.join(COLORS)})")
    return COLORS[int(np.argmax(np.asarray(scores, dtype=np.float64)))]


@dataclass(frozen=True)
class Summary:
    """GenEval's figures over a set of judged images, each in 0..1.

    `overall` is the published score: the unweighted mean of the tag means. `correct_images` is the plain mean,
    `correct_prompts` the share of prompts with at least one correct image (both only informative).
    """

    overall: float
    tags: dict[str, float]
    images_per_tag: dict[str, int]
    correct_images: float
    correct_prompts: float
    images: int
    prompts: int


def summarize(rows: Iterable[Mapping]) -> Summary:
    """Rows are mappings with `tag` and `correct`; images of one prompt share `metadata` (else `prompt`, else each row
    is its own prompt). Tags keep the order of first appearance. Raises UsageError if there is no row."""
    correct_by_tag: dict[str, list[bool]] = {}
    correct_by_prompt: dict[str, bool] = {}
    for number, row in enumerate(rows):
        correct = bool(row["correct"])
        correct_by_tag.setdefault(row["tag"], []).append(correct)
        prompt_key = row.get("metadata") or row.get("prompt") or f"row {number}"
        if not isinstance(prompt_key, str):
            prompt_key = json.dumps(prompt_key)
        correct_by_prompt[prompt_key] = correct_by_prompt.get(prompt_key, False) or correct
    if not correct_by_tag:
        raise UsageError("no judged images: nothing to summarize")
    tags = {tag: float(np.mean(values)) for tag, values in correct_by_tag.items()}
    everything = [value for values in correct_by_tag.values() for value in values]
    return Summary(
        overall=float(np.mean(list(tags.values()))),
        tags=tags,
        images_per_tag={tag: len(values) for tag, values in correct_by_tag.items()},
        correct_images=float(np.mean(everything)),
        correct_prompts=float(np.mean(list(correct_by_prompt.values()))),
        images=len(everything),
        prompts=len(correct_by_prompt),
    )


def check_metadata(metadata: Mapping) -> None:
    """Raise UsageError, naming the clause, unless `metadata` is a line that `judge` can follow."""
    if not isinstance(metadata, Mapping):
        raise UsageError(f"GenEval metadata is {metadata!r:.80}: expected an object with tag, include, prompt")
    tag = metadata.get("tag")
    if tag not in KNOWN_TAGS:
        near = did_you_mean(str(tag).lower(), KNOWN_TAGS) or f"; expected one of {', '.join(TAGS)}"
        raise UsageError(f"GenEval metadata has tag {tag!r:.60}{near}")
    for key in metadata:
        meant = nearest(str(key).lower(), ("include", "exclude"), 0.8)
        if meant is not None and key != meant:
            raise UsageError(f"GenEval metadata: unknown key {key!r:.60}, did you mean {meant}?")
    for key in ("include", "exclude"):
        clauses = metadata.get(key, ())
        if not isinstance(clauses, (list, tuple)):
            raise UsageError(f"GenEval metadata: {key} is {clauses!r:.80}, expected a list of clauses")
        for index, clause in enumerate(clauses):
            _check_clause(clause, f"{key}[{index}]", groups_before=index if key == "include" else 0)
    if not metadata.get("include"):
        raise UsageError("GenEval metadata has no clause under 'include': there is nothing to judge")


def check_rules(
    threshold: float, counting_threshold: float, max_per_class: int, position_margin: float, max_overlap: float
) -> None:
    """Raise UsageError, naming the rule, unless the options of `judge` are in their ranges."""
    shares = {
        "threshold": threshold,
        "counting_threshold": counting_threshold,
        "position_margin": position_margin,
        "max_overlap": max_overlap,
    }
    for name, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UsageError(f"{name} {value!r:.40}: expected a number from 0 to 1")
    if isinstance(max_per_class, bool) or not isinstance(max_per_class, int) or max_per_class < 1:
        raise UsageError(f"max_per_class {max_per_class!r:.40}: expected a whole number of at least 1")


def _check_clause(clause: Mapping, where: str, groups_before: int) -> None:
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str) or not clause["class"].strip():
        raise UsageError(f"GenEval metadata: {where} is {clause!r:.80}, expected an object with class and count")
    for key in clause:
        if key not in _CLAUSE_KEYS:
            near = did_you_mean(str(key).lower(), _CLAUSE_KEYS) or f"; expected {', '.join(_CLAUSE_KEYS)}"
            raise UsageError(f"GenEval metadata: {where} has unknown key {key!r:.60}{near}")
    count = clause.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(
            f"GenEval metadata: {where} has count {count!r}, expected a whole number of objects, 1 or more"
        )
    for key in ("color", "texture"):
        if key in clause and not (isinstance(clause[key], str) and clause[key].strip()):
            raise UsageError(f"GenEval metadata: {where} has {key} {clause[key]!r:.40}, expected a name")
    if "position" not in clause:
        return
    position = clause["position"]
    if not (isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in RELATIONS):
        raise UsageError(
            f"GenEval metadata: {where} has position {position!r}, expected [relation, index] with "
            f"relation one of {', '.join(RELATIONS)}"
        )
    target = position[1]
    if isinstance(target, bool) or not isinstance(target, int) or not -groups_before <= target < groups_before:
        raise UsageError(f"GenEval metadata: {where} refers to include {target!r}, expected an earlier one")


def _kept(
    detections: Sequence[Detection], floor: float, max_per_class: int, max_overlap: float
) -> dict[str, list[Detection]]:
    """Detections per class: above the floor, best first (later first among equals), at most `max_per_class`."""
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        if not (
            math.isfinite(detection.score)
            and len(detection.box_xyxy) == 4
            and all(map(math.isfinite, detection.box_xyxy))
        ):
            raise UsageError(
                f"detection of {detection.class_name!r} has score {detection.score} and box "
                f"{detection.box_xyxy}: expected finite numbers, four for the box"
            )
        by_class.setdefault(class_name(detection.class_name), []).append(detection)
    kept = {}
    for name, found in by_class.items():
        # Ascending and stable, then reversed: this is where equal scores end up later-first.
        ordered = sorted(found, key=lambda detection: detection.score)[::-1]
        survivors = [detection for detection in ordered if detection.score > floor][:max_per_class]
        if max_overlap != 1:
            survivors = _suppress(survivors, max_overlap)
        if survivors:
            kept[name] = survivors
    return kept


def _suppress(ordered: list[Detection], max_overlap: float) -> list[Detection]:
    """Greedy NMS on boxes with inclusive pixel corners, dropping overlaps of `max_overlap` or more."""
    kept: list[Detection] = []
    for candidate in ordered:
        if all(_overlap(better.box_xyxy, candidate.box_xyxy) < max_overlap for better in kept):
            kept.append(candidate)
    return kept


def _overlap(box_a: Sequence[float], box_b: Sequence[float]) -> float:
    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    shared = area(max(box_a[0], box_b[0]), max(box_a[1], box_b[1]), min(box_a[2], box_b[2]), min(box_a[3], box_b[3]))
    union = area(*box_a) + area(*box_b) - shared
    return shared / union if union else 0.0


def _judge_include(
    clause: Mapping,
    objects: Mapping[str, list[Detection]],
    groups: Sequence[list[Detection] | None],
    position_margin: float,
) -> tuple[str, list[Detection]]:
    """(why the clause fails or "", the objects it matched)."""
    name, count = class_name(clause["class"]), clause["count"]
    found = objects.get(name, [])[:count]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}", found
    for attribute, order in (("color", COLORS), ("texture", ())):
        if attribute in clause:
            failure = _judge_attribute(clause, attribute, order, found)
            if failure:
                return failure, found
    if "position" in clause:
        relation, target = clause["position"]
        if groups[target] is None:
            return f"no target for {name} to be {relation}", found
        for detection in found:
            for anchor in groups[target]:
                true_relations = relations(detection.box_xyxy, anchor.box_xyxy, position_margin=position_margin)
                if relation not in true_relations:
                    seen = " and ".join(true_relations)
                    return f"expected {name} {relation} target, found {seen} target", found
    return "", found


def _judge_attribute(clause: Mapping, attribute: str, order: Sequence[str], found: Sequence[Detection]) -> str:
    wanted, count = color_name(clause[attribute]), clause["count"]
    seen = [color_name(getattr(detection, attribute) or "unclassified") for detection in found]
    if seen.count(wanted) >= count:
        return ""
    names = [name for name in order if name in seen] + sorted(set(seen) - set(order))
    tally = ", ".join(f"{seen.count(name)} {name}" for name in names)
    return f"expected {wanted} {class_name(clause['class'])}>={count}, found {seen.count(wanted)} {wanted}; and {tally}"
