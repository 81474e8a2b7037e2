"""How many tokens a scale needs to keep a share of its energy: the table behind rank-by-energy schedules.

A table gives, per kept energy (cumulative share of squared singular values), scale side and chunk of blocks, the ratio of
rank to tokens; rank = floor(ratio * tokens) + 1. The published table covers Infinity's sides 40, 48, 64 with 8 chunks;
`stagevar analyze --ranks` writes one for any model.

Source: sen-mao/FasterVAR, Infinity/infinity/utils/rank_ratio.py (the numbers in data/rank_ratio.json). Other sides take
the nearest side's row and other chunk counts are linearly resampled: our choice, stated because the reference fails there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

import numpy as np

from stagevar.errors import ScheduleError

#: energy -> side -> ratio per chunk
RankTable = Mapping[str, Mapping[str, Sequence[float]]]


@cache
def published_table() -> RankTable:
    """The released code's table."""
    table: RankTable = json.loads((files("stagevar") / "data" / "rank_ratio.json").read_text())["ratio"]
    return table


def ratios_for_energy(energy: float, tokens: int, chunks: int, table: RankTable | None = None) -> tuple[float, ...]:
    """Rank ratio per chunk that keeps a share of the energy at a scale of `tokens` tokens.

    Raises:
        ScheduleError: if the table has no row for that energy; the message names the nearest.
    """
    table = table or published_table()
    key = next((k for k in table if abs(float(k) - energy) < 1e-9), None)
    if key is None:
        near = min(table, key=lambda k: abs(float(k) - energy))
        raise ScheduleError(f"energy {energy} is not in the rank table; nearest: {near}")
    rows = table[key]
    side = min(rows, key=lambda s: abs(int(s) ** 2 - tokens))
    row = rows[side]
    if chunks == len(row):
        return tuple(row)
    if chunks == 1:  # resampling to one point would take the first chunk's, by far the smallest
        return (float(np.mean(row)),)
    return tuple(np.interp(np.linspace(0, 1, chunks), np.linspace(0, 1, len(row)), row).tolist())


def rank(ratio: float, tokens: int) -> int:
    """floor(ratio * tokens) + 1, at most the number of tokens."""
    return min(int(ratio * tokens) + 1, tokens)
