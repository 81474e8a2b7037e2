"""Procedural scenes: the world that nano is trained on and judged in.

A scene is one to four objects (shape, color, texture, place, size) on a dark shaded background, with the caption that
asks for it and GenEval's metadata. Six tasks and their tags follow GenEval; `texture` is ours. Everything follows
from a seed, a batch at a time, by numpy.

Texture marks lie on a lattice fixed to the image (period size / 16), not to the object. At 64 pixels the period is one
patch, so a texture is a property of a cell and coarse scales can carry it.

Five of the 48 shape-color pairs (`UNSEEN_PAIRS`) are never drawn in training and are prompted in their own split.

Source: GenEval (djghosh13/geneval), prompts/evaluation_metadata.jsonl, for tags, wording and metadata keys; worlds of
colored shapes are common property. Ours differ in that counting and position prompts name colors half of the time.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from stagevar.errors import UsageError
from stagevar.prompts.geneval import Clause, Metadata

SHAPES = ("circle", "square", "triangle", "ring", "star", "cross")
PLURALS = ("circles", "squares", "triangles", "rings", "stars", "crosses")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
COLOR_RGB = np.array(
    [
        (0.87, 0.13, 0.13),
        (0.96, 0.50, 0.08),
        (0.94, 0.88, 0.16),
        (0.20, 0.76, 0.28),
        (0.18, 0.82, 0.88),
        (0.16, 0.34, 0.94),
        (0.56, 0.20, 0.90),
        (0.96, 0.34, 0.74),
    ],
    dtype=np.float32,
)
TEXTURES = ("plain", "striped", "dotted")
MARK_RGB = 0.96  # the white of stripes and dots
GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TASKS = (*GENEVAL_TASKS, "texture")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
MAX_OBJECTS = 4
# Names that a cell can have, "nothing" included, for shape, color and texture.
NAMES = (1 + len(SHAPES), 1 + len(COLORS), 1 + len(TEXTURES))
UNSEEN_PAIRS = frozenset(
    {("star", "red"), ("circle", "green"), ("triangle", "blue"), ("cross", "yellow"), ("square", "purple")}
)
SPLITS = ("train", "search", "heldout", "unseen")
# Radius range (share of the image side) by number of objects.
RADIUS = {1: (0.17, 0.27), 2: (0.14, 0.22), 3: (0.13, 0.18), 4: (0.125, 0.16)}
# Positions and radii sit on this lattice of the image side; texture marks repeat every 4 of its steps.
LATTICE = 64
LONGEST_CAPTION = 11  # words: "a photo of a red ring left of a blue star"
_GAP = 4.0 / LATTICE
_PROPOSALS = 48


@dataclass(frozen=True)
class SceneBatch:
    """B scenes as numbers; `draw` turns them into pixels.

    Attributes:
        count_B: objects per scene.
        shape_BK, color_BK, texture_BK: indices into the tables above.
        center_BK2, radius_BK: (x, y) and radius, as shares of the image side.
        background_B6: top tone, tint, slope x, slope y, ...
        metadata: one GenEval dict per scene, its caption under "prompt".
    """

    count_B: np.ndarray
    shape_BK: np.ndarray
    color_BK: np.ndarray
    texture_BK: np.ndarray
    center_BK2: np.ndarray
    radius_BK: np.ndarray
    background_B6: np.ndarray
    metadata: list[Metadata]

    @property
    def captions(self) -> list[str]:
        return [m["prompt"] for m in self.metadata]

    def __len__(self) -> int:
        return len(self.metadata)


# ---------------------------------------------------------------------------------------------------------- captions


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def clause(shape: str, count: int = 1, color: str | None = None, texture: str | None = None) -> Clause:
    """What a caption asks for: so many of a shape, and their color or texture if these matter."""
    item: Clause = {"class": shape, "count": count}
    if color is not None:
        item["color"] = color
    if texture is not None:
        item["texture"] = texture
    return item


def _noun(item: Clause) -> str:
    shape = item["class"] if item["count"] == 1 else PLURALS[SHAPES.index(item["class"])]
    return " ".join(w for w in (item.get("texture"), item.get("color"), shape) if w)


def metadata_of(tag: str, include: list[Clause]) -> Metadata:
    """GenEval's dict for a task: the reference object first, then the subject with its position."""
    if tag == "counting":
        item = include[0]
        prompt = f"a photo of {NUMBERS[item['count']]} {_noun(item)}"
        more: Clause = {**item, "count": item["count"] + 1}
        exclude = [more]
        return {"tag": tag, "include": include, "exclude": exclude, "prompt": prompt}
    if tag == "position":
        reference, subject = include
        prompt = f"a photo of {_article(_noun(subject))} {subject['position'][0]} {_article(_noun(reference))}"
    else:
        prompt = "a photo of " + " and ".join(_article(_noun(i)) for i in include)
    return {"tag": tag, "include": include, "prompt": prompt}


def unseen_pairs(metadata: Metadata) -> bool:
    """Whether the prompt names a shape-color pair that training never shows."""
    return any((i["class"], i.get("color")) in UNSEEN_PAIRS for i in metadata["include"])


@cache
def all_captions(tag: str, colored: bool) -> tuple[Metadata, ...]:
    """Every prompt of one task, with or without color words, in a fixed order."""
    colors: tuple[str | None, ...] = COLORS if colored else (None,)
    items = [(s, c) for s in SHAPES for c in colors]
    pairs = [(a, b) for a in items for b in items if a[0] != b[0] and (not colored or a[1] != b[1])]
    if tag in ("single_object", "colors"):
        return tuple(metadata_of(tag, [clause(s, 1, c)]) for s, c in items)
    if tag in ("two_object", "color_attr"):
        return tuple(metadata_of(tag, [clause(a[0], 1, a[1]), clause(b[0], 1, b[1])]) for a, b in pairs)
    if tag == "counting":
        return tuple(metadata_of(tag, [clause(s, n, c)]) for n in NUMBERS for s, c in items)
    if tag == "texture":
        return tuple(metadata_of(tag, [clause(s, 1, c, t)]) for t in TEXTURES for s, c in items)
    if tag == "position":
        return tuple(
            metadata_of(tag, [clause(a[0], 1, a[1]), {**clause(b[0], 1, b[1]), "position": [relation, 0]}])
            for relation, (a, b) in itertools.product(RELATIONS, pairs)
        )
    raise UsageError(f"unknown task {tag!r}; tasks are {', '.join(TASKS)}")


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@cache
def split_captions(tag: str, colored: bool, split: str) -> tuple[Metadata, ...]:
    """The prompts of a family that a split may use.

    Colored families of counting, position, color_attr and texture are cut by a hash of the text: 80 % train, 10 %
    search, 10 % heldout. The other families hold 6 to 48 texts, too few to cut; splits share those and differ in noise.
    """
    family = all_captions(tag, colored)
    if split == "unseen":
        return tuple(m for m in family if unseen_pairs(m))
    family = tuple(m for m in family if not unseen_pairs(m))
    if not colored or tag == "colors":
        return family
    low, high = {"train": (0.0, 0.8), "search": (0.8, 0.9), "heldout": (0.9, 1.0)}[split]
    return tuple(m for m in family if low <= _share(m["prompt"]) < high)


_COLORING = {
    "single_object": (False,),
    "two_object": (False,),
    "counting": (False, True),
    "colors": (True,),
    "position": (False, True),
    "color_attr": (True,),
    "texture": (False, True),
}


def prompts(split: str, n: int, seed: int = 0, tasks: tuple[str, ...] | None = None) -> list[Metadata]:
    """`n` prompts of a split as GenEval metadata, taken from the tasks in turn, each family used up before it repeats.

    Every dict also carries "index" (its place, 0-based), "split" and "unseen" (whether it names an unseen pair); split
    "unseen" holds only tasks that name colors. Raises UsageError for an unknown split or task.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown prompt split {split!r}; use one of {', '.join(SPLITS)}")
    for tag in tasks or ():
        if tag not in TASKS:
            raise UsageError(f"unknown task {tag!r}; tasks are {', '.join(TASKS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), 0x70])
    chosen = [t for t in (tasks or TASKS) if split != "unseen" or True in _COLORING[t]]
    if not chosen and n:
        raise UsageError(f"tasks {', '.join(tasks or ())} name no colors, so split 'unseen' has none; add 'colors'")
    streams = {tag: _endless(tag, split, rng) for tag in chosen}
    found = (next(streams[chosen[i % len(chosen)]]) for i in range(n))
    return [{**m, "index": i, "split": split, "unseen": unseen_pairs(m)} for i, m in enumerate(found)]


def _endless(tag: str, split: str, rng: np.random.Generator) -> Iterator[Metadata]:
    colorings = [c for c in _COLORING[tag] if split != "unseen" or c]
    queues: dict[bool, list[int]] = {c: [] for c in colorings}
    for turn in itertools.count():
        colored = colorings[turn % len(colorings)]
        pool = split_captions(tag, colored, split)
        if not queues[colored]:
            queues[colored] = rng.permutation(len(pool)).tolist()
        yield pool[queues[colored].pop()]


# -------------------------------------------------------------------------------------------------------------- scenes


def sample(
    batch: int,
    rng: np.random.Generator,
    split: str = "train",
    task_weights: tuple[float, ...] | None = None,
) -> SceneBatch:
    """Draw prompts of a split and one matching scene for each. `task_weights` follow TASKS (equal when None)."""
    weights = np.ones(len(TASKS)) if task_weights is None else np.asarray(task_weights, dtype=float)
    if split == "unseen":
        weights = weights * [True in _COLORING[t] for t in TASKS]
    tags = rng.choice(len(TASKS), size=batch, p=weights / weights.sum())
    chosen = []
    for tag in tags:
        colorings = [c for c in _COLORING[TASKS[tag]] if split != "unseen" or c]
        pool = split_captions(TASKS[tag], colorings[int(rng.integers(len(colorings)))], split)
        chosen.append(pool[int(rng.integers(len(pool)))])
    return arrange(chosen, rng)


def arrange(metadata: list[Metadata], rng: np.random.Generator) -> SceneBatch:
    """One scene per prompt that satisfies it and holds nothing else; what the prompt leaves open is drawn at random.

    Colors left open never form an unseen pair.
    """
    batch = len(metadata)
    count_B = np.zeros(batch, dtype=np.int64)
    shape_BK = np.zeros((batch, MAX_OBJECTS), dtype=np.int64)
    color_BK = rng.integers(len(COLORS), size=(batch, MAX_OBJECTS))
    # Textures left open are mostly plain: marks that no word asks for are hard to keep alike over an object, because
    # the tokens of a scale are drawn at once.
    texture_BK = rng.choice(len(TEXTURES), size=(batch, MAX_OBJECTS), p=(0.8, 0.1, 0.1))
    relation_B = np.full(batch, -1)
    for b, meta in enumerate(metadata):
        k = 0
        for item in meta["include"]:
            shape = SHAPES.index(item["class"])
            for copy in range(item["count"]):
                shape_BK[b, k] = shape
                if "color" in item:
                    color_BK[b, k] = COLORS.index(item["color"])
                elif copy:
                    color_BK[b, k] = color_BK[b, k - 1]
                else:
                    while (item["class"], COLORS[color_BK[b, k]]) in UNSEEN_PAIRS:
                        color_BK[b, k] = rng.integers(len(COLORS))
                if "texture" in item:
                    texture_BK[b, k] = TEXTURES.index(item["texture"])
                elif copy:
                    texture_BK[b, k] = texture_BK[b, k - 1]
                k += 1
            if "position" in item:
                relation_B[b] = RELATIONS.index(item["position"][0])
        count_B[b] = k
    center_BK2, radius_BK = _place(count_B, relation_B, rng)
    background_B6 = np.stack(
        [
            rng.uniform(0.10, 0.30, batch),  # tone at the center
            rng.choice([-0.12, 0.0, 0.12], batch),  # slope along x
            rng.choice([-0.12, 0.0, 0.12], batch),  # slope along y
            *(rng.choice([0.0, 0.05], (3, batch))),  # tint per channel
        ],
        axis=1,
    ).astype(np.float32)
    return SceneBatch(count_B, shape_BK, color_BK, texture_BK, center_BK2, radius_BK, background_B6, metadata)


def _place(count_B: np.ndarray, relation_B: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centers and radii without overlap; object 1 stands in relation `relation_B` (-1: none) to object 0."""
    batch = len(count_B)
    center = np.zeros((batch, MAX_OBJECTS, 2))
    radius = np.zeros((batch, MAX_OBJECTS))
    low = np.array([RADIUS[int(c)][0] for c in count_B])
    high = np.array([RADIUS[int(c)][1] for c in count_B])
    open_B = np.arange(batch)
    while len(open_B):
        n = len(open_B)
        r = rng.uniform(low[open_B, None, None], high[open_B, None, None], (n, _PROPOSALS, MAX_OBJECTS))
        r = np.round(r * LATTICE * 2) / (LATTICE * 2)
        margin = r + 1.0 / LATTICE
        xy = rng.uniform(size=(n, _PROPOSALS, MAX_OBJECTS, 2)) * (1 - 2 * margin[..., None]) + margin[..., None]
        xy = np.round(xy * LATTICE) / LATTICE
        ok = np.ones((n, _PROPOSALS), dtype=bool)
        count = count_B[open_B]
        for i, j in itertools.combinations(range(MAX_OBJECTS), 2):
            apart = np.abs(xy[:, :, i] - xy[:, :, j]).max(-1) >= r[:, :, i] + r[:, :, j] + _GAP
            ok &= apart | (count <= j)[:, None]
        offset = xy[:, :, 1] - xy[:, :, 0]
        along = np.stack([-offset[..., 0], offset[..., 0], -offset[..., 1], offset[..., 1]], axis=-1)
        relation = relation_B[open_B]
        wanted = np.take_along_axis(along, np.maximum(relation, 0)[:, None, None], axis=-1)[..., 0]
        # Well inside GenEval's 60 degree cone, so that the picture is not a borderline case, and composed as such a
        # photo would be: either object on its own side of the middle, the pair near the middle of the other axis.
        cross = np.where(relation < 2, 1, 0)[:, None, None, None]
        along_xy, across_xy = (np.take_along_axis(xy[:, :, :2], axis, -1)[..., 0] - 0.5 for axis in (1 - cross, cross))
        composed = (np.abs(across_xy.mean(-1)) < 0.1) & (along_xy.prod(-1) < 0.0)
        ok &= (composed & (wanted > 0.78 * np.linalg.norm(offset, axis=-1))) | (relation < 0)[:, None]
        found = ok.any(1)
        first = ok.argmax(1)
        rows = np.flatnonzero(found)
        center[open_B[rows]] = xy[rows, first[rows]]
        radius[open_B[rows]] = r[rows, first[rows]]
        open_B = open_B[~found]
    return center.astype(np.float32), radius.astype(np.float32)


def cells(world: SceneBatch, side: int) -> np.ndarray:
    """What covers each cell of a grid, (B, side * side, sum(NAMES)) float32: shares by shape, color and texture.

    An object covers its bounding box. Each of the three groups starts with the share that nothing covers and sums to 1.
    """
    edges = np.arange(side + 1) / side

    def overlap(axis: int) -> np.ndarray:  # (B, objects, side), in cells
        low = (world.center_BK2[..., axis] - world.radius_BK)[..., None]
        high = (world.center_BK2[..., axis] + world.radius_BK)[..., None]
        return np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0.0, None) * side

    cover_BKL = (overlap(1)[..., :, None] * overlap(0)[..., None, :]).reshape(*world.shape_BK.shape, -1)
    cover_BKL = cover_BKL * (np.arange(MAX_OBJECTS) < world.count_B[:, None])[..., None]
    groups = []
    for index_BK, names in zip((world.shape_BK, world.color_BK, world.texture_BK), NAMES, strict=True):
        share_BLn = np.einsum("bkl,bkn->bln", cover_BKL, np.eye(names)[index_BK + 1])
        share_BLn[..., 0] = 1.0 - cover_BKL.sum(1)
        groups.append(np.clip(share_BLn, 0.0, 1.0))
    return np.concatenate(groups, axis=-1).astype(np.float32)
