"""What `stagevar analyze` found about a model, as changes to its search space: boundaries, ranks, first proposals. No torch.

The rank table becomes explicit shares per chunk of blocks, so that the study and its profile need no table.

Source: StageVAR (arXiv 2512.16483) for ranks by kept energy; which energies are tried first is ours.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagevar.errors import ScheduleError, StagevarError, UsageError
from stagevar.schedule import StageSchedule
from stagevar.schedule.grids import Grid
from stagevar.text_files import read_json
from stagevar.yaml_files import read_yaml

FILE, TABLE_FILE, KIND, SCHEMA = "analysis.yaml", "rank_ratio.json", "stagevar-analysis", 1
#: Kept energies of the rank table that are proposed besides the analysis's own choice: the paper's, and two below it.
_ENERGIES = ("0.96", "0.85", "0.70")
#: A share nearer than this to one that is searched already adds nothing.
_SAME = 0.05


@dataclass(frozen=True)
class Findings:
    """A finished analysis.

    Attributes:
        path: its file.
        model: the analyzed model.
        weights: its weights, "random" for made-up ones.
        grids: token grids of its scales.
        proposal: the schedule that the analysis proposes.
        table: kept energy -> scale side -> kept share of the tokens per chunk; empty if there is no table.
    """

    path: Path
    model: str
    weights: str
    grids: tuple[Grid, ...]
    proposal: StageSchedule
    table: Mapping[str, Mapping[str, Sequence[float]]]

    def check(self, model: str, weights: str | None, grids: Sequence[Grid] | None) -> None:
        """Checks that the analysis is of the model that is tuned.

        Args:
            model: the model to tune.
            weights: its weights.
            grids: its grids at the requested resolution, None if they are unknown before the model is loaded.

        Raises:
            UsageError: if another model, another resolution or random weights were analyzed.
        """
        if self.model != model:
            raise UsageError(f"analysis {self.path} is of model {self.model!r}, not {model!r}")
        if self.weights == "random" and weights != "random":
            raise UsageError(
                f"analysis {self.path} is of random weights, which say nothing about real ones; "
                "analyze the weights that you tune"
            )
        if grids is not None and self.grids != tuple(grids):
            raise UsageError(
                f"analysis {self.path} has {_scales(self.grids)}, but {model} has {_scales(grids)} here; "
                "analyze it at the --resolution that you tune"
            )

    def applied(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """A space's data with the boundaries, searched shares and proposals of the analysis."""
        start = self.proposal.semantic_end
        parameters = dict(data["parameters"])
        parameters["structure_end"] = {"low": max(1, start), "high": len(self.grids) - 1}
        if isinstance(parameters.get("rank_ratio"), list):
            parameters["rank_ratio"] = _with_shares(parameters["rank_ratio"], self._shares())
        proposals = {name: schedule.to_dict() for name, schedule in self.proposals().items()}
        proposals |= {name: one for name, one in (data.get("proposals") or {}).items() if name not in proposals}
        return {**data, "semantic_end": start, "parameters": parameters, "proposals": proposals}

    def proposals(self) -> dict[str, StageSchedule]:
        """The proposed schedule, and variants with ranks for other kept energies if it reduces tokens."""
        found = {"analysis": self.proposal}
        first = self.proposal.structure_end
        for energy in _ENERGIES:
            rows = self.table.get(energy)
            if rows is None or first >= len(self.grids):
                continue
            ratios = tuple(tuple(rows[side]) for side in map(_side, self.grids[first:]))
            found[f"analysis-{energy}"] = dataclasses.replace(self.proposal, rank_ratios=ratios, energy=None)
        return found

    def _shares(self) -> list[float]:
        """Mean kept share at the first accelerated scale, per proposal that reduces tokens."""
        rows = [schedule.rank_ratios[0] for schedule in self.proposals().values() if schedule.rank_ratios]
        means = [sum(row) / len(row) if isinstance(row, tuple) else row for row in rows]
        return [round(mean, 3) for mean in means if 0.001 <= mean <= 1]


def _with_shares(searched: Sequence[float], found: Sequence[float]) -> list[float]:
    shares = list(searched)
    for share in found:
        if all(abs(share - other) > _SAME * share for other in shares):
            shares.append(share)
    return sorted(shares)


def _side(grid: Grid) -> str:
    """A grid's key in a rank table: the side of the square with as many tokens."""
    return str(round(math.sqrt(grid[0] * grid[1])))


def _scales(grids: Sequence[Grid]) -> str:
    return f"{len(grids)} scales of side {' '.join(_side(grid) for grid in grids)}"


def read_analysis(path: Path | str) -> Findings:
    """The analysis in a folder, or in an analysis.yaml. Raises UsageError in one line for anything wrong with it."""
    file = Path(path)
    if os.path.isdir(file):
        file = file / FILE
    try:
        data = read_yaml(file, "analysis")
    except UsageError:
        raise
    except StagevarError as error:
        raise UsageError(f"{error}; make one with `stagevar analyze`") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UsageError(f"{file} is not an {FILE}; make one with `stagevar analyze`")
    if data.get("schema") != SCHEMA:
        raise UsageError(
            f"analysis {file} has schema {data.get('schema')!r:.40}, not {SCHEMA}; run `stagevar analyze` again"
        )
    grids = _grids(data.get("scales"), file)
    try:
        proposal = StageSchedule.from_dict(data.get("proposal"))
        proposal.expand(grids, _count(data.get("chunks"), file))
    except ScheduleError as error:
        raise UsageError(f"analysis {file}: proposal: {error}") from None
    table_file = file.with_name(TABLE_FILE)
    table = _table(read_json(table_file, "rank table"), grids, table_file) if table_file.exists() else {}
    return Findings(file, str(data.get("model")), str(data.get("weights")), grids, proposal, table)


def _count(chunks: Any, file: Path) -> int:
    if type(chunks) is not int or chunks < 1:
        raise UsageError(f"analysis {file}: chunks {chunks!r:.40} must be a whole number of at least 1")
    return chunks


def _grids(scales: Any, file: Path) -> tuple[Grid, ...]:
    pairs = isinstance(scales, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(side) is int and side >= 1 for side in pair)
        for pair in scales
    )
    if not pairs or len(scales) < 2:
        raise UsageError(f"analysis {file}: scales {scales!r:.40} must be at least two pairs of height and width")
    return tuple((height, width) for height, width in scales)


def _table(data: Any, grids: Sequence[Grid], file: Path) -> dict[str, dict[str, list[float]]]:
    """The rows of a rank table that are used. Raises UsageError if one lacks a scale or holds no shares."""
    ratio = data.get("ratio") if isinstance(data, dict) else None
    if not isinstance(ratio, dict):
        raise UsageError(f"{file} is not a rank table: it has no 'ratio' per kept energy; run `stagevar analyze` again")
    for energy in _ENERGIES:
        rows = ratio.get(energy)
        if rows is None:
            continue
        for side in map(_side, grids):
            row = rows.get(side) if isinstance(rows, dict) else None
            if not isinstance(row, list) or not row or not all(type(v) in (int, float) and 0 <= v <= 1 for v in row):
                raise UsageError(f"{file}: energy {energy} has no shares from 0 to 1 for the scale of side {side}")
    return ratio
