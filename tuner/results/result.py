"""What a study found, as plain data: written to `study.json` in the run directory, re-read by export, `report` and `verify`.

No torch, no optuna here. Times are milliseconds for one image (batch 1) and include text encoding, all scales and decoding,
unless a name says otherwise. Every difference is candidate minus full schedule on the same prompts and seeds, signed so
that positive is better for the candidate, whatever the metric's direction; a *drop* is minus that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagevar.card_state import CardState
from stagevar.errors import UsageError
from stagevar.profile_sections import EngineSection
from tuner.config.quality import COMPOSITE, MetricLimit, limited, old_limits
from tuner.results.run_dir import STUDY_FILE

SCHEMA = 2
#: Fields that results of before did not have: left out where there is nothing to say.
_LATER = ("heldout_engine", "card")
#: Verdicts and their exit codes. "partial" is a study that Ctrl-C stopped before its picks were verified.
EXIT_CODES = {
    "verified": 0,
    "baseline_meets_budget": 0,
    "latency_only": 0,
    "dry_run": 0,
    "infeasible": 3,
    "failed": 4,
    "inconclusive": 5,
    "partial": 130,
}

#: Verdicts that rest on timings alone.
OF_TIME = ("latency", "gain")


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval. level: two-sided coverage. n: prompts (or samples) behind it."""

    mean: float
    low: float
    high: float
    n: int
    level: float = 0.95

    @property
    def signed_text(self) -> str:
        """ "-0.004 [-0.012, +0.004]"."""
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"

    @property
    def inverse(self) -> Interval:
        """Of 1 / x for an x of at least 0, whose inverse is infinite at 0."""
        return Interval(_inverse(self.mean), _inverse(self.high), _inverse(self.low), self.n, self.level)


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf


@dataclass(frozen=True)
class LatencyStats:
    """Latency of one schedule.

    samples_ms: every timed run in order, raw. median_ms, p90_ms: of these. low_ms, high_ms: two-sided 95 % bootstrap bounds
    of the median. ratio: latency over the full schedule's, from runs interleaved with it; None for the full schedule.
    drift_corrected_ms: ratio x the full schedule's median, the figure that the search ranks on (equals median_ms for the
    full schedule). warmup_runs: discarded runs before it settled; settled: three runs in a row agreed within 2 %.
    scale_ms: median of each scale's share, one per scale (0 where skipped), empty where scales were not timed.
    disturbed: why the samples may be wrong (throttling, other processes on the card), in words. card: what the card did
    before and after them, empty where it is not known.
    predicted: not timed but read off the table of step costs (tuner/evaluation/step_costs.py): no samples, no p90_ms, and the
    interval of the ratio is the table's error.
    """

    samples_ms: tuple[float, ...]
    median_ms: float
    p90_ms: float | None
    low_ms: float
    high_ms: float
    drift_corrected_ms: float
    ratio: Interval | None = None
    warmup_runs: int = 0
    settled: bool = True
    scale_ms: tuple[float, ...] = ()
    predicted: bool = False
    disturbed: tuple[str, ...] = ()
    card: tuple[CardState, ...] = ()

    @property
    def speedup(self) -> Interval | None:
        """How many times faster than the full schedule; None for the full schedule itself."""
        return None if self.ratio is None else self.ratio.inverse

    @property
    def speedup_text(self) -> str:
        """ "1.72x [1.70, 1.74]", or "1.00x" for the full schedule."""
        gain = self.speedup
        return "1.00x" if gain is None else f"{gain.mean:.2f}x [{gain.low:.2f}, {gain.high:.2f}]"


@dataclass(frozen=True)
class Verdict:
    """One constraint against the data.

    name: "latency", "gain", "drop:<metric>" or "floor:<metric>". limit: what it had to keep, in `unit`.
    value: the point estimate. bound: the confidence bound that decides. status: "met", "broken" or "open" (the interval
    straddles the limit); in the search, where nothing is proved, only the point estimate decides.
    """

    name: str
    limit: float
    unit: str
    value: float
    bound: float
    status: str


@dataclass(frozen=True)
class Verification:
    """A finalist (or the full schedule) re-measured: held-out prompts, round-robin latency.

    prompts: number of held-out prompts used, the first so many of StudyResult.heldout_prompts. values: raw value per
    metric and held-out prompt. differences: paired difference per metric. drop_upper: one-sided 95 % upper bound of the
    primary metric's drop. latency: round-robin samples. latency_upper_ms: one-sided 95 % upper bound. verdicts: per
    constraint. status: "verified", "broken" or "open" ("baseline" for the full schedule itself).
    """

    prompts: int
    values: dict[str, tuple[float, ...]]
    differences: dict[str, Interval]
    drop_upper: float | None
    latency: LatencyStats
    latency_upper_ms: float
    verdicts: tuple[Verdict, ...]
    status: str

    @property
    def times_open(self) -> bool:
        """Whether the timings did not decide; more prompts would not help then."""
        return any(v.status == "open" for v in self.verdicts if v.name in OF_TIME)


@dataclass(frozen=True)
class Candidate:
    """One distinct schedule.

    key: short hash of the expansion; equal keys are equal schedules. params: search-space values that gave it (empty for
    an enqueued preset outside the space). schedule: StageSchedule.to_dict(). steps: one mapping per scale
    (`stagevar.profile` spelling). accelerator: its name. source: "enqueued: <preset>" or "sampler". trial: first trial
    number. state: "complete", "failed" or "not measured" (too little memory, tried again on resume). latency: search
    measurement. values: raw value per metric (and "quality", the composite) and search prompt. differences: paired, per
    metric. verdicts: per constraint, point estimates. feasible: all verdicts met. skipped_scales: count.
    processed_tokens: token rows through the trunk, both branches. verification: None when it was not a finalist. error: one
    line when not complete. stopped_early: why it was judged on the first few search prompts only (statistics/pruning.py), None
    where all were used.
    """

    key: str
    params: dict[str, Any]
    schedule: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    accelerator: str
    source: str
    trial: int | None
    state: str
    skipped_scales: int
    processed_tokens: float
    latency: LatencyStats | None = None
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    differences: dict[str, Interval] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    feasible: bool = False
    verification: Verification | None = None
    error: str | None = None
    stopped_early: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it was judged on all search prompts."""
        return self.state == "complete" and self.stopped_early is None

    @property
    def final_latency(self) -> LatencyStats | None:
        """The round-robin measurement where there is one, else the search's."""
        return self.verification.latency if self.verification else self.latency

    @property
    def final_differences(self) -> dict[str, Interval]:
        """Held-out differences where there are any, else those on the search prompts."""
        return self.verification.differences if self.verification and self.verification.values else self.differences


@dataclass(frozen=True)
class Sample:
    """An image on disk: the prompt, its seed, the candidate's key and the PNG's path relative to the run directory."""

    prompt: str
    seed: int
    key: str
    path: str


@dataclass(frozen=True)
class Failure:
    """A trial that raised or was not measured: number, parameters and the error's first line."""

    trial: int
    params: dict[str, Any]
    error: str


@dataclass(frozen=True)
class StudyResult:
    """A finished or partial study.

    command: what reproduces it. created: UTC, ISO 8601. model: name. random_weights: then there is no quality anywhere.
    provenance: of the model (hashes, preset, source). versions: packages and commit. hashes: "model", "search_prompts",
    "heldout_prompts", "space", "constraints". device: name, kind, threads, dtype. engine: the one
    that deployment runs; engine_choice: why that one, and what was found of the others. heldout_engine: the one that drew
    held-out images; None in runs of before, which drew them eagerly.
    grids, chunks, pixels: of the model. includes: what one latency figure covers, in words.
    budget: as typed. budget_ms: resolved. limits: metrics of the quality with weight and max_drop, the primary one first;
    empty for random weights. The composite "quality" counts in allowances: -1 is one max_drop used up.
    higher_is_better: per metric. floors: metric -> smallest mean allowed. seed: study seed. micro_batch: images per batch
    in quality evaluation. search_prompts, heldout_prompts: texts; prompt i of either runs with its own seed in
    search_seeds, heldout_seeds. baseline: the full schedule. candidates: all others, in order of first trial.
    front: keys, fastest first, of non-dominated feasible-in-quality candidates (baseline included). picks: "pick" (what
    profile.yaml holds), "fastest", "balanced", "best_quality", "no_skip" (best verified without a skipped scale), each a
    key, only those that exist. verdict: a key of EXIT_CODES; exit_code, reason: one line. smallest_budget_ms: least
    latency with the quality constraints kept, when infeasible. nearest: keys nearest to feasible, then. stop_reason:
    why the search ended. trials: told, duplicates included. sampled: distinct schedules that were not enqueued.
    phases_s: seconds per phase. judged_on: number of held-out prompts of each judgement of this run, this one the last.
    settle_heldout: what --heldout must be for one more judgement to decide an inconclusive study, as "1152", or "512+640"
    where prompts have to be added to the earlier ones; None where prompts are not what is missing.
    search: how the search saved work, for the report: schedules stopped early and dropped, error of the step table,
    scales run and what each schedule alone had needed, seconds per ask, who proposed.
    """

    command: str
    created: str
    model: str
    random_weights: bool
    provenance: dict[str, Any]
    versions: dict[str, str]
    hashes: dict[str, str]
    device: dict[str, Any]
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
    baseline: Candidate
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
    search: dict[str, Any] = field(default_factory=dict)
    judged_on: tuple[int, ...] = ()
    settle_heldout: str | None = None
    heldout_engine: str | None = None
    schema: int = SCHEMA

    def candidate(self, key: str) -> Candidate:
        """A candidate, or the baseline, by key. Raises KeyError."""
        return next(c for c in (self.baseline, *self.candidates) if c.key == key)

    @property
    def pick(self) -> Candidate | None:
        """What profile.yaml holds; None when nothing was picked."""
        return self.candidate(self.picks["pick"]) if "pick" in self.picks else None

    @property
    def quality_weights(self) -> dict[str, float]:
        """Weight per metric."""
        return {limit.metric: limit.weight for limit in self.limits}

    @property
    def composite_floor(self) -> float:
        """The composite of a schedule that uses up every allowance; in results of schema 1 the allowed drop, negative."""
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
        """The inverse of `to_json`. Raises UsageError for anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"not a study result: {error}") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema not in (1, SCHEMA):
            raise UsageError(f"study result has schema {schema!r}, this version reads 1 and {SCHEMA}; rerun the study")
        try:
            return build(cls, _from_schema_1(data) if schema == 1 else data)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"study result is damaged: {error}") from None

    def save(self, run_dir: Path | str) -> Path:
        """Writes study.json whole or not at all; returns its path."""
        path = Path(run_dir) / STUDY_FILE
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, run_dir: Path | str) -> StudyResult:
        """Reads study.json of a run directory. Raises UsageError when there is none or it is damaged."""
        path = Path(run_dir) / STUDY_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UsageError(f"{path} cannot be read ({reason}); give the directory of a run") from None
        return cls.from_json(text)


def _from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """A result of schema 1, whose one limit was the composite's, in the form of schema 2."""
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


def record_of(value: Any) -> dict[str, object]:
    """A dataclass of this module as JSON data."""

    def without_later(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return {name: value for name, value in pairs if value or name not in _LATER}

    return to_plain(dataclasses.asdict(value, dict_factory=without_later))


def to_plain(value: Any) -> Any:
    """JSON data: tuples become lists, keys strings, non-finite numbers the strings "inf", "-inf" and "nan"."""
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def build(kind: Any, value: Any) -> Any:
    """Plain JSON data as `kind`: a dataclass of this module, tuple[X, ...], dict[str, X], X | None or a plain type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else build(next(a for a in args if a is not type(None)), value)
    if origin is tuple:
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(build(a, v) for a, v in zip(inner, value, strict=True))
    if origin is dict:
        return {k: build(args[1], v) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {min(unknown)!r}")
        return kind(**{k: build(hints[k], v) for k, v in value.items()})
    if kind is float:
        return float(value)
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.60} is not {kind.__name__}")
    return value
