"""DPG-Bench's arithmetic, from yes/no answers to the score, as published (bugs kept) and corrected.

Source: Hu et al. 2024 (ELLA), github TencentQQGYLab/ELLA `dpg_bench/compute_dpg_bench.py`; bugs: ELLA issues 60, 61.

In both modes an answer counts 1 only if it is exactly "yes". Walking the questions in file order, a question is set to 0 if
any parent's score is 0 at that moment, so a zero cascades to children listed later. A tile scores the mean of its questions,
a prompt the mean of its tiles, the benchmark 100 times the mean of its prompts.

"published" also repeats the released script's mistakes: the first question of the file is lost; a prompt whose walk meets a
missing parent is silently dropped; if an item's rows are not contiguous, only the last run counts; category scores use the
last tile only, before dependencies act.
"corrected" keeps every question, rejects a missing parent, and takes category scores from all tiles after dependencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from stagevar.errors import UsageError
from tuner.metrics.answers_file import Answers, Question

Mode = Literal["published", "corrected"]
MODES: tuple[Mode, ...] = ("published", "corrected")


@dataclass(frozen=True)
class PromptScore:
    """`tiles` are in tile order, each 0..1; `score` is their mean."""

    item_id: str
    tiles: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class DpgScore:
    """`score` is the DPG score in 0..100, None if no prompt was scored; categories are in 0..100.

    `dropped` says which answered items the published arithmetic loses, and why. `unanswered` lists items of the question
    file without any answer (in the script: without an image); neither mode scores them.
    """

    mode: Mode
    score: float | None
    prompts: tuple[PromptScore, ...]
    l1: dict[str, float]
    l2: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)
    unanswered: tuple[str, ...] = ()


def score_dpg(questions: Sequence[Question], answers: Answers, mode: Mode = "corrected") -> DpgScore:
    """DPG-Bench score of `answers`, which hold every proposition of an item for every tile of that item.

    Raises UsageError for an unanswered question of an answered item and, corrected only, for a missing parent.
    """
    if mode not in MODES:
        raise UsageError(f"DPG mode {mode!r}: expected {' or '.join(MODES)}")
    tiles_by_item: dict[str, list[int]] = {}
    for item_id, _, tile in answers:
        tiles_by_item.setdefault(item_id, []).append(tile)
    groups = _group(questions[1:] if mode == "published" else questions, contiguous_only=mode == "published")
    if mode == "corrected":
        _check_parents(groups)
    dropped = {
        question.item_id: "its only question is the first of the file, which is lost"
        for question in questions[:1]
        if question.item_id not in groups and question.item_id in tiles_by_item
    }
    unanswered = []
    prompts: list[PromptScore] = []
    categories: dict[str, list[float]] = {}
    for item_id, group in groups.items():
        tiles = sorted(set(tiles_by_item.get(item_id, ())))
        if not tiles:
            unanswered.append(item_id)
            continue
        walks = [_score_tile(group, answers, tile) for tile in tiles]
        missing = next((walk.missing_parent for walk in walks if walk.missing_parent is not None), None)
        if missing is not None:
            dropped[item_id] = f"a question depends on proposition {missing}, which is missing"
            continue
        tile_scores = tuple(sum(walk.after.values()) / len(walk.after) for walk in walks)
        prompts.append(PromptScore(item_id, tile_scores, sum(tile_scores) / len(tile_scores)))
        for scores in [walks[-1].before] if mode == "published" else [walk.after for walk in walks]:
            for proposition_id, value in scores.items():
                categories.setdefault(group[proposition_id].category, []).append(value)
    l1: dict[str, list[float]] = {}
    for category, values in categories.items():
        l1.setdefault(category.split("-")[0].strip(), []).extend(values)
    return DpgScore(
        mode=mode,
        score=float(np.mean([prompt.score for prompt in prompts])) * 100 if prompts else None,
        prompts=tuple(prompts),
        l1={name: float(np.mean(values)) * 100 for name, values in sorted(l1.items()) if name},
        l2={name: float(np.mean(values)) * 100 for name, values in sorted(categories.items()) if name},
        dropped=dropped,
        unanswered=tuple(unanswered),
    )


def _group(questions: Sequence[Question], *, contiguous_only: bool) -> dict[str, dict[int, Question]]:
    """Questions by item, then by proposition, in file order."""
    groups: dict[str, dict[int, Question]] = {}
    previous_id = None
    for question in questions:
        if question.item_id not in groups or (contiguous_only and question.item_id != previous_id):
            groups[question.item_id] = {}
        groups[question.item_id][question.proposition_id] = question
        previous_id = question.item_id
    return groups


def _check_parents(groups: Mapping[str, Mapping[int, Question]]) -> None:
    for item_id, group in groups.items():
        for question in group.values():
            missing = [parent for parent in question.parents if parent != 0 and parent not in group]
            if missing:
                raise UsageError(
                    f"item {item_id}: proposition {question.proposition_id} depends on {missing[0]}, which is missing"
                )


class _Walk(NamedTuple):
    """One tile: scores by proposition before and after dependencies, and the missing parent that the walk met, if any."""

    before: dict[int, float]
    after: dict[int, float]
    missing_parent: int | None


def _score_tile(group: Mapping[int, Question], answers: Answers, tile: int) -> _Walk:
    before: dict[int, float] = {}
    for proposition_id, question in group.items():
        key = (question.item_id, proposition_id, tile)
        if key not in answers:
            raise UsageError(f"item {question.item_id}, proposition {proposition_id}: no answer for tile {tile}")
        before[proposition_id] = answers[key]
    after = dict(before)
    for proposition_id, question in group.items():
        for parent in question.parents:
            if parent == 0:
                continue
            if parent not in after:
                return _Walk(before, after, parent)
            if after[parent] == 0:  # stops at the first zero, so a missing parent after it goes unnoticed, as published
                after[proposition_id] = 0.0
                break
    return _Walk(before, after, None)
