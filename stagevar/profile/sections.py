"""The sections of a deployment profile, each a frozen dataclass that knows its fields' types.

A field that may be absent has a default. Figures are None if a measurement gave none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stagevar.models.request import ModelRequest
from stagevar.sections import read_section, shown

if TYPE_CHECKING:
    from stagevar.models.base import Sampling


@dataclass(frozen=True)
class LoadOptions:
    """Options of `load_model` that load the same model again."""

    resolution: str | int | None = None
    ratio: float | None = None
    kv_cache: str | None = None


@dataclass(frozen=True)
class TextSection:
    """A large text encoder: its repository with the revision, or SHA-256 of each file of a local folder."""

    repo: str | None = None
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, object]) -> TextSection:
        """What a loaded model says of its encoder; where the folder lies does not matter."""
        known = {f.name for f in dataclasses.fields(cls)}
        return read_section(cls, {name: value for name, value in record.items() if name in known}, "model.text")

    def __str__(self) -> str:
        if self.repo is not None:
            return f"{self.repo}@{self.revision}" if self.revision else self.repo
        return ", ".join(f"{name} {digest}" for name, digest in sorted(self.sha256.items()))

    def same_as(self, other: TextSection) -> bool | None:
        """Whether both are the same encoder; None if one is a repository and the other one files."""
        if (self.repo is None) != (other.repo is None):
            return None
        mine, others = ((one.repo, one.revision, sorted(one.sha256.values())) for one in (self, other))
        return mine == others


@dataclass(frozen=True)
class ModelSection:
    """Which model: registered name, image [height, width] in pixels, SHA-256 per part, options to load it.

    Attributes:
        text: the large text encoder; None in older profiles, and for models that have none.
    """

    name: str
    pixels: tuple[int, ...] = ()
    random_weights: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)
    load: LoadOptions = field(default_factory=LoadOptions)
    text: TextSection | None = None

    @property
    def request(self) -> ModelRequest:
        """What loads the same model again: its public files, and the options that the profile states."""
        return ModelRequest(
            self.name, resolution=self.load.resolution, ratio=self.load.ratio, kv_cache=self.load.kv_cache
        )


@dataclass(frozen=True)
class SamplingSection:
    """What the model samples with: guidance and temperature per scale, top_k, top_p."""

    guidance: tuple[float, ...] = ()
    temperature: tuple[float, ...] = ()
    top_k: int | None = None
    top_p: float | None = None

    def differences(self, other: Sampling) -> list[str]:
        """What a model samples with otherwise, one phrase each; what the profile does not state is left out."""
        found = []
        for name in ("guidance", "temperature", "top_k", "top_p"):
            here, there = getattr(self, name), getattr(other, name)
            if here not in (None, ()) and here != there:
                found.append(f"{name} {_brief(there)} instead of {_brief(here)}")
        return found


def _brief(value: Any) -> str:
    """A number, or one per scale, for a message: once if all are equal."""
    if isinstance(value, tuple):
        return _brief(value[0]) if len(set(value)) == 1 else shown([float(f"{one:.4g}") for one in value])
    return f"{value:.6g}" if isinstance(value, float) else shown(value)


@dataclass(frozen=True)
class IntervalSection:
    """An estimate with its bootstrap interval [low, high].

    Attributes:
        level: two-sided coverage.
        n: number of samples behind it.
    """

    mean: float | None
    interval: tuple[float | None, ...] = ()
    level: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class LatencySection:
    """One image's latency in milliseconds.

    Attributes:
        includes: what the figure covers, in words.
        predicted: whether it comes from the table of step costs instead of an end-to-end timing.
        ratio: over the full schedule's latency in the same rounds.
        disturbed: why the figures may be wrong even after a repeat (throttling, other processes on the card), in words.
    """

    includes: str | None = None
    batch: int | None = None
    ms: float | None = None
    median_ms: float | None = None
    p90_ms: float | None = None
    interval_ms: tuple[float | None, ...] = ()
    runs: int | None = None
    warmed: bool | None = None
    predicted: bool | None = None
    ratio: IntervalSection | None = None
    scale_ms: tuple[float | None, ...] = ()
    samples_ms: tuple[float, ...] = ()
    disturbed: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardSection:
    """The card that latency was measured on, as NVML sees it: its settings, and its state after the last timing.

    Attributes:
        driver: version of the driver.
        power_limit_w: the enforced limit.
        mig: whether it is a slice of a card.
        sm_mhz, memory_mhz, temperature_c: under load.
    """

    driver: str
    power_limit_w: float
    mig: bool
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None

    def differences(self, other: CardSection) -> list[str]:
        """Settings that differ on another card, one phrase each; clocks and temperature vary anyway and are left out."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in ("driver", "power_limit_w", "mig"))
        return [f"{name} {there!r} instead of {here!r}" for name, here, there in pairs if here != there]


@dataclass(frozen=True)
class BaselineSection(LatencySection):
    """The full schedule's latency, and the profile's speed-up over it."""

    schedule: str | None = None
    speedup: IntervalSection | None = None


@dataclass(frozen=True)
class MetricSection:
    """One metric of the quality.

    Attributes:
        unit, kind: as declared.
        weight: in the composite.
        max_drop: allowed mean paired drop; None for a metric that only ranks.
        drop_upper: one-sided 95 % bound of the drop on the held-out prompts.
        status: whether that bound keeps the limit.
    """

    unit: str | None = None
    kind: str | None = None
    weight: float | None = None
    max_drop: float | None = None
    drop_upper: float | None = None
    status: Literal["met", "broken", "open"] | None = None


@dataclass(frozen=True)
class QualitySection:
    """Paired quality against the full schedule.

    Attributes:
        measured: False if quality was not measured.
        why: the reason, if it was not measured.
        engine: which engine drew the judged images, if known.
        difference_from_full: per metric, and for the composite "quality", which counts in allowances (-1: one max_drop
            is used up).
    """

    measured: bool | None = None
    why: str | None = None
    prompt_set: str | None = None
    engine: str | None = None
    prompts: int | None = None
    composite: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, MetricSection] = field(default_factory=dict)
    difference_from_full: Mapping[str, IntervalSection] = field(default_factory=dict)
    mean: Mapping[str, float | None] = field(default_factory=dict)
    drop_upper: float | None = None


@dataclass(frozen=True)
class VerdictSection:
    """One limit: name, status "met", "broken" or "open", the limit, the measured value, its one-sided bound, unit."""

    name: str
    status: Literal["met", "broken", "open"]
    limit: float | None = None
    value: float | None = None
    bound: float | None = None
    unit: str | None = None


@dataclass(frozen=True)
class ConstraintsSection:
    """What had to hold.

    Attributes:
        budget: as typed.
        max_drop: per metric; in older profiles a number, the composite's.
        proved: whether the verdicts come from verification.
    """

    budget: str | None = None
    budget_ms: float | None = None
    max_drop: Mapping[str, float] | float | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    proved: bool | None = None
    verdicts: tuple[VerdictSection, ...] = ()


@dataclass(frozen=True)
class StudySection:
    """The study behind a profile: finished trials, distinct schedules drawn, its seed, and the schedule's key."""

    trials: int | None = None
    sampled: int | None = None
    seed: int | None = None
    key: str | None = None


@dataclass(frozen=True)
class ProvenanceSection:
    """Where a profile comes from: date, study, versions, hashes, device."""

    created: str | None = None
    study: StudySection = field(default_factory=StudySection)
    skipped_scales: int | None = None
    source: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    device: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineTried:
    """An engine that was considered: latency of one image, difference of its images from eager's, and why it was rejected."""

    engine: str
    latency_ms: float | None = None
    difference: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class EngineSection:
    """Which engine runs the schedule, and why.

    Attributes:
        asked: "auto" or a name.
        tried: all engines that were considered.
    """

    name: str
    asked: str
    reason: str
    tried: tuple[EngineTried, ...] = ()
