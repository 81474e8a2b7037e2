"""When held-out results are looked at, and what error each look may make.

A study is judged at least once. It may be judged again: on more held-out prompts, with finalists from further trials, or
with new timings if the old ones did not decide. Repeating until the verdict pleases would be wrong more often than 5 % if
each judgment could err by that much, so all judgments of a study share the 5 %.
"""

from __future__ import annotations

from tuner.statistics.bounds import ALPHA

#: Held-out prompts before anything is verified (or the limit, if that is lower).
FIRST_CLAIM = 256
EARLY_ALPHA = 0.005
#: Error of the first judgment of a study, all its looks together. The rest of the 5 % is for later ones.
FIRST_ALPHA = 0.04
#: Share of what is left of a judgment's error that goes to the next finalist when they are judged one after another.
TURN_SHARE = 0.8


def looks(count: int, micro_batch: int) -> list[int]:
    """Numbers of held-out prompts at which finalists are looked at, multiples of the micro-batch up to the limit."""
    sizes = {count, *(-(-(FIRST_CLAIM // 4 << k) // micro_batch) * micro_batch for k in range(20))}
    return sorted(size for size in sizes if size <= count)


def judgement_alpha(extensions: int) -> float:
    """Error of the judgment after `extensions` earlier ones: 4 % for the first, then half of what is left each time."""
    return FIRST_ALPHA if extensions == 0 else (ALPHA - FIRST_ALPHA) / 2**extensions


def turn_shares(count: int) -> list[float]:
    """The share of a judgment's error of each of `count` finalists that are judged one after another until one is verified.

    They add up to 1 (weighted Bonferroni), so that the judgment errs no more often than if all were judged together. The first
    one, which is mostly the last one too, has most.
    """
    shares = [TURN_SHARE * (1 - TURN_SHARE) ** turn for turn in range(count)]
    return [*shares[:-1], 1 - sum(shares[:-1])] if shares else []


def claims(count: int, micro_batch: int, extensions: int = 0) -> dict[int, float]:
    """Looks at which a claim may be made -> the error it may make.

    `extensions` counts earlier judgments of the same study. The looks of a first judgment share its error; a later one makes
    claims only at its end.
    """
    error = judgement_alpha(extensions)
    if extensions:
        return {count: error}
    sizes = [size for size in looks(count, micro_batch) if size >= min(FIRST_CLAIM, count)]
    # The last look keeps at least half, however many come before it.
    early = min(EARLY_ALPHA, error / 2 / max(1, len(sizes) - 1))
    last = error - early * (len(sizes) - 1)
    return {size: last if size == sizes[-1] else early for size in sizes}
