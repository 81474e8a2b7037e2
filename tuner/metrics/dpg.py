"""DPG-Bench's arithmetic, from yes/no answers to the score, as published (bugs kept) and corrected.

Source: Hu et al. 2024 (ELLA), github TencentQQGYLab/ELLA `dpg_bench/compute_dpg_bench.py`; bugs: ELLA issues 60, 61.

Both modes: an answer counts 1 only if it is exactly "yes"; walking the questions in file order, a question is set to 0
if any parent's score is 0 at that moment, so a zero cascades to children listed later; a tile scores the mean of its
questions, a prompt the mean of its tiles, the benchmark 100 times the mean of its prompts.

"published" also does what the released script does by mistake: the first question of the file is lost; a prompt whose
walk meets a parent that is not there is dropped without a word; if an item's rows are not contiguous, only the last run
counts; category scores use the last tile only, before dependencies act.
"corrected" keeps every question, refuses a missing parent, and takes category scores from all tiles after dependencies.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from stagevar.errors import UsageError
from stagevar.text_files import read_table

Mode = Literal["published", "corrected"]
MODES: tuple[Mode, ...] = ("published", "corrected")


@dataclass(frozen=True)
class Question:
    """One yes/no question. `parents` are proposition ids of the same item; `category` is "entity - whole" or "";
    `text` the question, `prompt` the item's caption, both "" if the file does not say."""

    item_id: str
    proposition_id: int
    parents: tuple[int, ...] = ()
    category: str = ""
    text: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class PromptScore:
    """`tiles` are in tile order, each 0..1; `score` is their mean."""

    item_id: str
    tiles: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class DpgScore:
    """`score` is the DPG score in 0..100, None if no prompt was scored; categories are in 0..100.

    `dropped` says which answered items the published arithmetic loses, and why; `unanswered` lists items of the
    question file without any answer (in the script: no image for them), which neither mode scores.
    """

    mode: Mode
    score: float | None
    prompts: tuple[PromptScore, ...]
    l1: dict[str, float]
    l2: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)
    unanswered: tuple[str, ...] = ()


Answers = Mapping[tuple[str, int, int], float]  # (item, proposition, tile) -> 1.0 for yes, 0.0 for all else


def is_yes(answer: str) -> float:
    """1.0 if the answer is exactly "yes", else 0.0: the published comparison."""
    return float(answer == "yes")


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
            dropped[item_id] = f"a question depends on proposition {missing}, which is not there"
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
                    f"item {item_id}: proposition {question.proposition_id} depends on {missing[0]}, which is not there"
                )


class _Walk(NamedTuple):
    """One tile: scores by proposition before and after dependencies, and the missing parent the walk met, if any."""

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
            if after[parent] == 0:  # stops at the first zero, so a missing parent behind it goes unseen, as published
                after[proposition_id] = 0.0
                break
    return _Walk(before, after, None)


# Files -----------------------------------------------------------------------------------------------------------

_ALIASES = {
    "item_id": ("item_id", "item", "prompt_id", "id"),
    "proposition_id": ("proposition_id", "proposition", "qid", "question_id"),
    "dependency": ("dependency", "dependencies", "parents", "parent", "depends_on"),
    "tile": ("tile", "tile_id", "tile_index", "sample", "image", "image_id", "image_index", "pic"),
    "answer": ("answer", "vqa_answer", "response", "prediction"),
    "score": ("score", "correct"),
    "tuple": ("tuple", "category"),
    "text": ("question_natural_language", "question"),
    "prompt": ("text", "prompt"),
}

_TILE_NAMES = ("TL", "TR", "BL", "BR")  # the grid's quarters in the script's order


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file in the layout of `dpg_bench.csv`, in file order."""
    path = Path(path)
    table = read_table(path)
    columns = _Columns(table.columns)
    return [_question(path, number, row, columns) for number, row in table.rows]


def read_answers(path: str | Path, questions_path: str | Path | None = None) -> tuple[list[Question], dict]:
    """(questions in file order, answers) of an answers file; its format is in docs/metrics.md ("Answers file").

    With `questions_path` (dpg_bench.csv) the answers file needs only item, proposition, tile and answer.
    Raises UsageError naming the line at fault.
    """
    path = Path(path)
    table = read_table(path)
    columns = _Columns(table.columns)
    wide = {int(match[1]): name for name in columns.raw if (match := re.fullmatch(r"answer[_ ]?(\d+)", name))}
    value_column = columns.get("answer") or columns.get("score")
    if not wide and value_column is None:
        raise UsageError(f"{path}: no answer column; expected answer (one row per tile) or answer_0, answer_1, ...")
    questions: dict[tuple[str, int], Question] = {}
    raw: dict[tuple[str, int, int], str] = {}
    lines: dict[tuple[str, int, int], int] = {}
    for number, row in table.rows:
        question = _question(path, number, row, columns)
        identity = (question.item_id, question.proposition_id)
        known = questions.setdefault(identity, question)
        if known.parents != question.parents or known.category != question.category:
            raise UsageError(
                f"{path} line {number}: item {identity[0]}, proposition {identity[1]} has another "
                "dependency or tuple than on an earlier line"
            )
        if wide:
            cells = [(tile, row[name]) for tile, name in sorted(wide.items()) if row[name].strip()]
        else:
            cells = [(_tile(path, number, row, columns, raw, identity), row[value_column])]
        for tile, value in cells:
            if not value.strip():
                raise UsageError(f"{path} line {number}: the answer is empty")
            lines.setdefault((*identity, tile), number)
            if raw.setdefault((*identity, tile), value) != value:
                raise UsageError(
                    f"{path} line {number}: a second, different answer to item {identity[0]}, "
                    f"proposition {identity[1]}, tile {tile}"
                )
    if not raw:
        raise UsageError(f"{path}: every answer is empty")
    values = _values(path, raw, lines)
    _warn_of_uneven_tiles(path, values)
    if questions_path is not None:
        asked = read_questions(questions_path)
        unknown = sorted(set(questions) - {(question.item_id, question.proposition_id) for question in asked})
        if unknown:
            raise UsageError(f"{path}: item {unknown[0][0]}, proposition {unknown[0][1]} is not in {questions_path}")
        return asked, values
    return list(questions.values()), values


def _warn_of_uneven_tiles(path: Path, answers: Answers) -> None:
    tiles: dict[str, set[int]] = {}
    for item_id, _, tile in answers:
        tiles.setdefault(item_id, set()).add(tile)
    usual = max(map(len, tiles.values()))
    fewer = [item_id for item_id, given in tiles.items() if len(given) < usual]
    if fewer:
        warnings.warn(
            f"{path}: {len(fewer)} of {len(tiles)} items have answers on fewer than {usual} tiles; the first: {fewer[0]:.60}"
        )


class _Columns:
    """Finds a column by any of its accepted names."""

    def __init__(self, header: Sequence[str]) -> None:
        self.raw = tuple(header)

    def get(self, wanted: str) -> str | None:
        return next((name for name in _ALIASES.get(wanted, (wanted,)) if name in self.raw), None)


def _question(path: Path, number: int, row: Mapping[str, str], columns: _Columns) -> Question:
    for needed in ("item_id", "proposition_id"):
        if columns.get(needed) is None:
            raise UsageError(f"{path}: no column {needed}; found {', '.join(columns.raw)}")
    item_id = row[columns.get("item_id")].strip()
    if not item_id:
        raise UsageError(f"{path} line {number}: the item_id is empty")
    proposition_id = _whole(path, number, "proposition_id", row[columns.get("proposition_id")])
    dependency = row[columns.get("dependency")] if columns.get("dependency") else ""
    parts = re.split(r"[,;|\s]+", dependency.strip("[]() "))
    parents = tuple(_whole(path, number, "dependency", part) for part in parts if part)
    if columns.get("tuple"):
        category = row[columns.get("tuple")].split("(")[0].strip()
    elif "category_broad" in columns.raw and "category_detailed" in columns.raw:
        category = f"{row['category_broad'].strip()} - {row['category_detailed'].strip()}"
    else:
        category = ""
    text, prompt = (row[name].strip() if (name := columns.get(wanted)) else "" for wanted in ("text", "prompt"))
    return Question(item_id, proposition_id, parents, category, text, prompt)


def _whole(path: Path, number: int, column: str, cell: str) -> int:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not value.is_integer():
        raise UsageError(f"{path} line {number}: {column} {cell!r} is not a whole number")
    return int(value)


def _tile(
    path: Path, number: int, row: Mapping[str, str], columns: _Columns, seen: Mapping, identity: tuple[str, int]
) -> int:
    if columns.get("tile"):
        cell = row[columns.get("tile")].strip()
        if cell.upper() in _TILE_NAMES:
            return _TILE_NAMES.index(cell.upper())
        return _whole(path, number, "tile", cell)
    # Without a tile column, the k-th line of a question is its answer on tile k.
    return next(tile for tile in range(len(seen) + 1) if (*identity, tile) not in seen)


_SCORES = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}


def _values(
    path: Path, raw: Mapping[tuple[str, int, int], str], lines: Mapping[tuple[str, int, int], int]
) -> dict[tuple[str, int, int], float]:
    """1.0 or 0.0 per answer: of a column of words, where only "yes" is yes, or of a column of 0/1 or true/false.

    Warns of words that people read as yes and the published comparison does not. Raises UsageError for other numbers, and
    for numbers among words.
    """
    numbers = {key: number for key, cell in raw.items() if (number := _score(cell)) is not None}
    for key, number in numbers.items():
        if number not in (0.0, 1.0):
            raise UsageError(
                f"{path} line {lines[key]}: {raw[key].strip()!r:.40} is neither an answer nor 0 or 1; DPG-Bench counts yes or "
                "no, decide it before"
            )
    if len(numbers) == len(raw):
        return numbers
    if numbers:
        key = next(iter(numbers))
        raise UsageError(
            f"{path} line {lines[key]}: {raw[key].strip()!r} among answers in words; use yes and no, or 0 and 1"
        )
    almost = [key for key, cell in raw.items() if cell != "yes" and re.match(r"\W*yes\b", cell.casefold())]
    if almost:
        warnings.warn(
            f"{path}: {len(almost)} of {len(raw)} answers begin with yes but are not exactly 'yes', so they count as no, as "
            f"in the published script; the first: {raw[almost[0]]!r:.40} in line {lines[almost[0]]}"
        )
    elif not any(cell.strip().casefold() in ("yes", "no") for cell in raw.values()):
        cell = next(iter(raw.values()))
        warnings.warn(f"{path}: no answer is yes or no, so all count as no; the first: {cell!r:.40}")
    return {key: is_yes(cell) for key, cell in raw.items()}


def _score(cell: str) -> float | None:
    """The number that a cell holds, None for words."""
    word = cell.strip().casefold()
    if word in _SCORES:
        return _SCORES[word]
    try:
        return float(word.removesuffix("%").replace(",", "."))
    except ValueError:
        return None
