"""When held-out prompts are looked at, and what error each look may make."""

from __future__ import annotations

from tuner.stats import ALPHA

#: Held-out prompts before which none is verified (or the limit, if that is lower).
FIRST_CLAIM = 256
EARLY_ALPHA = 0.005


def looks(count: int, micro_batch: int) -> list[int]:
    """Numbers of held-out prompts at which finalists are looked at, multiples of the micro-batch up to the limit."""
    sizes = {count, *(-(-(FIRST_CLAIM // 4 << k) // micro_batch) * micro_batch for k in range(20))}
    return sorted(size for size in sizes if size <= count)


def claims(count: int, micro_batch: int) -> dict[int, float]:
    """Looks at which a claim may be made -> the error it may make; they share the 5 %."""
    sizes = [size for size in looks(count, micro_batch) if size >= min(FIRST_CLAIM, count)]
    last = ALPHA - EARLY_ALPHA * (len(sizes) - 1)
    return {size: last if size == sizes[-1] else EARLY_ALPHA for size in sizes}
