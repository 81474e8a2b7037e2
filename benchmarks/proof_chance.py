"""How often a schedule is proved to keep a limit, and on how many held-out prompts, by what it truly loses.

    python -m benchmarks.proof_chance --heldout 512 1024 1536 --max-drop 0.02 --studies 300

Verdicts per prompt are drawn at random: a share of the prompts differs from the full schedule's, more of them by a loss than
by a gain if the schedule loses on average. They are looked at as a quick study looks at its first finalist, which has
TURN_SHARE of the error: proved at a claiming look, or given up where the lower bound is beyond the limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from tuner.statistics.bounds import ALPHA, drop_bounds
from tuner.statistics.looks import TURN_SHARE, claims, looks

#: Share of prompts that differ, and what the schedule truly loses.
CASES = ((0.02, 0.0), (0.05, 0.0), (0.05, 0.005), (0.1, 0.0), (0.1, 0.005))


def judged(differences_N: np.ndarray, max_drop: float, micro_batch: int) -> tuple[bool, int]:
    """Whether one finalist is proved, and the number of prompts after which it is decided or all are used."""
    count = differences_N.size
    errors = claims(count, micro_batch)
    for look in looks(count, micro_batch):
        seen_1N = differences_N[None, :look]
        if look in errors and drop_bounds(seen_1N, 1.0, TURN_SHARE * errors[look])[0][0] <= max_drop:
            return True, look
        if drop_bounds(seen_1N, 1.0, ALPHA)[1][0] > max_drop:
            return False, look
    return False, count


def chance(
    prompts: int, discordant: float, drop: float, max_drop: float, studies: int, micro_batch: int = 4
) -> tuple[float, float]:
    """Share of studies that prove the limit, and their mean number of prompts."""
    rng = np.random.default_rng(0)
    shares = [(discordant + drop) / 2, 1 - discordant, (discordant - drop) / 2]
    found = [
        judged(rng.choice([-1.0, 0.0, 1.0], p=shares, size=prompts), max_drop, micro_batch) for _ in range(studies)
    ]
    return float(np.mean([proved for proved, _ in found])), float(np.mean([used for _, used in found]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--heldout", type=int, nargs="+", default=[512, 1024, 1536])
    parser.add_argument("--max-drop", type=float, default=0.02)
    parser.add_argument("--studies", type=int, default=300)
    args = parser.parse_args(argv)
    print("| prompts that differ | true drop | " + " | ".join(f"proved of {n:,}, on" for n in args.heldout) + " |")
    print("|--:|--:|" + "--:|" * len(args.heldout))
    for discordant, drop in CASES:
        cells = [chance(n, discordant, drop, args.max_drop, args.studies) for n in args.heldout]
        row = " | ".join(f"{100 * proved:.0f} %, {used:,.0f}" for proved, used in cells)
        print(f"| {100 * discordant:g} % | {100 * drop:g} % | {row} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
