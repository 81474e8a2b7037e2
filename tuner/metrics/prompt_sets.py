"""Prompt sets: GenEval's and DPG's own files by path, a seeded generator of GenEval-style prompts, stratified subsets.

Source: djghosh13/geneval prompts/ (tags, wording, metadata keys; its 553 prompts are read, not shipped) and ELLA's
dpg_bench/prompts. The generator is our own: it balances classes, colors, counts and relations, whereas the published one
draws them independently, so a small set of ours covers more.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stagevar.errors import UsageError
from stagevar.files import write_text_atomically, writing
from stagevar.prompts.geneval import COLORS, RELATIONS, TAGS
from stagevar.prompts.prompt_files import read_prompt_file

Metadata = dict[str, object]

# COCO's 80 classes in the order and wording of GenEval's object_names.txt ("computer mouse", not "mouse").
COCO_CLASSES: tuple[str, ...] = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "computer mouse",
    "tv remote",
    "computer keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
_COLORABLE = tuple(name for name in COCO_CLASSES if name != "person")  # GenEval asks for no colored persons
_NUMBERS = {2: "two", 3: "three", 4: "four"}


def generate(count: int, seed: int = 0, tags: Sequence[str] = TAGS) -> list[Metadata]:
    """`count` distinct GenEval-style prompts, spread evenly over `tags`, always the same for a seed.

    A longer set starts with the shorter one. Raises UsageError for unknown tags or more prompts than exist.
    """
    unknown = [tag for tag in tags if tag not in _MAKERS]
    if unknown or not tags:
        raise UsageError(f"task {unknown[0] if unknown else tags!r}: expected some of {', '.join(TAGS)}")
    if count < 0:
        raise UsageError(f"{count} prompts: expected 0 or more")
    streams = {tag: _distinct(_MAKERS[tag], random.Random(f"geneval-style/{seed}/{tag}")) for tag in tags}
    prompts: list[Metadata] = []
    while len(prompts) < count:
        if not streams:
            raise UsageError(f"{count} prompts: only {len(prompts)} distinct ones exist for {', '.join(tags)}")
        for tag in list(streams):
            metadata = next(streams[tag], None)
            if metadata is None:
                del streams[tag]
            elif len(prompts) < count:
                prompts.append(metadata)
    return prompts


def stratified_subset(prompts: Sequence[Mapping[str, object]], count: int, seed: int = 0) -> list[int]:
    """Ascending indices of `count` prompts in which every tag keeps its share, to within one prompt (largest remainders).

    Raises UsageError if `count` is not between 1 and the number of prompts.
    """
    if not 1 <= count <= len(prompts):
        raise UsageError(f"a subset of {count} of {len(prompts)} prompts: ask for 1 to {len(prompts)}")
    by_tag: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_tag.setdefault(str(prompt.get("tag", "")), []).append(index)
    exact = {tag: count * len(indices) / len(prompts) for tag, indices in by_tag.items()}
    quota = {tag: int(share) for tag, share in exact.items()}
    for tag in sorted(exact, key=lambda tag: quota[tag] - exact[tag])[: count - sum(quota.values())]:
        quota[tag] += 1
    rng = random.Random(f"subset/{seed}")
    return sorted(index for tag, indices in by_tag.items() for index in rng.sample(indices, quota[tag]))


def subset_rank_correlation(
    values_SP: np.ndarray, prompts: Sequence[Mapping[str, object]], count: int, *, draws: int = 200, seed: int = 0
) -> dict[str, float]:
    """How well stratified subsets of `count` prompts reproduce the ranking of systems by all prompts.

    Args:
        values_SP: one value per system and prompt.
        prompts: with their tags.
        count: size of a subset.
        draws: number of subsets.
        seed: of the draws.

    Returns:
        Spearman's correlation of the systems' means (mean and 5th percentile over the draws), and how often a subset finds
        the system that is best on all prompts.

    Raises:
        UsageError: for fewer than 3 systems, or if all systems have the same mean.
    """
    from scipy.stats import spearmanr

    values_SP = np.asarray(values_SP, dtype=np.float64)
    if values_SP.ndim != 2 or len(values_SP) < 3 or values_SP.shape[1] != len(prompts):
        raise UsageError(f"values of shape {values_SP.shape}: expected at least 3 systems by {len(prompts)} prompts")
    whole_S = values_SP.mean(1)
    if np.ptp(whole_S) == 0:
        raise UsageError("all systems have the same mean: there is no ranking to predict")
    correlations, hits = [], 0
    for draw in range(draws):
        means_S = values_SP[:, stratified_subset(prompts, count, seed=seed + draw)].mean(1)
        # A subset on which all systems tie predicts nothing.
        correlations.append(float(spearmanr(whole_S, means_S).statistic) if np.ptp(means_S) else 0.0)
        hits += int(means_S.argmax() == whole_S.argmax())
    return {
        "spearman_mean": float(np.mean(correlations)),
        "spearman_p5": float(np.percentile(correlations, 5)),
        "best_found": hits / draws,
        "count": count,
        "draws": draws,
    }


def read_prompts(path: str | Path) -> list[Metadata]:
    """Prompts of a file or folder in any form that `stagevar.prompts.prompt_files` reads, in its order, each with its "prompt".

    Raises UsageError, naming the line, for anything empty, unreadable or not a prompt.
    """
    return [entry.metadata for entry in read_prompt_file(path)]


def write_metadata(prompts: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Writes GenEval's evaluation_metadata.jsonl. Raises UsageError if the path cannot be written."""
    with writing(path):
        write_text_atomically(path, "".join(json.dumps(prompt) + "\n" for prompt in prompts))


# The generator ---------------------------------------------------------------------------------------------------


def _distinct(make: Callable[[random.Random], Iterator[Metadata]], rng: random.Random) -> Iterator[Metadata]:
    """What `make` yields, without repeats; ends after a long stretch with nothing new."""
    seen: set[str] = set()
    repeats = 0
    for metadata in make(rng):
        if metadata["prompt"] in seen:
            repeats += 1
            if repeats > 2000:
                return
            continue
        repeats = 0
        seen.add(str(metadata["prompt"]))
        yield metadata


def _decks(rng: random.Random, values: Sequence[Any]) -> Iterator[Any]:
    """Endlessly the values in random order, reshuffled each time."""
    while True:
        yield from rng.sample(list(values), len(values))


def _pairs(rng: random.Random, values: Sequence[str]) -> Iterator[tuple[str, str]]:
    deck = _decks(rng, values)
    while True:
        first, second = next(deck), next(deck)
        if first != second:
            yield first, second


def _clause(name: str, **extra: Any) -> Metadata:
    return {"class": name, "count": 1, **extra}


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    """The plural as GenEval spells it: an added s, or es after s ("two buses", "two skises")."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _single(rng: random.Random) -> Iterator[Metadata]:
    for name in _decks(rng, COCO_CLASSES):
        yield {"tag": "single_object", "include": [_clause(name)], "prompt": f"a photo of {_article(name)}"}


def _two(rng: random.Random) -> Iterator[Metadata]:
    for first, second in _pairs(rng, COCO_CLASSES):
        yield {
            "tag": "two_object",
            "include": [_clause(first), _clause(second)],
            "prompt": f"a photo of {_article(first)} and {_article(second)}",
        }


def _counting(rng: random.Random) -> Iterator[Metadata]:
    numbers = _decks(rng, tuple(_NUMBERS))
    for name in _decks(rng, COCO_CLASSES):
        number = next(numbers)
        yield {
            "tag": "counting",
            "include": [{"class": name, "count": number}],
            "exclude": [{"class": name, "count": number + 1}],
            "prompt": f"a photo of {_NUMBERS[number]} {_plural(name)}",
        }


def _colors(rng: random.Random) -> Iterator[Metadata]:
    colors = _decks(rng, COLORS)
    for name in _decks(rng, _COLORABLE):
        color = next(colors)
        yield {
            "tag": "colors",
            "include": [_clause(name, color=color)],
            "prompt": f"a photo of {_article(color)} {name}",
        }


def _position(rng: random.Random) -> Iterator[Metadata]:
    relations = _decks(rng, RELATIONS)
    for subject, target in _pairs(rng, COCO_CLASSES):
        relation = next(relations)
        yield {
            "tag": "position",
            "include": [_clause(target), _clause(subject, position=[relation, 0])],
            "prompt": f"a photo of {_article(subject)} {relation} {_article(target)}",
        }


def _color_attr(rng: random.Random) -> Iterator[Metadata]:
    colors = _pairs(rng, COLORS)
    for first, second in _pairs(rng, _COLORABLE):
        color_a, color_b = next(colors)
        yield {
            "tag": "color_attr",
            "include": [_clause(first, color=color_a), _clause(second, color=color_b)],
            "prompt": f"a photo of {_article(color_a)} {first} and {_article(color_b)} {second}",
        }


_MAKERS: dict[str, Callable[[random.Random], Iterator[Metadata]]] = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
