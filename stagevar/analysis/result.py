"""What an analysis measured and what follows from it, as a value and as its files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stagevar.analysis.rules import Rules
from stagevar.errors import UsageError
from stagevar.files import write_text_atomically, writing
from stagevar.schedule import StageSchedule
from stagevar.statistics import resample_indices
from stagevar.yaml_files import read_yaml

SCHEMA = 1


@dataclass(frozen=True)
class Curve:
    """One figure per scale: mean over prompts and its two-sided bootstrap interval."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, values_NK: np.ndarray, confidence: float) -> Curve:
        means_RK = values_NK[resample_indices(len(values_NK))].mean(axis=1)
        tail = (1 - confidence) / 2
        low, high = np.quantile(means_RK, [tail, 1 - tail], axis=0)
        return cls(*(tuple(round(float(v), 6) for v in row) for row in (values_NK.mean(axis=0), low, high)))


@dataclass(frozen=True)
class Analysis:
    """What was measured, and what follows from it.

    Attributes:
        similarity: name -> curve of the partial image against the final one.
        missing: name -> upper bound of the part still missing.
        frequency: band -> energy change of the image at each scale, over the final image's energy in that band.
        guidance: branch -> measure -> curve: `divergence` (nats per token or bit, guided from the branch alone),
            `flips` (share of tokens or bits that are drawn differently with the same noise), `image` (1 - SSIM of the
            partial image).
        rank_ratio: energy -> scale side -> kept share of tokens per chunk.
        spectrum: per scale and chunk, the cumulative energy at 33 evenly spaced shares of the tokens.
        ablation: one row per first accelerated scale.
        proposal: the schedule that the rules give.
        reasons: why they give it.
        partials: uint8 (prompts shown, scales, H, W, 3).
    """

    model: str
    weights: str
    grids: tuple[tuple[int, int], ...]
    chunks: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rules: Rules
    similarity: dict[str, Curve]
    missing: dict[str, tuple[float, ...]]
    stage_of: dict[str, str]
    frequency: dict[str, Curve]
    guidance: dict[str, dict[str, Curve]]
    rank_ratio: dict[str, dict[str, list[float]]]
    spectrum: np.ndarray
    proposal: StageSchedule
    reasons: dict[str, str]
    ablation: list[dict[str, Any]] = field(default_factory=list)
    partials: np.ndarray | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain YAML data: everything but the pictures and the spectra."""
        return {
            "schema": SCHEMA,
            "kind": "stagevar-analysis",
            "model": self.model,
            "weights": self.weights,
            "scales": [list(grid) for grid in self.grids],
            "chunks": self.chunks,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "rules": dataclasses.asdict(self.rules),
            "proposal": self.proposal.to_dict(),
            "reasons": dict(self.reasons),
            "similarity": {
                name: {
                    **_curve(curve),
                    "decides": self.stage_of[name],
                    "missing_upper": list(self.missing.get(name, ())),
                }
                for name, curve in self.similarity.items()
            },
            "frequency": {name: _curve(curve) for name, curve in self.frequency.items()},
            "guidance": {b: {name: _curve(c) for name, c in curves.items()} for b, curves in self.guidance.items()},
            "ablation": self.ablation,
        }

    def rank_table(self) -> dict[str, object]:
        """The energy -> rank table in the format of stagevar/data/rank_ratio.json."""
        return {
            "what": f"kept tokens / tokens of {self.model} per kept-energy threshold, scale side and chunk of blocks "
            f"({self.chunks} chunks), mean over {len(self.prompts)} prompts; rank = floor(ratio * tokens) + 1",
            "source": "stagevar analyze",
            "remarks": ["random weights: of no use for quality"] if self.weights == "random" else [],
            "ratio": self.rank_ratio,
        }

    def save(self, directory: str | Path) -> list[Path]:
        """Writes analysis.yaml and rank_ratio.json. Raises UsageError when the folder cannot be written."""
        directory = Path(directory)
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            text = directory / "analysis.yaml"
            write_text_atomically(text, yaml.safe_dump(self.to_dict(), sort_keys=False, width=120, allow_unicode=True))
            table = directory / "rank_ratio.json"
            write_text_atomically(table, json.dumps(self.rank_table(), indent=1) + "\n")
        return [text, table]


def load_proposal(path: str | Path) -> StageSchedule:
    """The proposed schedule of an analysis.yaml. Raises UsageError for anything else."""
    data = read_yaml(path, "analysis")
    if not isinstance(data, dict) or data.get("kind") != "stagevar-analysis" or "proposal" not in data:
        raise UsageError(f"{path} is not an analysis.yaml; make one with `stagevar analyze`")
    return StageSchedule.from_dict(data["proposal"])


def _curve(curve: Curve) -> dict[str, list[float]]:
    return {"mean": list(curve.mean), "low": list(curve.low), "high": list(curve.high)}
