"""What was already judged on the held-out prompts: by an earlier part of this study, or by the study that it starts from.

Values of the same prompts are never drawn again. A proof of quality stays a proof: it is about a schedule, its images and
limits, none of which another budget changes, so only the latency is measured anew. Judging the same schedules on the same
prompts again counts as one more judgment (tuner.statistics.looks), whichever study did it before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuner.config.prompts import PromptSet
from tuner.config.quality import MetricLimit, composite, limited
from tuner.evaluation.store import Context, differing, named
from tuner.results.candidate import OF_TIME, Candidate, Finalist, Measured, Verdict, Verification, verification_of
from tuner.results.codec import build
from tuner.results.result import StudyResult
from tuner.results.run_dir import CONFIG_FILE, STUDY_FILE, EvidenceRecord
from tuner.study.finalist_times import BASELINE


@dataclass(frozen=True)
class EarlierStudy:
    """Held-out results of another study that hold for this one.

    Attributes:
        checks: verifications by key, the full schedule's under BASELINE; empty if nothing can be reused.
        proved: those whose quality keeps this study's limits, with verdicts on these.
        judgments: how often that study was judged.
    """

    checks: Mapping[str, Verification] = field(default_factory=dict)
    proved: Mapping[str, Verification] = field(default_factory=dict)
    judgments: int = 0

    def proved_among(self, candidates: Mapping[str, Measured], budget_ratio: float) -> list[Measured]:
        """The proved ones that may be within the budget: they are verified without drawing an image."""
        found = [candidates[key] for key in self.proved if key in candidates]
        return [c for c in found if c.latency.against_full.low <= budget_ratio]

    def with_parts(self, parts: Mapping[str, Verification]) -> dict[str, Verification]:
        """All held-out results by key, with those of earlier parts of this study; of the full schedule's, the most prompts."""
        found = {**self.checks, **parts}
        full = [one[BASELINE] for one in (self.checks, parts) if BASELINE in one]
        return found | ({BASELINE: max(full, key=lambda one: one.prompts)} if full else {})

    def judgments_of(self, finalists: Collection[str]) -> int:
        """How often any of these were judged there: 0 if none of them was."""
        return self.judgments if any(key in self.checks for key in finalists) else 0


def read_earlier_study(
    path: Path, context: Context, heldout: PromptSet, limits: Sequence[MetricLimit], floors: Mapping[str, float]
) -> tuple[EarlierStudy, str]:
    """What the study in a run directory, or beside a profile, proved that holds here too, and a line that says so.

    Args:
        path: the run directory or the profile.
        context: what the quality of this study's held-out images depends on (tuner.evaluation.store.quality_context).
        heldout: this study's prompts.
        limits, floors: what schedules must keep here.
    """
    run = path if path.is_dir() else path.parent
    if not (run / STUDY_FILE).is_file():
        return EarlierStudy(), ""
    result = StudyResult.load(run)
    why = _unlike(run, result, context, heldout)
    if why:
        return EarlierStudy(), f"held-out results of {run} are not reused: {why}"
    full = verification_of(result.baseline)
    judged = {c.key: c.verification for c in result.candidates if isinstance(c, Finalist) and c.verification.prompts}
    if full is None or not judged:
        return EarlierStudy(), f"{run} judged no schedule on held-out prompts"
    checks = {key: _with_composite(check, limits) for key, check in {BASELINE: full, **judged}.items()}
    proved = {key: kept for key in judged if (kept := _proof(run, checks[key], limits, floors)) is not None}
    same = f"the same held-out prompts, {named(context)}"
    line = f"held-out results of {run} are reused ({same}): {_what_is_proved(len(proved))}"
    return EarlierStudy(checks, proved, len(result.judged_on)), line


def _what_is_proved(count: int) -> str:
    if not count:
        return "none of its schedules is proved to keep these limits"
    one = "one schedule stays proved to keep these limits, and only its latency is measured anew"
    return (
        one if count == 1 else f"{count} schedules stay proved to keep these limits, and only latency is measured anew"
    )


def _unlike(run: Path, result: StudyResult, context: Context, heldout: PromptSet) -> str:
    """Why held-out results of a study say nothing about this one; "" if they do."""
    try:
        theirs = dict(json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))["quality_context"])
    except (OSError, ValueError, KeyError, TypeError):
        return "an older version wrote them, without what they depend on"
    names = differing(theirs, context)
    if names:
        return f"another {' and '.join(names)}"
    count = len(result.heldout_prompts)
    if len(heldout) < count:
        return f"{count} prompts were held out there, {len(heldout)} here"
    return "" if heldout.first(count).digest == result.hashes["heldout_prompts"] else "other held-out prompts"


def _with_composite(check: Verification, limits: Sequence[MetricLimit]) -> Verification:
    """A verification whose composite counts in these limits' allowances."""
    quality = tuple(map(float, composite(check.values, limits)))
    return dataclasses.replace(check, values={**check.values, "quality": quality})


def _proof(
    run: Path, check: Verification, limits: Sequence[MetricLimit], floors: Mapping[str, float]
) -> Verification | None:
    """A verification with its bounds compared with these limits; None if it does not prove them all."""
    theirs = {v.name: v for v in check.verdicts if v.name not in OF_TIME and v.status == "met"}
    mine: list[Verdict] = []
    for limit in limited(limits):
        found = theirs.get(limit.name)
        if found is None or found.bound > limit.allowed:
            return None
        mine.append(dataclasses.replace(found, limit=limit.allowed))
    for metric, floor in floors.items():
        found = theirs.get(f"floor:{metric}")
        if found is None or found.bound < floor:
            return None
        mine.append(dataclasses.replace(found, limit=floor))
    return dataclasses.replace(check, verdicts=tuple(mine), proved_by=check.proved_by or str(run.absolute()))


def earlier_parts(records: Sequence[EvidenceRecord], full_key: str) -> dict[str, Verification]:
    """Held-out results of earlier parts of a study by key, the full schedule's under BASELINE: the verified one, else the
    one with most prompts."""
    found: dict[str, Verification] = {}
    for record in records:
        if record["kind"] != "verification":
            continue
        candidate: Finalist = build(Candidate, record["candidate"])
        key = BASELINE if candidate.key == full_key else candidate.key
        check, before = candidate.verification, found.get(key)
        if before is None or (before.status != "verified" and check.prompts >= before.prompts):
            found[key] = check
    return found if BASELINE in found else {}  # older runs have no full-schedule values to pair with
