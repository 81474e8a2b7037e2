"""What a study found, as plain data: written to `study.json` in the run directory, read by export, `report` and `verify`.

No torch, no optuna here. Times are milliseconds for one image (batch 1), unless a name says otherwise; they include all
scales and decoding, and text encoding only where `includes` says so: features of T5, CLIP and Qwen2 are made beforehand.
Every difference is candidate minus full schedule on the same prompts and seeds, signed so that positive is better for the
candidate, whatever the metric's direction; a *drop* is minus that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from stagevar.errors import UsageError
from stagevar.profile.sections import EngineSection
from tuner.config.quality import COMPOSITE, MetricLimit, limited, old_limits
from tuner.results.candidate import Candidate, Failed, Failure, Measured, Sample
from tuner.results.codec import build, record_of
from tuner.results.run_dir import STUDY_FILE

SCHEMA = 2
#: Verdicts and their exit codes. `--effort instant` ends with "unverified"; a study that Ctrl-C stopped before its picks
#: were verified is "partial".
EXIT_CODES = {
    "verified": 0,
    "baseline_meets_budget": 0,
    "latency_only": 0,
    "dry_run": 0,
    "infeasible": 3,
    "failed": 4,
    "inconclusive": 5,
    "unverified": 5,
    "partial": 130,
}


class Agreement(TypedDict):
    """How predictions of one metric matched the measurements; None if there was nothing to rank."""

    schedules: int
    rank_correlation: float | None
    ceiling: float | None
    coverage: float
    bias: float


class PredictionFacts(TypedDict):
    """Which sensitivities were measured, what was proposed from them, and how well they predicted, per metric."""

    changes: int
    prompts: int
    measured: bool
    proposed: int
    trusted: bool
    metrics: dict[str, Agreement]


class SearchFacts(TypedDict, total=False):
    """How a search saved work; empty for a study without a search.

    Attributes:
        savings: its switches.
        stopped_early, dropped, predicted: counts of schedules.
        table_error: relative error of predicted ratios, from `table_checks` checks.
        prompts_run: images' worth of prompts.
        scales_run: scales that were run.
        scales_alone: scales that would have been run without sharing.
        ask_seconds: duration of every ask.
        waited_s: total wait for asks.
        proposing_at_the_end: the sampler.
        prediction: of the front.
        space: how much of the space was covered.
    """

    savings: dict[str, object]
    stopped_early: int
    dropped: int
    predicted: int
    table_error: float | None
    table_checks: int
    prompts_run: int
    scales_run: int | None
    scales_alone: int | None
    hypervolume: float
    ask_seconds: list[float]
    waited_s: float
    proposing_at_the_end: str
    prediction: PredictionFacts
    space: dict[str, Any]


class DamagedResult(UsageError):
    """A stored result that cannot be read; the evidence beside it may be whole."""


@dataclass(frozen=True)
class StudyResult:
    """A finished or partial study.

    Attributes:
        command: the command that reproduces it.
        created: UTC, ISO 8601.
        model: name.
        random_weights: whether the weights are made up; there are no quality figures then.
        provenance: of the model (hashes, preset, source).
        versions: packages and commit.
        hashes: "model", "search_prompts", "heldout_prompts", "space", "constraints".
        device: name, kind, threads, dtype.
        engine: the one that deployment runs.
        engine_choice: why that one, and what was found out about the others.
        heldout_engine: the one that drew held-out images; None in older runs, which drew them eagerly.
        grids, chunks, pixels: of the model.
        includes: what one latency figure covers, in words.
        budget: as typed.
        budget_ms: the budget in milliseconds.
        limits: metrics of the quality with weight and max_drop, the primary one first; empty for random weights. The
            composite "quality" counts in allowances: -1 is one max_drop used up.
        higher_is_better: per metric.
        floors: metric -> smallest mean allowed.
        seed: study seed.
        micro_batch: images per batch in quality evaluation.
        search_prompts, heldout_prompts: texts.
        search_seeds, heldout_seeds: the seed of each prompt.
        baseline: the full schedule.
        candidates: all others, in order of first trial.
        front: keys, fastest first, of non-dominated candidates that meet the quality limits (baseline included).
        picks: keys by role, only those that exist: "pick" (what profile.yaml holds), "fastest", "balanced",
            "best_quality", "no_skip" (best verified without a skipped scale).
        verdict: a key of EXIT_CODES.
        exit_code: of the command.
        reason: why, in one line.
        smallest_budget_ms: if infeasible, the least latency that keeps the quality limits.
        nearest: if infeasible, the keys nearest to feasible.
        stop_reason: why the search ended.
        trials: number of trials told to the sampler, duplicates included.
        sampled: number of distinct schedules that were not enqueued.
        phases_s: seconds per phase.
        judged_on: number of held-out prompts of each judgment of this run, the latest last.
        settle_heldout: the --heldout with which one more judgment decides an inconclusive study, such as "1152", or
            "512+640" if prompts must be added to the earlier ones; None if prompts are not what is missing.
        search: how the search saved work, for the report.
    """

    command: str
    created: str
    model: str
    random_weights: bool
    provenance: dict[str, object]
    versions: dict[str, str]
    hashes: dict[str, str]
    device: dict[str, object]
    engine: str
    includes: str
    grids: tuple[tuple[int, int], ...]
    chunks: int
    pixels: tuple[int, int]
    budget: str
    budget_ms: float
    limits: tuple[MetricLimit, ...]
    higher_is_better: dict[str, bool]
    floors: dict[str, float]
    seed: int
    micro_batch: int
    search_prompts: tuple[str, ...]
    search_seeds: tuple[int, ...]
    heldout_prompts: tuple[str, ...]
    heldout_seeds: tuple[int, ...]
    baseline: Measured | Failed
    candidates: tuple[Candidate, ...]
    front: tuple[str, ...]
    picks: dict[str, str]
    verdict: str
    exit_code: int
    reason: str
    stop_reason: str
    trials: int
    sampled: int
    phases_s: dict[str, float]
    failures: tuple[Failure, ...] = ()
    samples: tuple[Sample, ...] = ()
    smallest_budget_ms: float | None = None
    nearest: tuple[str, ...] = ()
    engine_choice: EngineSection | None = None
    search: SearchFacts = field(default_factory=SearchFacts)
    judged_on: tuple[int, ...] = ()
    settle_heldout: str | None = None
    heldout_engine: str | None = None
    schema: int = SCHEMA

    def candidate(self, key: str) -> Candidate:
        """A candidate, or the baseline, by key. Raises KeyError."""
        return next(c for c in (self.baseline, *self.candidates) if c.key == key)

    @property
    def pick(self) -> Measured | None:
        """What profile.yaml holds, a Finalist in every study that ran to its end; None if nothing was picked."""
        pick = self.candidate(self.picks["pick"]) if "pick" in self.picks else None
        return pick if isinstance(pick, Measured) else None

    @property
    def full_ms(self) -> float:
        """Median latency of the full schedule, NaN if it was not measured."""
        return math.nan if self.baseline.latency is None else self.baseline.latency.median_ms

    @property
    def measured(self) -> tuple[Measured, ...]:
        """The candidates that were judged, without the full schedule."""
        return tuple(c for c in self.candidates if isinstance(c, Measured))

    @property
    def quality_weights(self) -> dict[str, float]:
        """Weight per metric."""
        return {limit.metric: limit.weight for limit in self.limits}

    @property
    def composite_floor(self) -> float:
        """The composite of a schedule that uses up every allowance; in schema 1, minus the allowed drop."""
        if self.limits and self.limits[0].metric == COMPOSITE:
            return -(self.limits[0].max_drop or 0.0)
        return -sum(limit.weight for limit in limited(self.limits))

    def to_json(self) -> str:
        """Strict JSON, one line per top-level key. Non-finite numbers are the strings "inf", "-inf" and "nan"."""
        plain = record_of(self)
        lines = (f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in plain.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> StudyResult:
        """The inverse of `to_json`. Raises DamagedResult for any other text, UsageError for another schema."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise DamagedResult(f"not JSON: {error}") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema not in (1, SCHEMA):
            raise UsageError(f"study result has schema {schema!r}; this version reads 1 and {SCHEMA}: rerun the study")
        try:
            result: StudyResult = build(cls, _from_schema_1(data) if schema == 1 else data)
            return result
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DamagedResult(f"not a study result: {error}") from None

    def save(self, run_dir: Path | str) -> Path:
        """Writes study.json atomically; returns its path."""
        path = Path(run_dir) / STUDY_FILE
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, run_dir: Path | str) -> StudyResult:
        """Reads study.json of a run directory. Raises UsageError if it is missing, DamagedResult if it is damaged."""
        path = Path(run_dir) / STUDY_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UsageError(f"{path} cannot be read ({reason}); give the directory of a run") from None
        try:
            return cls.from_json(text)
        except DamagedResult as error:
            raise DamagedResult(f"{path} is damaged ({error}); the study's command writes it again") from None


def _from_schema_1(data: dict[str, Any]) -> dict[str, object]:
    """A result of schema 1, whose only limit was on the composite, in the form of schema 2."""
    limits = [dataclasses.asdict(m) for m in old_limits(data.pop("quality_weights"), data.pop("max_drop"))]

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        entries = {key: renamed(entry) for key, entry in value.items()}
        return (
            entries | {"name": f"drop:{COMPOSITE}"}
            if {"name", "bound"} <= entries.keys() and entries["name"] == "drop"
            else entries
        )

    return {**renamed(data), "limits": limits, "schema": SCHEMA}
