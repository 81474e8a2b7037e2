"""What callers ask for, made uniform: prompts, negative prompts and seeds, one per image, or an error that names the value.

One prompt is one prompt: a bare string never stands for its letters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from stagevar.errors import UsageError
from stagevar.sections import shown

#: Drawn seeds are below this, so that they fit every generator's integers.
_SEEDS = 2**63 - 1


def check_prompts(prompts: Any, what: str = "prompt") -> list[str]:
    """A list of prompts from one (str) or any iterable of str. Raises UsageError for anything else, and for none."""
    if isinstance(prompts, str):
        prompts = [prompts]
    elif not isinstance(prompts, Iterable) or isinstance(prompts, bytes | bytearray | Mapping):
        raise UsageError(f"{what}s {shown(prompts)} must be text or a list of texts")
    checked = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UsageError(f"{what} {index} is {shown(prompt)}; it must be text")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{what} {index} {shown(prompt)} holds half a character (a lone surrogate)") from None
        checked.append(str(prompt))
    if not checked:
        raise UsageError(f"no {what}s were given; pass text or a list of texts")
    return checked


def check_negatives(negative: Any, count: int) -> list[str] | None:
    """One negative prompt per image: None for the model's null text, one text for all, or a list of `count`.

    Raises:
        UsageError: for anything else.
    """
    if negative is None:
        return None
    checked = check_prompts(negative, "negative prompt")
    if isinstance(negative, str):
        return checked * count
    if len(checked) != count:
        raise UsageError(f"negative prompts must be one text or one per prompt: {count}, not {len(checked)}")
    return checked


def check_seeds(seeds: Any, count: int) -> list[int]:
    """One seed per image.

    Args:
        seeds: None counts up from 0, and a whole number from itself; a list, range, array or tensor of whole numbers
            holds one per image; a random generator (torch, numpy, random) draws them and is advanced by that.

    Raises:
        UsageError: for other kinds and lengths.
    """
    if seeds is None:
        return list(range(count))
    drawn = _drawn(seeds, count)
    if drawn is not None:
        return drawn
    if hasattr(seeds, "tolist"):  # numpy and torch, scalars too
        seeds = seeds.tolist()
    if isinstance(seeds, str | bytes | Mapping) or seeds is True or seeds is False:
        raise UsageError(f"seeds {shown(seeds)} must be a whole number, a list of them, or a generator")
    if not isinstance(seeds, Iterable):
        first = _seed(seeds, "seed")
        return [first + i for i in range(count)]
    checked: list[int] = []
    for index, seed in enumerate(itertools.islice(seeds, count + 1)):  # also of an endless iterator
        own = _drawn(seed, 1)
        checked.append(own[0] if own is not None else _seed(seed, f"seed {index}"))
    if len(checked) != count:
        given = f"{len(checked)}" if len(checked) < count else "more"
        raise UsageError(f"seeds must be one per prompt: {count}, not {given}")
    return checked


def _drawn(generator: Any, count: int) -> list[int] | None:
    """Seeds drawn from a generator of random numbers; None for anything that is none."""
    kind = f"{type(generator).__module__}.{type(generator).__name__}"
    if kind.startswith("torch.") and kind.endswith(".Generator"):
        import torch

        return torch.randint(_SEEDS, (count,), generator=generator, device=generator.device).tolist()
    if kind.startswith("numpy.random") and hasattr(generator, "integers"):
        return generator.integers(_SEEDS, size=count).tolist()
    if kind.startswith("numpy.random") and hasattr(generator, "randint"):
        return generator.randint(_SEEDS, size=count, dtype="int64").tolist()
    if kind.startswith("random.") and hasattr(generator, "randrange"):
        return [generator.randrange(_SEEDS) for _ in range(count)]
    return None


def _seed(value: Any, what: str) -> int:
    if (hasattr(value, "item") and getattr(value, "size", 1) in (1, ())) or hasattr(value, "numel"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            raise UsageError(f"{what} {shown(value)} must be one whole number") from None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{what} is {shown(value)}; it must be a whole number")
    return value
