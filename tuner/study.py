"""One study: the full schedule first, then rounds of proposals evaluated as a tree, then verification and verdict.

No torch and no optuna here: schedules are judged by an `Evaluator`, proposed by a `Proposer`, and everything found is
on disk (trials.jsonl, fsync) before the sampler is told, so a study continues after kill -9 at any moment.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from stagevar.errors import ScheduleError, UsageError
from stagevar.profile import steps_to_data, write_text_atomically
from stagevar.schedule import StageSchedule, Steps, exact, preset
from tuner import pareto
from tuner.budget import Budget
from tuner.evaluate import Evaluator
from tuner.executors.base import Executor, Failed, QualityTask, WorkersLost
from tuner.executors.local import LocalExecutor, first_line
from tuner.journal import Evidence
from tuner.progress import Progress
from tuner.prompts import PromptSet
from tuner.proposals import Proposal, Proposer, Told
from tuner.result import (
    EXIT_CODES,
    Candidate,
    Failure,
    Sample,
    StudyResult,
    Verdict,
    build,
    to_plain,
)
from tuner.space import SearchSpace, steps_key
from tuner.stats import indistinguishable
from tuner.verify import BASELINE, LEAST_GAIN, Limits, Verifier, latency_stats, paired_differences

CONFIG_FILE = "config.json"
#: Schedules proposed and walked together.
ROUND = 5
SEARCH_ROUNDS, BASELINE_ROUNDS = 7, 15
#: Warm-up runs per schedule in the search at most; a noisy machine never settles, and finalists are measured again.
SEARCH_WARM_UP = 4
#: Finalists with and without a skipped scale.
FINALISTS_PER_KIND = 3
_MOST_DUPLICATES = 60


@dataclass(frozen=True)
class Options:
    """What a user asks of a study.

    trials: distinct schedules to evaluate, the full one not counted. time_budget_s: tuning time, verification included.
    sampler, storage: see Proposer. command: what reproduces the study. versions: for the record. samples: prompts whose images
    are kept for the report.
    """

    budget: Budget
    max_drop: float = 0.05
    trials: int = 30
    time_budget_s: float | None = None
    seed: int = 0
    sampler: str = "auto"
    storage: str | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    samples: int = 6


@dataclass(frozen=True)
class _Pending:
    """A proposal that has to be evaluated."""

    proposal: Proposal
    schedule: StageSchedule
    steps: Steps
    key: str


class Study:
    """Drives one run directory from wherever it stands to its verdict.

    Args:
        run_dir: exists and is locked by the caller (`journal.driver_lock`), its files repaired.
        prompts: "search" and "heldout". stop: asked between rounds whether to end now.
    """

    def __init__(
        self,
        run_dir: Path,
        space: SearchSpace,
        options: Options,
        evaluator: Evaluator,
        prompts: Mapping[str, PromptSet],
        executor: Executor | None = None,
        progress: Progress | None = None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.run_dir, self.space, self.options, self.evaluator, self.prompts = (
            run_dir, space, options, evaluator, prompts,
        )  # fmt: skip
        self.executor = executor or LocalExecutor(evaluator)
        self.progress = progress or Progress(quiet=True)
        self.stop = stop
        self.facts = evaluator.facts
        self.quality = not self.facts.random_weights
        space.fit(self.facts.grids)
        self.evidence = Evidence(run_dir)
        self.schedules: dict[str, StageSchedule] = {}
        self.steps: dict[str, Steps] = {}
        self.candidates: dict[str, Candidate] = {}
        self.failed: dict[str, Candidate] = {}
        self.failures: list[Failure] = []
        self.told = 0
        self.stop_reason = ""
        full = exact(len(self.facts.grids))
        self.full = full.expand(self.facts.grids, self.facts.chunks)
        self.full_key = self._register(full, self.full)
        self.baseline: Candidate | None = None
        self._began = time.monotonic()

    # ------------------------------------------------------------------------------------------------ identity

    def identity(self) -> dict[str, Any]:
        """What must not change between the parts of one study; what a resume compares."""
        facts = self.facts
        return {
            "model": facts.model,
            "weights": facts.provenance.get("weights", "random" if facts.random_weights else None),
            "pixels": facts.pixels,
            "device": facts.device,
            "engine": facts.engine,
            "sampling": facts.sampling,
            "space": dataclasses.asdict(self.space),
            "search prompts": self.prompts["search"].digest,
            "held-out prompts": self.prompts["heldout"].digest,
            "budget": self.options.budget.text,
            "max_drop": self.options.max_drop,
            "seed": self.options.seed,
            "storage": self.options.storage,
        }

    def check_identity(self) -> bool:
        """Writes the identity of a new run; compares that of an old one. Returns whether the run is an old one.

        Raises UsageError that says what differs.
        """
        path = self.run_dir / CONFIG_FILE
        mine = json.loads(json.dumps(self.identity()))
        if not path.exists():
            text = json.dumps({"identity": mine, "command": self.options.command}, indent=1)
            write_text_atomically(path, text + "\n")
            return False
        try:
            theirs = json.loads(path.read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is damaged; start anew with another --out, or with --fresh") from None
        differing = difference(theirs, mine)
        if differing:
            raise UsageError(
                f"{self.run_dir} holds another study: {'; '.join(differing[:3])}; choose another --out, or --fresh"
            )
        return True

    # ------------------------------------------------------------------------------------------------ running

    def run(self) -> StudyResult:
        """Baseline, search, verification, verdict; returns the result, which is also in study.json."""
        self.check_identity()
        records = self.evidence.read()
        self._run_baseline(records)
        if self.baseline.state == "complete":
            self._search(records)
        result = self._conclude()
        result.save(self.run_dir)
        return result

    @property
    def constraint_names(self) -> tuple[str, ...]:
        return ("latency", "drop", *(f"floor:{m}" for m in self.space.floors)) if self.quality else ("latency",)

    @property
    def limits(self) -> Limits:
        """What schedules must keep; known once the full schedule was measured."""
        weights = (w.get("weight", 1.0) if isinstance(w, Mapping) else w for w in self.space.quality.values())
        return Limits(
            self.options.budget,
            self.baseline.latency.median_ms,
            self.options.max_drop,
            self.space.floors,
            float(sum(weights)),
            self.quality,
        )

    def _register(self, schedule: StageSchedule, steps: Steps) -> str:
        key = steps_key(steps)
        self.schedules.setdefault(key, schedule)
        self.steps.setdefault(key, steps)
        return key

    def _run_baseline(self, records: Sequence[Mapping[str, Any]]) -> None:
        search = self.prompts["search"]
        self.progress.phase("baseline", search.batches)
        kept = next((r for r in records if r["kind"] == "baseline"), None)
        if kept is not None:
            self.baseline = build(Candidate, kept["candidate"])
            return
        blank = self._candidate(_Pending(Proposal(-1, {}), self.schedules[self.full_key], self.full, self.full_key))
        blank = dataclasses.replace(blank, source="enqueued: full schedule", trial=None)
        try:
            self.progress.update(0, "timing the full schedule")
            timing = self.evaluator.latency({BASELINE: self.full}, BASELINE_ROUNDS)[BASELINE]
            latency = latency_stats(timing.samples_ms, None, None, timing.warm_up_runs, timing.warmed)
            self.baseline = dataclasses.replace(blank, latency=latency)
        except WorkersLost:
            raise
        except Exception as error:
            self.baseline = dataclasses.replace(blank, state="failed", error=first_line(error))
            return
        if self.quality:
            values, errors = self._values([self.full], lambda done: self.progress.update(done, "full schedule"))
            if errors[0] is not None:
                self.baseline = dataclasses.replace(self.baseline, state="failed", error=errors[0])
                return
            self.baseline = dataclasses.replace(self.baseline, values=values[0])
        self._evidence("baseline", self.baseline)

    def _evidence(self, kind: str, candidate: Candidate) -> None:
        self.evidence.append({"kind": kind, "candidate": to_plain(dataclasses.asdict(candidate))})

    def _values(
        self, schedules: Sequence[Steps], note: Callable[[int], None] = lambda done: None
    ) -> tuple[list[dict[str, tuple[float, ...]]], list[str | None]]:
        """Per schedule: value per metric over the whole search set, in prompt order; and its first error or None."""
        tasks = [QualityTask(tuple(schedules), "search", b) for b in range(self.prompts["search"].batches)]
        found: dict[int, list[Any]] = {}
        for task, outcomes in self.executor.run(tasks):
            found[task.batch] = outcomes
            note(len(found))
            if all(isinstance(outcome, Failed) for outcome in outcomes):
                break  # no prompt could mend it
        values: list[dict[str, tuple[float, ...]]] = []
        errors: list[str | None] = []
        for index in range(len(schedules)):
            parts = [found[b][index] for b in sorted(found)]
            failed = [part.error for part in parts if isinstance(part, Failed)]
            errors.append(failed[0] if failed else None)
            metrics = [] if failed else list(parts[0])
            values.append({m: tuple(float(v) for part in parts for v in part[m]) for m in metrics})
        return values, errors

    # ------------------------------------------------------------------------------------------------ search

    def _search(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.progress.phase("search", self.options.trials)
        proposer = Proposer(
            self.run_dir,
            self.space,
            self.options.seed,
            self.constraint_names,
            self.options.sampler,
            self.options.storage,
        )
        known: dict[int, Told | None] = {}
        for record in records:
            if record["kind"] != "trial":
                continue
            candidate = build(Candidate, record["candidate"])
            known[candidate.trial] = self._told(candidate) if candidate.state == "complete" else None
            self._keep(candidate)
        presets, unfit = {}, []
        for name in self.space.enqueue:
            try:
                schedule = preset(name, self.facts.grids)
                self._register(schedule, schedule.expand(self.facts.grids, self.facts.chunks))
                presets[name] = self.space.nearest_values(schedule, self.facts.grids)
            except ScheduleError as error:
                unfit.append(f"{name}: {error}")
        for line in unfit:
            self.progress.say(f"preset left out, {line}")
        for proposal in proposer.recover(known):
            self._give_up(proposal)
        proposer.enqueue(presets)
        self._show()
        exhausted = False
        while not (exhausted or self._reason_to_stop()):
            with self.progress.part("asking"):
                pending, repeated, exhausted = self._propose(proposer)
            if pending:
                self._evaluate(pending, proposer)
            for trial, key in repeated:
                self._tell_known(proposer, trial, key)
        self.told = len(proposer.completed())
        if exhausted and not self.stop_reason:
            self.stop_reason = f"no new schedule in {_MOST_DUPLICATES} proposals: the space is exhausted"

    def _reason_to_stop(self) -> bool:
        done = len(self.candidates) + len(self.failures)
        if done >= self.options.trials:
            self.stop_reason = f"{self.options.trials} schedules were evaluated"
        elif self.stop():
            self.stop_reason = "stopped by the user"
        elif self.options.time_budget_s is not None:
            # Verification costs about as much per prompt and finalist as the search did per prompt and schedule.
            spent = time.monotonic() - self._began
            rate = spent / max(1, len(self.candidates) + 1) / len(self.prompts["search"])
            reserve = rate * 2 * FINALISTS_PER_KIND * len(self.prompts["heldout"])
            if self.candidates and spent + min(reserve, 0.6 * self.options.time_budget_s) > self.options.time_budget_s:
                self.stop_reason = f"the tuning time of {self.options.time_budget_s:g} s is over, verification included"
        return bool(self.stop_reason)

    def _propose(self, proposer: Proposer) -> tuple[list[_Pending], list[tuple[int, str]], bool]:
        """A round of new schedules; trials that repeat one of them; and whether the space seems to have no more.

        Trials whose schedule is known are told at once.
        """
        missing = min(ROUND, self.options.trials - len(self.candidates) - len(self.failures))
        pending: dict[str, _Pending] = {}
        repeated: list[tuple[int, str]] = []
        duplicates = 0
        while len(pending) < missing and duplicates < _MOST_DUPLICATES:
            proposal = proposer.ask(random=duplicates > ROUND)
            if proposal.preset is not None:
                schedule = preset(proposal.preset, self.facts.grids)
            else:
                schedule = self.space.schedule(proposal.values, self.facts.grids)
            steps = schedule.expand(self.facts.grids, self.facts.chunks)
            key = self._register(schedule, steps)
            if key in pending:
                repeated.append((proposal.trial, key))
            elif key == self.full_key or key in self.candidates or key in self.failed:
                self._tell_known(proposer, proposal.trial, key)
            else:
                pending[key] = _Pending(proposal, schedule, steps, key)
                continue
            duplicates += 1
        return list(pending.values()), repeated, len(pending) < missing

    def _tell_known(self, proposer: Proposer, trial: int, key: str) -> None:
        if key in self.failed:
            proposer.fail(trial)
        else:
            proposer.tell(trial, self._told(self.baseline if key == self.full_key else self.candidates[key]))

    def _evaluate(self, pending: Sequence[_Pending], proposer: Proposer) -> None:
        """Measures a round, writes the evidence, tells the sampler."""
        baseline = self.baseline
        schedules = {p.key: p.steps for p in pending}
        with self.progress.part("timing"):
            timings, broken = self._timings(schedules)
        alive = [p for p in pending if p.key not in broken]
        values: list[dict[str, tuple[float, ...]]] = [{} for _ in alive]
        errors: list[str | None] = [None for _ in alive]
        if self.quality and alive:
            with self.progress.part("quality"):
                values, errors = self._values([p.steps for p in alive])
        broken |= {p.key: e for p, e in zip(alive, errors, strict=True) if e is not None}
        by_key = {p.key: v for p, v in zip(alive, values, strict=True)}
        for p in pending:
            candidate = self._candidate(p)
            if p.key in broken:
                candidate = dataclasses.replace(candidate, state="failed", error=broken[p.key])
            else:
                timing, sentinel = timings[p.key]
                latency = latency_stats(
                    timing.samples_ms,
                    sentinel.samples_ms,
                    baseline.latency.median_ms,
                    timing.warm_up_runs,
                    timing.warmed,
                )
                differences = paired_differences(by_key[p.key], baseline.values, self.facts.higher_is_better)
                candidate = self._judged(
                    dataclasses.replace(candidate, latency=latency, values=by_key[p.key], differences=differences)
                )
            self._evidence("trial", candidate)
            self._keep(candidate)
            if candidate.state == "complete":
                proposer.tell(p.proposal.trial, self._told(candidate))
            else:
                proposer.fail(p.proposal.trial)
            self._show()

    def _timings(self, schedules: Mapping[str, Steps]) -> tuple[dict[str, tuple[Any, Any]], dict[str, str]]:
        """Timing and the full schedule's in the same rounds, by key; and the error of those that cannot run."""
        try:
            found = self.evaluator.latency({BASELINE: self.full, **schedules}, SEARCH_ROUNDS, SEARCH_WARM_UP)
            return {key: (found[key], found[BASELINE]) for key in schedules}, {}
        except WorkersLost:
            raise
        except Exception as error:
            if len(schedules) == 1:
                return {}, dict.fromkeys(schedules, first_line(error))
        timings, broken = {}, {}
        for key, steps in schedules.items():
            one, bad = self._timings({key: steps})
            timings |= one
            broken |= bad
        return timings, broken

    def _candidate(self, pending: _Pending) -> Candidate:
        steps, name = pending.steps, pending.proposal.preset
        accelerator = pending.schedule.accelerator
        return Candidate(
            key=pending.key,
            params=dict(pending.proposal.values) if name is None else {},
            schedule=pending.schedule.to_dict(),
            steps=tuple(steps_to_data(steps)),
            accelerator=accelerator if isinstance(accelerator, str) else "+".join(dict.fromkeys(accelerator)),
            source="sampler" if name is None else f"enqueued: {name}",
            trial=pending.proposal.trial,
            state="complete",
            skipped_scales=sum(step.skipped for step in steps),
            processed_tokens=float(sum(step.processed_tokens(self.facts.chunks) for step in steps)),
        )

    def _judged(self, candidate: Candidate) -> Candidate:
        """With a verdict per constraint from the point estimates."""
        limits, latency = self.limits, candidate.latency
        scale = latency.drift_corrected_ms / latency.ratio.mean
        verdicts = [_point("latency", limits.budget_ms, "ms", latency.drift_corrected_ms, latency.ratio.high * scale)]
        if self.quality:
            drop = candidate.differences["quality"]
            verdicts.append(_point("drop", limits.max_drop, "quality", -drop.mean, -drop.low))
            for metric, floor in limits.floors.items():
                mean = float(np.mean(candidate.values[metric]))
                state = "met" if mean >= floor else "broken"
                verdicts.append(Verdict(f"floor:{metric}", floor, metric, mean, mean, state))
        return dataclasses.replace(
            candidate, verdicts=tuple(verdicts), feasible=all(v.status == "met" for v in verdicts)
        )

    def _told(self, candidate: Candidate) -> Told:
        """Objectives and constraints of a candidate as the sampler wants them: shares, so that all have one size."""
        limits = self.limits
        latency_ms = candidate.latency.drift_corrected_ms
        constraints = {"latency": latency_ms / limits.budget_ms - 1}
        if not self.quality:
            return Told(latency_ms, candidate.processed_tokens, constraints)
        difference = candidate.differences["quality"].mean if candidate.differences else 0.0
        constraints["drop"] = -difference - limits.max_drop
        for metric, floor in limits.floors.items():
            constraints[f"floor:{metric}"] = (floor - float(np.mean(candidate.values[metric]))) / max(abs(floor), 1e-9)
        return Told(latency_ms, difference, constraints)

    def _keep(self, candidate: Candidate) -> None:
        schedule = StageSchedule.from_dict(candidate.schedule)
        self._register(schedule, schedule.expand(self.facts.grids, self.facts.chunks))
        if candidate.state == "complete":
            self.candidates[candidate.key] = candidate
        else:
            self.failed[candidate.key] = candidate
            self.failures.append(Failure(candidate.trial, candidate.params, candidate.error or ""))

    def _give_up(self, proposal: Proposal) -> None:
        schedule = (
            preset(proposal.preset, self.facts.grids)
            if proposal.preset is not None
            else self.space.schedule(proposal.values, self.facts.grids)
        )
        steps = schedule.expand(self.facts.grids, self.facts.chunks)
        candidate = self._candidate(_Pending(proposal, schedule, steps, self._register(schedule, steps)))
        candidate = dataclasses.replace(candidate, state="failed", error="took its driver down three times")
        if candidate.key not in self.candidates and candidate.key not in self.failed:
            self._evidence("trial", candidate)
            self._keep(candidate)

    def _show(self) -> None:
        feasible = [c for c in self.candidates.values() if c.feasible]
        done = len(self.candidates) + len(self.failures)
        if not feasible:
            line = f"{done} of {self.options.trials} schedules, none within the limits yet"
        else:
            best = max(feasible, key=self._preference)
            gain = self.baseline.latency.median_ms / best.latency.drift_corrected_ms
            line = f"{done} of {self.options.trials} schedules, best so far {gain:.2f}x"
            if self.quality:
                line += f", quality {best.differences['quality'].mean:+.3f}"
        self.progress.update(done, line)

    @staticmethod
    def _preference(candidate: Candidate) -> tuple[float, float]:
        """Larger is better: quality, then the less accelerated."""
        quality = candidate.differences["quality"].mean if candidate.differences else 0.0
        return (round(quality, 9), candidate.processed_tokens)

    # ------------------------------------------------------------------------------------------------ verdict

    def _finalists(self) -> list[Candidate]:
        """Whom to verify: the best within the limits by point estimate, with and without skipped scales; where there
        are none, those nearest to the limits whose intervals still reach them."""
        pool: list[Candidate] = [
            c for c in self.candidates.values() if c.feasible and c.latency.ratio.mean <= LEAST_GAIN
        ]
        # Those that meet the budget by their whole interval first: a borderline one would only be undecided.
        key: Callable[[Candidate], Any] = lambda c: (c.verdicts[0].bound <= c.verdicts[0].limit, self._preference(c))  # noqa: E731
        if not pool:
            pool = [c for c in self.candidates.values() if self._reaches(c)]
            key = lambda c: -self._excess(c)  # noqa: E731
        chosen: list[Candidate] = []
        for skips in (False, True):
            kind = sorted((c for c in pool if (c.skipped_scales > 0) == skips), key=key, reverse=True)
            chosen += kind[:FINALISTS_PER_KIND]
        return chosen

    def _reaches(self, candidate: Candidate) -> bool:
        """Whether the intervals leave it possible that every limit is kept."""
        limits, latency = self.limits, candidate.latency
        least = min(limits.budget_ms / self.baseline.latency.median_ms, LEAST_GAIN)
        fast = latency.ratio.low <= least
        good = not self.quality or -candidate.differences["quality"].high <= limits.max_drop
        floors = all(v.status == "met" for v in candidate.verdicts if v.name.startswith("floor:"))
        return fast and good and floors

    def _excess(self, candidate: Candidate) -> float:
        """How far the point estimates are beyond the limits, in shares; 0 within all of them."""
        told = self._told(candidate)
        return sum(max(0.0, value) for value in told.constraints.values())

    def _conclude(self) -> StudyResult:
        if self.baseline.state == "failed":
            return self._result("failed", f"the full schedule failed: {self.baseline.error}", {})
        if not self.candidates and self.failures:
            first = self.failures[0].error
            return self._result("failed", f"all {len(self.failures)} trials failed, the first with {first}", {})
        finalists = self._finalists()
        if self.stop():
            return self._result("partial", f"{self.stop_reason} before verification; the same command continues", {})
        self.progress.phase("verification", 100)
        heldout = self.prompts["heldout"] if self.quality else None
        verifier = Verifier(
            self.evaluator,
            self.executor,
            {c.key: self.steps[c.key] for c in finalists},
            self.full,
            heldout,
            self.limits,
            lambda line, share: self.progress.update(100 * share, line),
            self.stop,
        )
        verifications = verifier.run()
        self.baseline = dataclasses.replace(self.baseline, verification=verifications[BASELINE])
        for key, verification in verifications.items():
            if key != BASELINE:
                self.candidates[key] = dataclasses.replace(self.candidates[key], verification=verification)
                self._evidence("verification", self.candidates[key])
        for key, error in verifier.errors.items():
            self.failures.append(Failure(self.candidates[key].trial, self.candidates[key].params, error))
        return self._verdict([self.candidates[c.key] for c in finalists])

    def _verdict(self, finalists: Sequence[Candidate]) -> StudyResult:
        budget, limits = self.options.budget, self.limits
        verified = [c for c in finalists if c.verification.status == "verified"]
        waiting = [c for c in finalists if c.verification.status == "open"]
        picks: dict[str, str] = {}
        if verified:
            picks = self._picks(verified)
        baseline_fits = self.baseline.verification.verdicts[0].status == "met"
        if baseline_fits:
            picks["pick"] = self.full_key
            full_ms = self.baseline.verification.latency.median_ms
            reason = f"the full schedule already meets the budget of {budget}: {full_ms:.1f} ms; it is the pick"
            return self._result("baseline_meets_budget", reason, picks)
        if verified and not self.quality:
            pick = self.candidates[picks["pick"]]
            reason = (
                f"random weights: {speedup(pick)} within the budget, no quality was measured; "
                "the least accelerated schedule under the budget"
            )
            return self._result("latency_only", reason, picks)
        if verified:
            pick = self.candidates[picks["pick"]]
            change = pick.verification.differences["quality"]
            reason = (
                f"{speedup(pick)} within {budget}, quality {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}] on "
                f"{pick.verification.prompts} held-out prompts, drop at most {pick.verification.drop_upper:.4f} "
                f"(allowed {limits.max_drop:g})"
            )
            return self._result("verified", reason, picks)
        if waiting:
            best = max(waiting, key=self._preference)
            undecided = [v for v in best.verification.verdicts if v.status == "open"]
            texts = ", ".join(
                f"{v.name} {v.value:.4g} with bound {v.bound:.4g} around {v.limit:.4g}" for v in undecided
            )
            reason = f"the data cannot tell: {texts}; add held-out prompts or loosen the limit"
            return self._result("inconclusive", reason, picks, nearest=[c.key for c in waiting])
        kept = [c for c in self.candidates.values() if self._keeps_quality(c)]
        smallest = min((c.best_latency.drift_corrected_ms for c in kept), default=None)
        nearest = sorted(self.candidates.values(), key=self._excess)[:3]
        if smallest is None:
            reason = f"no schedule of {len(self.candidates)} keeps the quality; raise --max-drop"
        elif not self.quality and smallest <= limits.budget_ms:
            reason = f"no schedule of {len(self.candidates)} is within {budget} by its upper bound; raise --budget"
        elif smallest <= limits.budget_ms:
            reason = (
                f"no schedule within {budget} kept the quality on the held-out prompts; raise --budget or --max-drop"
            )
            smallest = None
        else:
            reason = (
                f"no schedule of {len(self.candidates)} meets {budget} ({limits.budget_ms:.1f} ms); the smallest reachable "
                f"budget is {smallest:.1f} ms ({100 * smallest / self.baseline.latency.median_ms:.0f}% of the full schedule)"
            )
        return self._result("infeasible", reason, picks, smallest=smallest, nearest=[c.key for c in nearest])

    def _keeps_quality(self, candidate: Candidate) -> bool:
        verdicts = candidate.verification.verdicts if candidate.verification else candidate.verdicts
        return all(v.status != "broken" for v in verdicts if v.name not in ("latency", "gain"))

    def _picks(self, verified: Sequence[Candidate]) -> dict[str, str]:
        """Named picks among the verified.

        The pick is the least accelerated of those whose quality the data cannot tell from the best.
        """
        by_speed = sorted(verified, key=lambda c: c.verification.latency.ratio.mean)
        if not self.quality:
            pick = max(verified, key=lambda c: c.processed_tokens)
            return {"pick": pick.key, "fastest": by_speed[0].key}
        picks = {"pick": self._least_accelerated(verified).key, "fastest": by_speed[0].key}
        points = [(c.verification.latency.ratio.mean, c.verification.differences["quality"].mean) for c in verified]
        picks["balanced"] = verified[pareto.balanced(points)].key
        picks["best_quality"] = max(verified, key=lambda c: c.verification.differences["quality"].mean).key
        whole = [c for c in verified if not c.skipped_scales]
        if whole:
            picks["no_skip"] = min(whole, key=lambda c: c.verification.latency.ratio.mean).key
        return picks

    @staticmethod
    def _least_accelerated(verified: Sequence[Candidate]) -> Candidate:
        best = max(verified, key=lambda c: c.verification.differences["quality"].mean)

        def equal(candidate: Candidate) -> bool:
            own, other = candidate.verification.values["quality"], best.verification.values["quality"]
            count = min(len(own), len(other))
            return indistinguishable(own[:count], other[:count])

        return max((c for c in verified if c is best or equal(c)), key=lambda c: (c.processed_tokens, c.key))

    def _front(self) -> list[str]:
        """Keys of the non-dominated candidates that keep the quality limits, the full schedule among them."""
        if self.baseline.latency is None:
            return []
        pool = [self.baseline, *(c for c in self.candidates.values() if self._keeps_quality(c))]

        def gain(candidate: Candidate) -> float:
            if not self.quality:
                return candidate.processed_tokens
            return candidate.best_differences["quality"].mean if candidate.best_differences else 0.0

        points = [(c.best_latency.drift_corrected_ms, gain(c)) for c in pool]
        return [pool[i].key for i in pareto.front(points)]

    def _samples(self, picks: Mapping[str, str]) -> list[Sample]:
        """Images of the full schedule and the picks on the first search prompts, as PNG files."""
        if not self.quality or self.stop():
            return []
        self.progress.phase("images")
        from PIL import Image

        search = self.prompts["search"]
        count = min(self.options.samples, len(search.batch(0)[0]))
        texts, samples = search.texts, []
        for key in dict.fromkeys([self.full_key, *picks.values()]):
            images = self.evaluator.images(self.steps[key], "search", 0)[:count]
            folder = self.run_dir / "images" / key
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{i}.png")
                samples.append(Sample(texts[i], search.seeds[i], key, f"images/{key}/{i}.png"))
        return samples

    def _time_scales(self, keys: Sequence[str]) -> None:
        """Adds the share of each scale to the newest measurement of the full schedule and these, for the report.

        They explain the figures and decide nothing, so an evaluator need not offer them and a failure is only said.
        """
        time_scales = getattr(self.evaluator, "scale_ms", None)
        if time_scales is None or not keys or self.stop():
            return
        try:
            times = time_scales({key: self.steps[key] for key in dict.fromkeys([self.full_key, *keys])})
        except Exception as error:
            self.progress.say(f"scales were not timed: {first_line(error)}")
            return
        for key, scale_ms in times.items():
            candidate = self.baseline if key == self.full_key else self.candidates[key]
            check, latency = candidate.verification, candidate.latency
            if check is not None:
                check = dataclasses.replace(check, latency=dataclasses.replace(check.latency, scale_ms=scale_ms))
            elif latency is not None:
                latency = dataclasses.replace(latency, scale_ms=scale_ms)
            candidate = dataclasses.replace(candidate, verification=check, latency=latency)
            if key == self.full_key:
                self.baseline = candidate
            else:
                self.candidates[key] = candidate

    def _result(
        self,
        verdict: str,
        reason: str,
        picks: dict[str, str],
        smallest: float | None = None,
        nearest: Sequence[str] = (),
    ) -> StudyResult:
        shown = {**picks, **{f"nearest {i}": key for i, key in enumerate(nearest[:1])}}
        samples = []
        if self.baseline.state == "complete":
            samples = self._samples(shown)
            self._time_scales(list(shown.values())[:1])
        self.progress.end_phase()
        facts, space, options = self.facts, self.space, self.options
        search, heldout = self.prompts["search"], self.prompts["heldout"]
        weights = {n: float(w.get("weight", 1.0) if isinstance(w, Mapping) else w) for n, w in space.quality.items()}
        everyone = [*self.candidates.values(), *self.failed.values()]
        return StudyResult(
            command=options.command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=facts.model,
            random_weights=facts.random_weights,
            provenance={**facts.provenance, "sampling": facts.sampling},
            versions={**options.versions, **({"torch": facts.device["torch"]} if "torch" in facts.device else {})},
            hashes={
                "space": space.digest,
                "search_prompts": search.digest,
                "heldout_prompts": heldout.digest,
                **({"model": str(facts.provenance["hash"])} if "hash" in facts.provenance else {}),
            },
            device=facts.device,
            engine=facts.engine,
            includes=facts.includes,
            grids=facts.grids,
            chunks=facts.chunks,
            pixels=facts.pixels,
            budget=options.budget.text,
            budget_ms=self.limits.budget_ms if self.baseline.latency else math.nan,
            max_drop=options.max_drop,
            quality_weights=weights if self.quality else {},
            higher_is_better=facts.higher_is_better,
            floors=dict(space.floors),
            seed=options.seed,
            micro_batch=search.micro_batch,
            search_prompts=search.texts,
            search_seeds=search.seeds,
            heldout_prompts=heldout.texts,
            heldout_seeds=heldout.seeds,
            baseline=self.baseline,
            candidates=tuple(sorted(everyone, key=lambda c: c.trial)),
            front=tuple(self._front()),
            picks=picks,
            verdict=verdict,
            exit_code=EXIT_CODES[verdict],
            reason=reason,
            stop_reason=self.stop_reason,
            trials=self.told,
            sampled=sum(c.source == "sampler" for c in self.candidates.values()),
            phases_s=dict(self.progress.seconds),
            failures=tuple(self.failures),
            samples=tuple(samples),
            smallest_budget_ms=smallest,
            nearest=tuple(nearest),
        )


def _point(name: str, limit: float, unit: str, value: float, bound: float) -> Verdict:
    return Verdict(name, limit, unit, value, bound, "met" if value <= limit else "broken")


def speedup(candidate: Candidate) -> str:
    """ "1.72x [1.70, 1.74]" from the best measurement of a candidate."""
    ratio = candidate.best_latency.ratio
    return f"{1 / ratio.mean:.2f}x [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]"


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two trees of plain data, one phrase per leaf, shortened for reading."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in difference(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in difference(a, b, f"{path}[{i}]")]
    return [f"{path} was {_short(old)} and is {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
