"""One schedule of a study and its measurements, as plain data.

Every difference is candidate minus full schedule on the same prompts and seeds, signed so that positive is better for the
candidate, whatever the metric's direction; a *drop* is minus that.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, TypeVar

from stagevar.card_state import CardState
from stagevar.profile import StepData
from tuner.config.parameters import Value

#: Verdicts that rest on timings alone.
OF_TIME = ("latency", "gain")

Outcome = TypeVar("Outcome", bound="Candidate")


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval of two-sided coverage `level`, from `n` prompts or samples."""

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
        """The interval of 1 / x, for x of at least 0; the inverse of 0 is infinite."""
        return Interval(_inverse(self.mean), _inverse(self.high), _inverse(self.low), self.n, self.level)


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf


@dataclass(frozen=True)
class LatencyStats:
    """Latency of one schedule.

    Attributes:
        samples_ms: every timed run in order, raw.
        median_ms, p90_ms: of the samples.
        low_ms, high_ms: two-sided 95 % bootstrap bounds of the median.
        ratio: latency over the full schedule's, from runs interleaved with it; None for the full schedule.
        drift_corrected_ms: ratio x the full schedule's median, the figure that the search ranks on; median_ms for the full
            schedule.
        warmup_runs: runs discarded before it settled.
        settled: whether three runs in a row agreed within 2 %.
        scale_ms: median time of each scale (0 if skipped), empty if scales were not timed.
        disturbed: why the samples may be wrong (throttling, other processes on the card), in words.
        card: what the card did before and after them, empty if unknown.
        predicted: whether it was not timed but read from the table of step costs (tuner/evaluation/step_costs.py): no
            samples, no p90_ms, and the interval of the ratio is the table's error.
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
    def share(self) -> float:
        """Latency over the full schedule's; 1 for the full schedule itself."""
        return self.against_full.mean

    @property
    def against_full(self) -> Interval:
        """`ratio`, and 1 for the full schedule itself."""
        return Interval(1.0, 1.0, 1.0, len(self.samples_ms)) if self.ratio is None else self.ratio

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

    Attributes:
        name: "latency", "gain", "drop:<metric>" or "floor:<metric>".
        limit: what it had to keep, in `unit`.
        value: the point estimate.
        bound: the confidence bound that decides.
        status: "met", "broken" or "open" (the interval straddles the limit). In the search, where nothing is proved, the
            point estimate alone decides.
    """

    name: str
    limit: float
    unit: str
    value: float
    bound: float
    status: str


@dataclass(frozen=True)
class Verification:
    """A finalist, or the full schedule, measured again: held-out prompts, round-robin latency.

    Attributes:
        prompts: number of held-out prompts used, the first ones of StudyResult.heldout_prompts.
        values: raw value per metric and held-out prompt.
        differences: paired difference per metric.
        drop_upper: one-sided 95 % upper bound of the primary metric's drop.
        latency: round-robin samples.
        latency_upper_ms: one-sided 95 % upper bound.
        verdicts: one per constraint.
        status: "verified", "broken" or "open"; "baseline" for the full schedule itself.
        error_share: the share of the judgment's error that claims about this finalist may make, if finalists are judged one
            after another; None if they are judged together.
        proved_by: the run whose proof of the quality stands; None if this study judged it.
    """

    prompts: int
    values: dict[str, tuple[float, ...]]
    differences: dict[str, Interval]
    drop_upper: float | None
    latency: LatencyStats
    latency_upper_ms: float
    verdicts: tuple[Verdict, ...]
    status: str
    error_share: float | None = None
    proved_by: str | None = None

    @property
    def passed_over(self) -> bool:
        """Whether it was not judged because another finalist was verified before its turn."""
        return self.error_share is not None and self.status == "open" and not self.prompts and not self.times_open

    @property
    def times_open(self) -> bool:
        """Whether the timings were inconclusive, in which case more prompts would not help."""
        return any(v.status == "open" for v in self.verdicts if v.name in OF_TIME)


@dataclass(frozen=True)
class Candidate:
    """One distinct schedule. Its class says what became of it: Failed, Unmeasured, Measured, Pruned or Finalist.

    Args:
        key: short hash of the expansion; equal keys are equal schedules.
        params: search-space values that produced it; empty for an enqueued preset outside the space.
        schedule: StageSchedule.to_dict().
        steps: one mapping per scale (`stagevar.profile` spelling).
        accelerator: its name.
        source: "enqueued: <preset>", "predicted" (by sensitivities) or "sampler".
        trial: first trial number; None for the full schedule, which is no trial.
        skipped_scales: count.
        processed_tokens: token rows through the trunk, both branches.
    """

    state: ClassVar[str] = "proposed"

    key: str
    params: dict[str, Value]
    schedule: dict[str, object]
    steps: tuple[StepData, ...]
    accelerator: str
    source: str
    trial: int | None
    skipped_scales: int
    processed_tokens: float

    def becomes(self, kind: type[Outcome], **found: Any) -> Outcome:
        """The same schedule as an outcome of class `kind`, with what was found."""
        names = {field.name for field in dataclasses.fields(kind)} - found.keys()
        known: dict[str, object] = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return kind(**{**known, **found})

    @property
    def trial_number(self) -> int:
        """First trial number, -1 for the full schedule."""
        return -1 if self.trial is None else self.trial

    @property
    def final_latency(self) -> LatencyStats | None:
        """The round-robin measurement if there is one, else the search's, else None."""
        return None

    @property
    def final_differences(self) -> dict[str, Interval]:
        """Held-out differences if there are any, else those on the search prompts."""
        return {}

    @property
    def final_verdicts(self) -> tuple[Verdict, ...]:
        """The verification's verdicts if there was one, else the search's, by point estimates."""
        return ()


@dataclass(frozen=True)
class Failed(Candidate):
    """A schedule that raised.

    Attributes:
        error: one line.
        latency: what was timed before it raised; only the full schedule has that.
    """

    state: ClassVar[str] = "failed"

    error: str
    latency: LatencyStats | None = None


@dataclass(frozen=True)
class Unmeasured(Candidate):
    """A schedule that ran out of memory, as the line `error` says, to be tried again on resume."""

    state: ClassVar[str] = "not measured"

    error: str


@dataclass(frozen=True)
class Measured(Candidate):
    """A schedule that was judged in the search; the full schedule too.

    Args:
        latency: the search's measurement.
        values: raw value per metric (and "quality", the composite) and search prompt; empty for random weights.
        differences: paired, per metric.
        verdicts: per constraint, by point estimates.
        feasible: whether all verdicts are met and all search prompts were seen.
    """

    state: ClassVar[str] = "complete"

    latency: LatencyStats
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    differences: dict[str, Interval] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    feasible: bool = False

    @property
    def fully_evaluated(self) -> bool:
        """Whether it was judged on all search prompts."""
        return True

    @property
    def final_latency(self) -> LatencyStats:
        return self.latency

    @property
    def final_differences(self) -> dict[str, Interval]:
        return self.differences

    @property
    def final_verdicts(self) -> tuple[Verdict, ...]:
        return self.verdicts


@dataclass(frozen=True)
class Pruned(Measured):
    """A schedule judged on the first few search prompts only; `stopped_early` says why (statistics/pruning.py)."""

    _: KW_ONLY
    stopped_early: str

    @property
    def fully_evaluated(self) -> bool:
        return False


@dataclass(frozen=True)
class Finalist(Measured):
    """A schedule, or the full one, that was measured again on held-out prompts, whatever that proved."""

    _: KW_ONLY
    verification: Verification

    @property
    def final_latency(self) -> LatencyStats:
        return self.verification.latency

    @property
    def final_differences(self) -> dict[str, Interval]:
        return self.verification.differences if self.verification.values else self.differences

    @property
    def final_verdicts(self) -> tuple[Verdict, ...]:
        return self.verification.verdicts


def verification_of(candidate: Candidate | None) -> Verification | None:
    """The verification of a finalist; None for any other candidate."""
    return candidate.verification if isinstance(candidate, Finalist) else None


@dataclass(frozen=True)
class Sample:
    """An image on disk: the prompt, its seed, the candidate's key and the PNG's path relative to the run directory."""

    prompt: str
    seed: int
    key: str
    path: str


@dataclass(frozen=True)
class Failure:
    """A trial that raised or was not measured: its number, parameters and the first line of the error."""

    trial: int
    params: dict[str, Value]
    error: str
