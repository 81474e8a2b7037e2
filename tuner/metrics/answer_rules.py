"""Scores of benchmarks that ask a model questions about each image: GenEval 2, T2I-CompBench's attributes, OneIG's alignment.

These rules need only an answers file; DPG-Bench has its own module. None of the benchmarks' data is shipped: their prompts
and questions are read by path.

Sources (facts): GenEval 2, Kamath et al. 2025 (arXiv 2512.16853), github facebookresearch/GenEval2, `evaluation.py` and
`soft_tifa_analysis.py`; T2I-CompBench, Huang et al. 2023, github Karine-Huang/T2I-CompBench, `BLIPvqa_eval/BLIP_vqa.py`;
OneIG-Bench, Chang et al. 2025, github OneIG-Bench/OneIG-Benchmark, `scripts/alignment/alignment_score.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stagevar.errors import UsageError
from stagevar.text_files import read_json, read_json_values
from tuner.metrics.answers_file import Answers, Question, read_answers


class AskedPrompt(NamedTuple):
    """One line of `geneval2_data.jsonl`: prompt, atom count, and per question its text, right answer and skill."""

    prompt: str
    atoms: int
    questions: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class ItemScore:
    """One item: the means over its images. `other` is GenEval 2's geometric mean, `score` the arithmetic one."""

    item_id: str
    score: float
    other: float | None = None


@dataclass(frozen=True)
class AnswerScore:
    """Figures by name, as published, and the items they average; `unanswered` lists items with questions but no answers."""

    figures: dict[str, float]
    items: tuple[ItemScore, ...]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    unanswered: tuple[str, ...] = ()


# Rules -----------------------------------------------------------------------------------------------------------------


def geometric_mean(shares: Sequence[float]) -> float:
    """The geometric mean; 0 if any share is 0."""
    if min(shares) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, shares)) / len(shares))


def score_geneval2(questions: Sequence[Question], answers: Answers) -> AnswerScore:
    """Soft-TIFA of GenEval 2, times 100: arithmetic (AM) and geometric means (GM) of an image's answers, over prompts.

    Answers are probabilities of the right answer. A prompt with several images counts by their mean. By skill: the mean over
    all answers (AM). By number of atoms, if the questions give it: the mean of the prompts' GM.
    Raises UsageError for a question without an answer for an image of its item.
    """
    items = []
    skills: dict[str, list[float]] = {}
    atoms: dict[str, list[float]] = {}
    answered, unanswered = _answered(questions, answers)
    for item_id, group, images in answered:
        arithmetic = _mean(_mean(image) for image in images)
        geometric = _mean(geometric_mean(image) for image in images)
        items.append(ItemScore(item_id, arithmetic, geometric))
        for image in images:
            for question, share in zip(group, image, strict=True):
                skills.setdefault(question.category, []).append(share)
        if group[0].atoms:
            atoms.setdefault(str(group[0].atoms), []).append(geometric)
    figures = {
        "soft_tifa_am": 100 * _mean(item.score for item in items),
        "soft_tifa_gm": 100 * _mean(item.other or 0.0 for item in items),
    }
    groups = {"skill_am": skills, "atoms_gm": dict(sorted(atoms.items(), key=lambda entry: int(entry[0])))}
    return AnswerScore(figures, tuple(items), _group_means(groups, 100), unanswered)


def score_compbench(questions: Sequence[Question], answers: Answers) -> AnswerScore:
    """T2I-CompBench's BLIP-VQA score, 0 to 1: an image scores the product of its noun phrases' probabilities of yes.

    Each image's score is rounded to four decimals, as published; the result is the mean over images, also by the category of
    the item's first question, if any. The benchmark uses it for color, shape and texture; its other categories need a
    detector and CLIP.
    """
    items, every = [], []
    categories: dict[str, list[float]] = {}
    answered, unanswered = _answered(questions, answers)
    for item_id, group, images in answered:
        products = [round(math.prod(image), 4) for image in images]
        items.append(ItemScore(item_id, _mean(products)))
        categories.setdefault(group[0].category, []).extend(products)
        every += products
    return AnswerScore({"blip_vqa": _mean(every)}, tuple(items), _group_means({"category": categories}, 1), unanswered)


def score_oneig(questions: Sequence[Question], answers: Answers) -> AnswerScore:
    """OneIG-Bench's alignment, 0 to 1: the share of an image's questions answered yes whose parents are all answered yes.

    A parent counts by its own answer: unlike in DPG-Bench, a zero does not cascade. A missing parent is ignored. An item
    scores the mean of its images, and the result is the mean of the items.
    """
    items = []
    answered, unanswered = _answered(questions, answers)
    for item_id, group, images in answered:
        shares = []
        for image in images:
            said = {question.proposition_id: answer for question, answer in zip(group, image, strict=True)}
            kept = [
                answer if all(said.get(parent, 1.0) for parent in question.parents) else 0.0
                for question, answer in zip(group, image, strict=True)
            ]
            shares.append(_mean(kept))
        items.append(ItemScore(item_id, _mean(shares)))
    return AnswerScore({"alignment": _mean(item.score for item in items)}, tuple(items), {}, unanswered)


def _groups(questions: Sequence[Question]) -> dict[str, list[Question]]:
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.item_id, []).append(question)
    return groups


def _answered(
    questions: Sequence[Question], answers: Answers
) -> tuple[list[tuple[str, list[Question], list[list[float]]]], tuple[str, ...]]:
    """Items with answers, each with its questions and its answers per image, in the same order; and the other items.

    Raises UsageError for a question without an answer for an image of its item.
    """
    tiles: dict[str, set[int]] = {}
    for item_id, _, tile in answers:
        tiles.setdefault(item_id, set()).add(tile)
    found, unanswered = [], []
    for item_id, group in _groups(questions).items():
        images = []
        for tile in sorted(tiles.get(item_id, ())):
            for question in group:
                if (item_id, question.proposition_id, tile) not in answers:
                    raise UsageError(
                        f"item {item_id}, proposition {question.proposition_id}: no answer for tile {tile}"
                    )
            images.append([answers[item_id, question.proposition_id, tile] for question in group])
        if images:
            found.append((item_id, group, images))
        else:
            unanswered.append(item_id)
    return found, tuple(unanswered)


def _group_means(groups: Mapping[str, Mapping[str, Sequence[float]]], factor: float) -> dict[str, dict[str, float]]:
    """Means by group; answers without a category are left out."""
    means = {
        kind: {name: factor * _mean(values) for name, values in found.items() if name} for kind, found in groups.items()
    }
    return {kind: found for kind, found in means.items() if found}


def _mean(values: Iterable[float]) -> float:
    """The mean; NaN, null in JSON, if there are no values."""
    found = list(values)
    return sum(found) / len(found) if found else math.nan


# Files -----------------------------------------------------------------------------------------------------------------


def read_geneval2(path: str | Path) -> list[AskedPrompt]:
    """The prompts of a file in the layout of `geneval2_data.jsonl`. Raises UsageError naming the line at fault."""
    prompts = []
    for number, entry in read_json_values(path):
        try:
            pairs, skills = entry["vqa_list"], entry.get("skills") or [""] * len(entry["vqa_list"])
            questions = tuple(
                (str(text), str(answer), str(skill)) for (text, answer), skill in zip(pairs, skills, strict=True)
            )
            prompts.append(AskedPrompt(str(entry["prompt"]), int(entry.get("atom_count") or 0), questions))
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise UsageError(
                f"{path} line {number}: not a line of geneval2_data.jsonl (prompt, atom_count, vqa_list and as many skills)"
            ) from None
        if not questions:
            raise UsageError(f"{path} line {number}: vqa_list is empty; give the prompt's questions")
    return prompts


def geneval2_questions(prompts: Sequence[AskedPrompt]) -> list[Question]:
    """The same as questions: items are numbered from 0 by line, propositions from 1."""
    return [
        Question(str(index), number, (), skill, text, asked.prompt, asked.atoms)
        for index, asked in enumerate(prompts)
        for number, (text, _, skill) in enumerate(asked.questions, start=1)
    ]


def read_geneval2_answers(path: str | Path, prompts_path: str | Path | None) -> tuple[list[Question], Answers]:
    """Reads an answers file, or the list of lists of probabilities that the published script writes.

    Args:
        path: the file.
        prompts_path: geneval2_data.jsonl. The script's file needs it; an answers file without it gives skill and atom_count
            itself.

    Returns:
        Questions and answers.

    Raises:
        UsageError: naming what does not fit.
    """
    if Path(path).suffix == ".json":
        if prompts_path is None:
            raise UsageError(f"{path}: lists of probabilities need the prompts they belong to: give --questions")
        questions = geneval2_questions(read_geneval2(prompts_path))
        return questions, _script_answers(path, _groups(questions))
    own, answers = read_answers(path, reading="shares")
    if prompts_path is None:
        return own, answers
    questions = geneval2_questions(read_geneval2(prompts_path))
    known = {(question.item_id, question.proposition_id) for question in questions}
    for question in own:
        if (question.item_id, question.proposition_id) not in known:
            raise UsageError(
                f"{path}: item {question.item_id}, proposition {question.proposition_id} is not in {prompts_path}; items are "
                "its lines, counted from 0, and propositions are counted from 1"
            )
    return questions, answers


def _script_answers(path: str | Path, groups: Mapping[str, Sequence[Question]]) -> Answers:
    lists = read_json(path)
    if not isinstance(lists, list) or len(lists) != len(groups):
        found = f"{len(lists)} lists" if isinstance(lists, list) else "no list"
        raise UsageError(
            f"{path}: holds {found} for {len(groups)} prompts; one list of probabilities per prompt is needed"
        )
    answers: dict[tuple[str, int, int], float] = {}
    for shares, (item_id, group) in zip(lists, groups.items(), strict=True):
        if not isinstance(shares, list) or len(shares) != len(group):
            raise UsageError(f"{path}: list {item_id} does not hold {len(group)} probabilities, one per question")
        for question, share in zip(group, shares, strict=True):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise UsageError(f"{path}: list {item_id} holds {share!r:.40}, which is not a probability from 0 to 1")
            answers[item_id, question.proposition_id, 0] = float(share)
    return answers
