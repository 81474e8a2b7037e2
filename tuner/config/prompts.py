"""The prompts of a study: a search set that ranks schedules and a disjoint held-out set that verifies them.

Both are cut once into fixed micro-batches, the unit of work: every worker runs a micro-batch in the same shapes, so results
do not depend on which one does. Each prompt has its own seed; a (prompt, seed) pair never appears in both sets.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagevar.errors import UsageError
from stagevar.prompts.prompt_files import read_prompt_file
from stagevar.prompts.seeds import non_negative
from tuner.config.space import PromptSource
from tuner.metrics.base import Prompt, prompt_text

#: Seeds of the held-out set start here, so that a text in both sets is drawn with different noise.
HELDOUT_SEED = 1_000_000


@dataclass(frozen=True)
class PromptSet:
    """Prompts (captions or GenEval metadata), one seed each, cut into batches of `micro_batch`."""

    items: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    micro_batch: int

    def __len__(self) -> int:
        return len(self.items)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(prompt_text(item) for item in self.items)

    @property
    def batches(self) -> int:
        return -(-len(self.items) // self.micro_batch)

    def first(self, count: int) -> PromptSet:
        """The first `count` prompts, in the same batches."""
        return PromptSet(self.items[:count], self.seeds[:count], self.micro_batch)

    def batch(self, index: int) -> tuple[tuple[Prompt, ...], tuple[int, ...]]:
        """Prompts and seeds of one micro-batch; the last may be smaller."""
        part = slice(index * self.micro_batch, (index + 1) * self.micro_batch)
        return self.items[part], self.seeds[part]

    @property
    def digest(self) -> str:
        """SHA-256 of texts, metadata, seeds and micro-batch size."""
        text = json.dumps([self.items, self.seeds, self.micro_batch], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def load_prompts(source: PromptSource, seed: int = 0) -> dict[str, PromptSet]:
    """{"search": ..., "heldout": ...} of a source.

    "geneval" generates as many distinct prompts as requested, its six tasks in turn. A file, or the 1000 class indices of
    "imagenet", is shuffled by `seed`, put in order so that its tasks take turns, and split. If it has too few prompts, the
    held-out set shrinks; if that would leave less than half to hold out, so does the search set. The sets never overlap.

    A larger held-out set begins with the smaller one, and the search set stays the same. The order of "geneval" depends on
    how many prompts each task has, so there this is true only of prompts requested as `added`.

    Raises UsageError for a file that cannot be read, is empty, or holds only one prompt.
    """
    if source.source == "nano":
        from stagevar.models.nano.scenes import prompts

        search: Sequence[Prompt]
        heldout: Sequence[Prompt]
        drawn = non_negative(seed)
        search, heldout = prompts("search", source.search, drawn), prompts("heldout", source.heldout, drawn)
    else:
        if source.source == "geneval":
            from tuner.metrics.prompt_sets import generate

            made = generate(source.search + source.heldout, seed)
            ends = [len(made) - sum(source.added[i:]) for i in range(len(source.added) + 1)]
            items: list[Prompt] = []
            for end in ends:
                items += in_turn(made[len(items) : end])
        else:
            items = [str(i) for i in range(1000)] if source.source == "imagenet" else read_prompts(source.source)
            random.Random(seed).shuffle(items)
            items = in_turn(items)
        searched, held = _sizes(source, len(items))
        search, heldout = items[:searched], items[searched : searched + held]
    return {
        "search": _seeded(search, seed, source.micro_batch),
        "heldout": _seeded(heldout, seed + HELDOUT_SEED, source.micro_batch),
    }


def set_sizes(source: PromptSource) -> tuple[int, int]:
    """How many prompts `load_prompts` will use for the search and hold out.

    Raises UsageError for a file that cannot be read or holds only one prompt.
    """
    if source.source in ("nano", "geneval"):
        return source.search, source.heldout
    return _sizes(source, 1000 if source.source == "imagenet" else len(read_prompts(source.source)))


def warn_of_short_files(source: PromptSource) -> None:
    """Warns if a file is too short for the requested search set."""
    search, heldout = set_sizes(source)
    if search < source.search:
        warnings.warn(
            f"{source.source:.200} holds {search + heldout} prompts: {search} for the search, {heldout} held out for "
            f"verification ({source.search} and {source.heldout} were requested)"
        )


def _sizes(source: PromptSource, count: int) -> tuple[int, int]:
    """How `count` prompts are divided: the search gets what it asks for, but never more than half."""
    if count < 2:
        raise UsageError(
            f"{source.source} holds {count} prompt; add more: a study needs some to search with and others to verify on"
        )
    search = min(source.search, count // 2)
    return search, min(source.heldout, count - search)


def in_turn(items: Sequence[Prompt]) -> list[Prompt]:
    """Prompts ordered so that every stretch has GenEval's tasks in their overall proportions; unchanged if they have no tags.

    A comparison on the first few prompts then weighs the tasks as the whole set does.
    """
    counts: dict[str, int] = {}
    tags = [str(item.get("tag", "")) if isinstance(item, Mapping) else "" for item in items]
    total = Counter(tags)
    places = []
    for tag in tags:
        places.append((counts.get(tag, 0) + 0.5) / total[tag])
        counts[tag] = counts.get(tag, 0) + 1
    return [items[i] for i in sorted(range(len(items)), key=lambda i: places[i])]


def _seeded(items: Sequence[Prompt], first: int, micro_batch: int) -> PromptSet:
    return PromptSet(tuple(items), tuple(range(first, first + len(items))), micro_batch)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Distinct prompts of a file, see `prompt_lines`."""
    return [prompt for _, prompt in prompt_lines(path)]


def prompt_lines(path: str | Path) -> list[tuple[int, Prompt]]:
    """Distinct prompts of a file in any form that `stagevar.prompts.prompt_files` reads, with line numbers counted from 1.

    A prompt is a caption, or a mapping if the file says more about it. Raises UsageError, naming the line, for a file that
    cannot be read, holds no prompts, or has an entry that is not one.
    """
    found: dict[str, tuple[int, Prompt]] = {}
    for entry in read_prompt_file(path):
        found.setdefault(entry.text, (entry.line, entry.metadata if entry.fields else entry.text))
    return list(found.values())
