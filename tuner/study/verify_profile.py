"""Measures a deployment profile again on this machine: latency, quality on held-out prompts, and regressions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from stagevar.choices import check_engine, check_threads
from stagevar.errors import UsageError
from stagevar.models.request import ModelRequest
from stagevar.profile import Profile, present_envelope
from tuner.config.limits import Budget
from tuner.config.quality import COMPOSITE, MetricLimit, composite_specs
from tuner.config.space import SearchSpace
from tuner.results.candidate import Verdict, Verification
from tuner.study.finalist_times import BASELINE
from tuner.study.verdict import Limits, decide
from tuner.study.verification import Verifier

_STATES = {"met": "kept", "broken": "BROKEN", "open": "undecided"}
#: What a verdict is about, and what its figures are.
_SUBJECTS = {
    "latency": ("latency within the budget", "ms"),
    "gain": ("faster than the full schedule", "of its time"),
    "regression": ("no regression beyond the allowed one", "of the full schedule's time"),
    "drop": ("allowed drop of {metric}", "{unit}"),
    "floor": ("floor of {metric}", ""),
}


@dataclass(frozen=True)
class Recheck:
    """What measuring a profile again found.

    Attributes:
        verdicts: one per limit, including the regression.
        exit_code: 0 if all are kept, 3 if one is broken, 5 if one is undecided.
        engine: what was timed and drew the images.
    """

    verdicts: tuple[Verdict, ...]
    verification: Verification
    warnings: tuple[str, ...]
    engine: str = "eager"

    @property
    def exit_code(self) -> int:
        states = {verdict.status for verdict in self.verdicts}
        return 3 if "broken" in states else 5 if "open" in states else 0

    @property
    def lines(self) -> list[str]:
        """The lines to print."""
        latency = self.verification.latency
        lines = [f"warning: {text}" for text in self.warnings]
        if latency.ratio is not None:
            lines.append(f"speed-up {latency.speedup_text}, {latency.median_ms:.1f} ms, {self.engine} engine")
        for metric, change in self.verification.differences.items():
            if metric != COMPOSITE:
                lines.append(
                    f"{metric} changed by {change.signed_text} on {change.n} held-out prompts drawn by the {self.engine} engine"
                )
        return [*lines, *map(_in_words, self.verdicts)]

    def to_dict(self) -> dict[str, object]:
        """Plain data for --json."""
        return {
            "exit_code": self.exit_code,
            "verdicts": [asdict(v) for v in self.verdicts],
            "ratio": asdict(self.verification.latency.ratio) if self.verification.latency.ratio else None,
            "median_ms": self.verification.latency.median_ms,
            "engine": self.engine,
            "warnings": list(self.warnings),
        }


def _in_words(verdict: Verdict) -> str:
    """A line that says what was kept or not, by which figures."""
    kind, _, metric = verdict.name.partition(":")
    what, unit = (text.format(metric=metric, unit=verdict.unit) for text in _SUBJECTS[kind])
    value = f"{verdict.value:.4g} {unit}".rstrip()
    return f"{_STATES[verdict.status]}: {what}: {value} (bound {verdict.bound:.4g}, limit {verdict.limit:.4g})"


def regression_verdict(recorded_ratio: float, verification: Verification, allowed: float) -> Verdict:
    """Whether the latency ratio to the full schedule grew by more than `allowed` (a share) since it was recorded."""
    limit, now = recorded_ratio * (1 + allowed), verification.latency.against_full
    return Verdict("regression", limit, "ratio", now.mean, now.high, decide(limit, now.low, now.high))


@dataclass(frozen=True)
class Terms:
    """What a profile must keep.

    Args:
        space: names the prompts, the metrics and their floors.
        budget: of latency.
        metrics: how far each metric may fall.
        max_regression: how much the latency ratio may have grown since it was recorded, a share; None sets no limit.
        seed: of the prompts.
    """

    space: SearchSpace
    budget: Budget
    metrics: tuple[MetricLimit, ...]
    max_regression: float | None = None
    seed: int = 0


def recheck(
    profile: Profile, request: ModelRequest, terms: Terms, *, threads: int, engine: str, progress: Any
) -> Recheck:
    """Verifies a profile's schedule against the full one, both measured here and now.

    Args:
        profile: whose schedule is measured.
        request: the profile's model as it is loaded here.
        terms: what it must keep.
        threads: CPU threads of every latency.
        engine: what is timed, and draws the images.
        progress: shows how far it is.

    Raises:
        ProfileError: if the model is another one.
        UsageError: if the profile was made on random weights, or records no ratio although a regression is limited.
    """
    from stagevar.models.registry import load_model, resolve
    from tuner.config.prompts import load_prompts
    from tuner.evaluation.local import LocalExecutor
    from tuner.evaluation.model_evaluator import ModelEvaluator

    full_profile = profile.latency.ratio is None
    recorded = 1.0 if profile.latency.ratio is None else profile.latency.ratio.mean
    space, metrics, max_regression = terms.space, terms.metrics, terms.max_regression
    if max_regression is not None and recorded is None:
        raise UsageError("the profile records no latency ratio to compare with; leave out --max-regression")
    kind = resolve(request).device.type
    check_engine(engine, kind)
    check_threads(threads, kind)
    progress.phase("load")
    model = load_model(request)
    steps = profile.expand(model)
    prompts = load_prompts(space.prompts, terms.seed)
    evaluator = ModelEvaluator(
        model, prompts, composite_specs(space.quality, metrics), space.floors, threads=threads, engine=engine
    )
    present = present_envelope(model, profile.envelope.batch, threads, evaluator.engine)
    warnings = profile.warnings_here(model, present)
    progress.phase("verification", 100)
    timing = evaluator.latency({BASELINE: evaluator.full}, 9)[BASELINE]
    limits = Limits(terms.budget, timing.median_ms, metrics, space.floors, not model.random_weights)
    verifier = Verifier(
        evaluator,
        LocalExecutor(evaluator),
        {"profile": steps},
        evaluator.full,
        prompts["heldout"],
        limits,
        lambda line, share: progress.update(100 * share, line),
    )
    verification = verifier.run()["profile"]
    progress.close()
    verdicts = list(verification.verdicts)
    if full_profile:
        # The full schedule is its own baseline: there is no gain to keep.
        verdicts = [v for v in verdicts if v.name != "gain"]
    if max_regression is not None and recorded is not None:
        verdicts.append(regression_verdict(recorded, verification, max_regression))
    return Recheck(tuple(verdicts), verification, tuple(warnings), evaluator.engine)
