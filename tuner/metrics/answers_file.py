"""Files of a model's answers to a benchmark's questions; docs/metrics.md ("Answers file") has the format."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stagevar.errors import UsageError
from stagevar.text_files import read_table

Reading = Literal["exact", "words", "shares"]


@dataclass(frozen=True)
class Question:
    """One question. `parents` are proposition ids of the same item; `category` is "entity - whole", a skill or ""; `text` is
    the question, `prompt` the item's caption, `atoms` GenEval 2's count for its prompt: "" and 0 if the file omits them."""

    item_id: str
    proposition_id: int
    parents: tuple[int, ...] = ()
    category: str = ""
    text: str = ""
    prompt: str = ""
    atoms: int = 0


Answers = Mapping[tuple[str, int, int], float]  # (item, proposition, tile) -> 1.0 for yes, 0.0 for all else


def is_yes(answer: str) -> float:
    """1.0 if the answer is exactly "yes", else 0.0: the published comparison."""
    return float(answer == "yes")


_ALIASES = {
    "item_id": ("item_id", "item", "prompt_id", "id"),
    "proposition_id": ("proposition_id", "proposition", "qid", "question_id"),
    "dependency": ("dependency", "dependencies", "parents", "parent", "depends_on"),
    "tile": ("tile", "tile_id", "tile_index", "sample", "image", "image_id", "image_index", "pic"),
    "answer": ("answer", "vqa_answer", "response", "prediction", "probability"),
    "score": ("score", "correct"),
    "tuple": ("tuple", "category", "skill"),
    "atoms": ("atom_count", "atoms"),
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


def read_answers(
    path: str | Path, questions_path: str | Path | None = None, *, reading: Reading = "exact"
) -> tuple[list[Question], dict[tuple[str, int, int], float]]:
    """(questions in file order, answers) of an answers file; its format is in docs/metrics.md ("Answers file").

    Args:
        path: the answers file.
        questions_path: dpg_bench.csv; with it, the answers file needs only item, proposition, tile and answer.
        reading: "exact" counts only the lower-case word yes as yes, as DPG-Bench does, "words" counts it in any case, and
            "shares" reads probabilities from 0 to 1.

    Raises:
        UsageError: naming the line at fault.
    """
    path = Path(path)
    table = read_table(path)
    columns = _Columns(table.columns)
    wide = {int(match[1]): name for name in columns.raw if (match := re.fullmatch(r"answer[_ ]?(\d+)", name))}
    value_column = columns.get("answer") or columns.get("score") or ""
    if not wide and not value_column:
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
                f"{path} line {number}: item {identity[0]}, proposition {identity[1]} has a different "
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
    if reading == "words":
        raw = {key: cell.strip().casefold() for key, cell in raw.items()}
    values = (_shares if reading == "shares" else _values)(path, raw, lines)
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

    def cell(self, row: Mapping[str, str], wanted: str) -> str:
        """A line's cell in a column, "" if the file has no such column."""
        name = self.get(wanted)
        return "" if name is None else row[name]


def _question(path: Path, number: int, row: Mapping[str, str], columns: _Columns) -> Question:
    for needed in ("item_id", "proposition_id"):
        if columns.get(needed) is None:
            raise UsageError(f"{path}: no column {needed}; found {', '.join(columns.raw)}")
    item_id = columns.cell(row, "item_id").strip()
    if not item_id:
        raise UsageError(f"{path} line {number}: the item_id is empty")
    proposition_id = _whole(path, number, "proposition_id", columns.cell(row, "proposition_id"))
    dependency = columns.cell(row, "dependency")
    parts = re.split(r"[,;|\s]+", dependency.strip("[]() "))
    parents = tuple(_whole(path, number, "dependency", part) for part in parts if part)
    if columns.get("tuple"):
        category = columns.cell(row, "tuple").split("(")[0].strip()
    elif "category_broad" in columns.raw and "category_detailed" in columns.raw:
        category = f"{row['category_broad'].strip()} - {row['category_detailed'].strip()}"
    else:
        category = ""
    text, prompt = (columns.cell(row, wanted).strip() for wanted in ("text", "prompt"))
    atoms = columns.cell(row, "atoms").strip()
    return Question(
        item_id,
        proposition_id,
        parents,
        category,
        text,
        prompt,
        _whole(path, number, "atom_count", atoms) if atoms else 0,
    )


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
        cell = columns.cell(row, "tile").strip()
        if cell.upper() in _TILE_NAMES:
            return _TILE_NAMES.index(cell.upper())
        return _whole(path, number, "tile", cell)
    # Without a tile column, the k-th line of a question is its answer for tile k.
    return next(tile for tile in range(len(seen) + 1) if (*identity, tile) not in seen)


_SCORES = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}


def _values(
    path: Path, raw: Mapping[tuple[str, int, int], str], lines: Mapping[tuple[str, int, int], int]
) -> dict[tuple[str, int, int], float]:
    """1.0 or 0.0 per answer, from a column of words, where only "yes" is yes, or of 0/1 or true/false.

    Warns about words that people read as yes but the published comparison does not. Raises UsageError for other numbers, and
    for numbers among words.
    """
    numbers = {key: number for key, cell in raw.items() if (number := _score(cell)) is not None}
    for key, number in numbers.items():
        if number not in (0.0, 1.0):
            raise UsageError(
                f"{path} line {lines[key]}: {raw[key].strip()!r:.40} is neither an answer nor 0 or 1; DPG-Bench counts yes or "
                "no, so decide before scoring"
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
            f"in the published script; the first: {raw[almost[0]]!r:.40} on line {lines[almost[0]]}"
        )
    elif not any(cell.strip().casefold() in ("yes", "no") for cell in raw.values()):
        cell = next(iter(raw.values()))
        warnings.warn(f"{path}: no answer is yes or no, so they all count as no; the first: {cell!r:.40}")
    return {key: is_yes(cell) for key, cell in raw.items()}


def _shares(
    path: Path, raw: Mapping[tuple[str, int, int], str], lines: Mapping[tuple[str, int, int], int]
) -> dict[tuple[str, int, int], float]:
    """Answers as probabilities. Raises UsageError for words and for numbers outside 0 to 1."""
    found = {}
    for key, cell in raw.items():
        share = _score(cell)
        if share is None or not 0 <= share <= 1:
            raise UsageError(
                f"{path} line {lines[key]}: {cell.strip()!r:.40} is not a probability from 0 to 1; give the model's "
                "probability of the right answer"
            )
        found[key] = share
    return found


def _score(cell: str) -> float | None:
    """The number in a cell, None for words."""
    word = cell.strip().casefold()
    if word in _SCORES:
        return _SCORES[word]
    try:
        return float(word.removesuffix("%").replace(",", "."))
    except ValueError:
        return None
