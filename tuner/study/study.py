"""One study: the full schedule first, then the search, then verification and verdict.

No torch and no optuna here: schedules are judged by an `Evaluator`, proposed by a `TrialSampler`, and everything found is
on disk (trials.jsonl, fsync) before the sampler is told, so a study continues after kill -9 at any moment.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stagevar.errors import InfrastructureError, OutOfDeviceMemory, first_line
from tuner.config.costs import FINALISTS_PER_KIND, drawing_line
from tuner.config.prompts import PromptSet, set_sizes
from tuner.config.quality import quality_limits
from tuner.config.space import SearchSpace
from tuner.evaluation.evaluator import Evaluator
from tuner.evaluation.executor import Executor, Failed, NotMeasured, QualityTask
from tuner.evaluation.local import LocalExecutor
from tuner.evaluation.store import quality_context
from tuner.proposals.trial_sampler import Proposal
from tuner.results.candidate import Candidate, Failure, Finalist, Measured, Sample
from tuner.results.candidate import Failed as FailedCandidate
from tuner.results.codec import build
from tuner.results.result import EXIT_CODES, SearchFacts, StudyResult
from tuner.results.run_dir import EvidenceRecord, write_pictures
from tuner.study.earlier_verifications import EarlierStudy, earlier_parts
from tuner.study.finalist_times import BASELINE, timed_stats
from tuner.study.identity import Identity, RunConfig, identity_of
from tuner.study.ledger import Ledger
from tuner.study.options import Options
from tuner.study.progress import Progress
from tuner.study.search import Search
from tuner.study.verdict import Conclusion, Heldout, choose_finalists, conclude, in_turn
from tuner.study.verification import Verifier

BASELINE_ROUNDS = 15


class Study:
    """Drives one run directory from its current state to its verdict.

    Args:
        run_dir: exists and is locked by the caller (`run_dir.driver_lock`), its files repaired.
        prompts: "search" and "heldout".
        stop: asked between rounds whether to end now.
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
        self.run_dir, self.options, self.evaluator, self.prompts = run_dir, options, evaluator, prompts
        self.executor = executor or LocalExecutor(evaluator)
        self.progress = progress or Progress(quiet=True)
        self.stop = stop
        self.facts = evaluator.facts
        self.quality = self.progress.judged = not self.facts.random_weights
        self.space = space.runnable(self.facts.refused)
        if self.space is not space:
            for name, why in self.facts.refused.items():
                self.progress.say(f"precision {name} is not searched: it cannot run here ({why})")
        self.space.fit(self.facts.grids)
        self.metrics = quality_limits(self.space.quality, options.max_drop)
        self.config = RunConfig(run_dir, options.command)
        self.ledger = Ledger(run_dir, self.space, self.facts, options.budget, self.metrics)
        self.known = options.earlier_study or EarlierStudy()
        self.ledger.proved = frozenset(self.known.proved)
        self.judged_on: list[int] = []
        self.told = 0
        self.stop_reason = ""
        self.search_facts: SearchFacts = {}
        self._began = time.monotonic()

    # ------------------------------------------------------------------------------------------------ identity

    def identity(self) -> Identity:
        """What must not change between the parts of one study; a resume compares it."""
        return identity_of(self.facts, self.space, self.prompts, self.metrics, self.options)

    def check_identity(self) -> bool:
        """Claims the run directory for this study; returns whether it already held this study. See `RunConfig.claim`."""
        heldout = self.prompts["heldout"]
        known = self.config.claim(self.identity(), self.space.prompts, heldout, self.facts.engine_choice)
        self.judged_on = list(self.config.judged_on)
        return known

    # ------------------------------------------------------------------------------------------------ running

    def run(self) -> StudyResult:
        """Baseline, search, verification, verdict; returns the result, which is also in study.json."""
        self.check_identity()
        records = self.ledger.evidence.read()
        # Created first, so that its proposing process is up once the full schedule has been measured.
        search = self._new_search()
        try:
            self._run_baseline(records)
            if isinstance(self.ledger.baseline, Measured):
                self.progress.phase("search", self.options.trials)
                search.run(records)
                self.told, self.stop_reason, self.search_facts = search.told, search.stop_reason, search.facts()
        finally:
            search.close()
        result = self._conclude(records)
        self.config.note_judged(self.judged_on)
        result.save(self.run_dir)
        return result

    def _run_baseline(self, records: Sequence[EvidenceRecord]) -> None:
        ledger, search = self.ledger, self.prompts["search"]
        self.progress.phase("baseline", search.batches)
        kept = next((r for r in records if r["kind"] == "baseline"), None)
        if kept is not None:
            ledger.baseline = build(Candidate, kept["candidate"])
            return
        blank = dataclasses.replace(
            ledger.blank(ledger.full_key, Proposal(-1, {})), source="enqueued: full schedule", trial=None
        )
        try:
            self.progress.update(0, "timing the full schedule")
            timing = self.evaluator.latency({BASELINE: ledger.full}, BASELINE_ROUNDS)[BASELINE]
            latency = timed_stats(timing)
            for why in timing.disturbed:
                self.progress.say(f"timings may be wrong, even after repeating them: {why}")
            ledger.baseline = blank.becomes(Measured, latency=latency)
            if self.quality:
                sizes = len(search), len(self.prompts["heldout"])
                self.progress.say(drawing_line(self.options.most_trials, *sizes, latency.median_ms))
        except InfrastructureError:
            raise
        except Exception as error:
            ledger.baseline = blank.becomes(FailedCandidate, error=first_line(error))
            return
        if self.quality:
            values, failure = self._full_values()
            if failure is not None:
                ledger.baseline = ledger.baseline.becomes(FailedCandidate, error=failure)
                return
            ledger.baseline = dataclasses.replace(ledger.baseline, values=values)
        ledger.record("baseline", ledger.baseline)

    def _full_values(self) -> tuple[dict[str, tuple[float, ...]], str | None]:
        """The full schedule's values per metric over the whole search set, in prompt order, or its first error."""
        tasks = [QualityTask((self.ledger.full,), "search", b) for b in range(self.prompts["search"].batches)]
        found: dict[int, Any] = {}
        for task, (outcome,) in self.executor.run(tasks):
            if isinstance(outcome, NotMeasured):
                raise OutOfDeviceMemory(outcome.error)
            if isinstance(outcome, Failed):
                return {}, outcome.error
            found[task.batch] = outcome
            self.progress.update(len(found), "full schedule")
        parts = [found[b] for b in sorted(found)]
        return {m: tuple(float(v) for part in parts for v in part[m]) for m in parts[0]}, None

    def _new_search(self) -> Search:
        options = self.options
        return Search(
            self.run_dir,
            self.ledger,
            self.evaluator,
            self.executor,
            self.prompts["search"],
            self.progress,
            trials=options.trials,
            seed=options.seed,
            sampler=options.sampler,
            storage=options.storage,
            patience=options.patience,
            shortcuts=options.shortcuts,
            earlier=options.earlier,
            out_of_time=self._out_of_time,
            stop=self.stop,
        )

    def _out_of_time(self) -> str:
        """Why the tuning time is over, or "".

        Verification costs about as much per prompt and finalist as the search did per prompt and schedule.
        """
        limit_s, count = self.options.time_budget_s, len(self.ledger.candidates)
        if limit_s is None or not count:
            return ""
        spent = time.monotonic() - self._began
        rate = spent / (count + 1) / len(self.prompts["search"])
        reserve = rate * 2 * FINALISTS_PER_KIND * len(self.prompts["heldout"])
        if spent + min(reserve, 0.6 * limit_s) <= limit_s:
            return ""
        return f"the tuning time of {limit_s:g} s is over, verification included"

    # ------------------------------------------------------------------------------------------------ verdict

    def finalists(self) -> list[Measured]:
        """The schedules to verify, in the order in which they are judged if that is one by one."""
        ledger = self.ledger
        choose = in_turn if self._one_by_one else choose_finalists
        found = choose(list(ledger.candidates.values()), ledger.limits, ledger.violation)
        proved = self.known.proved_among(ledger.candidates, ledger.budget_ratio)
        return [*proved, *(c for c in found if c not in proved)]

    @property
    def _one_by_one(self) -> bool:
        return self.options.one_by_one and self.quality

    def _conclude(self, records: Sequence[EvidenceRecord]) -> StudyResult:
        ledger = self.ledger
        if isinstance(ledger.baseline, FailedCandidate):
            return self._result(Conclusion("failed", f"the full schedule failed: {ledger.baseline.error}"))
        if not ledger.candidates and ledger.unmeasured and not ledger.failed:
            raise OutOfDeviceMemory(
                f"none of {len(ledger.unmeasured)} schedules was measured: {ledger.failures[0].error}"
            )
        if not ledger.candidates and ledger.failures:
            first = ledger.failures[0].error
            return self._result(
                Conclusion("failed", f"all {len(ledger.failures)} trials failed, the first with {first}")
            )
        earlier = earlier_parts(records, ledger.full_key)
        # An earlier claim stands, whatever is judged after it.
        claimed = {key for key, check in earlier.items() if check.status == "verified" and key in ledger.candidates}
        # One by one, a claim also settles what was behind it.
        settled = {key for key in earlier if key in ledger.candidates} if claimed and self._one_by_one else claimed
        finalists = [c for c in self.finalists() if c.key not in settled]
        if self.stop():
            return self._result(
                Conclusion("partial", f"{self.stop_reason} before verification; the same command resumes")
            )
        proved = [ledger.finalist(key, earlier[key]) for key in settled]
        if claimed and not finalists:
            return self._judged(proved, ledger.finalist(ledger.full_key, earlier[BASELINE]))
        self.progress.phase("verification", 100)
        keys = [c.key for c in finalists]
        verifier = Verifier(
            self.evaluator,
            self.executor,
            {key: ledger.steps[key] for key in keys},
            ledger.full,
            self.prompts["heldout"] if self.quality else None,
            ledger.limits,
            lambda line, share: self.progress.update(100 * share, line),
            self.stop,
            self.known.with_parts(earlier),
            extensions=len(self.judged_on),
            judgments=self.known.judgments_of(keys),
            proved={key: self.known.proved[key] for key in keys if key in self.known.proved},
            processed_tokens={c.key: c.processed_tokens for c in finalists},
            one_by_one=self._one_by_one,
        )
        self.config.note_context(quality_context(self.facts, self.space, "heldout"), first=not earlier)
        verifications = verifier.run()
        own = verifications[BASELINE]
        if BASELINE in earlier and earlier[BASELINE].prompts > own.prompts:
            own = dataclasses.replace(own, prompts=earlier[BASELINE].prompts, values=earlier[BASELINE].values)
        baseline = ledger.finalist(ledger.full_key, own)
        if finalists:
            ledger.record("verification", baseline)
        judged = {key: ledger.finalist(key, check) for key, check in verifications.items() if key != BASELINE}
        for finalist in judged.values():
            ledger.record("verification", finalist)
        for key, error in {**verifier.errors, **verifier.unmeasured}.items():
            ledger.failures.append(Failure(ledger.candidates[key].trial_number, ledger.candidates[key].params, error))
        if finalists and len(verifier.unmeasured) == len(finalists) and not claimed:
            raise OutOfDeviceMemory(next(iter(verifier.unmeasured.values())))
        chosen = [*proved, *(judged[c.key] for c in finalists if c.key in judged)]
        if verifier.cut_short and not any(c.verification.status == "verified" for c in chosen):
            return self._result(Conclusion("partial", "stopped during verification; the same command resumes"))
        return self._judged(chosen, baseline, new=len(verifier.unmeasured) < len(finalists))

    def _judged(self, finalists: Sequence[Finalist], baseline: Finalist, new: bool = False) -> StudyResult:
        """The verdict on verified or undecided finalists; `new` if this judgment was not made before."""
        ledger, source = self.ledger, self.space.prompts
        prompts = self.prompts["heldout"]
        heldout = Heldout(
            source,
            len(prompts),
            prompts.micro_batch,
            len(self.judged_on),
            lambda count: set_sizes(dataclasses.replace(source, heldout=count))[1],
        )
        if new:
            self.judged_on.append(len(prompts) if self.quality else 0)
        everyone = list(ledger.candidates.values())
        return self._result(conclude(finalists, everyone, baseline, ledger.limits, heldout, ledger.violation))

    def _samples(self, keys: Sequence[str]) -> list[Sample]:
        """PNG images of the full schedule and these candidates for the first search prompts."""
        if not self.quality or self.stop():
            return []
        self.progress.phase("images")
        search = self.prompts["search"]
        count = min(self.options.samples, len(search.batch(0)[0]))
        samples = []
        for key in dict.fromkeys([self.ledger.full_key, *keys]):
            images = self.evaluator.images(self.ledger.steps[key], "search", 0)[:count]
            paths = write_pictures(self.run_dir, key, images)
            samples += [Sample(search.texts[i], search.seeds[i], key, path) for i, path in enumerate(paths)]
        return samples

    def _time_scales(self, keys: Sequence[str]) -> None:
        """Adds the time of each scale to the newest measurement of the full schedule and these, for the report.

        It explains the figures and decides nothing, so an evaluator need not offer it and a failure is only reported.
        """
        ledger = self.ledger
        if not keys or self.stop():
            return
        try:
            times = self.evaluator.scale_ms({key: ledger.steps[key] for key in dict.fromkeys([ledger.full_key, *keys])})
        except InfrastructureError:
            raise
        except Exception as error:
            self.progress.say(f"could not time single scales: {first_line(error)}")
            return
        for key, scale_ms in (times or {}).items():
            ledger.replace(_with_scales(ledger.measured(key), scale_ms))

    def _result(self, conclusion: Conclusion) -> StudyResult:
        ledger = self.ledger
        shown = [*conclusion.picks.values(), *conclusion.nearest[:1]]
        samples = []
        if isinstance(ledger.baseline, Measured):
            samples = self._samples(shown)
            self._time_scales(shown[:1])
        baseline = ledger.baseline
        assert baseline is not None
        self.progress.end_phase()
        facts, space, options = self.facts, self.space, self.options
        search, heldout = self.prompts["search"], self.prompts["heldout"]
        everyone: list[Candidate] = [*ledger.candidates.values(), *ledger.failed.values(), *ledger.unmeasured.values()]
        return StudyResult(
            command=options.command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=facts.model,
            random_weights=facts.random_weights,
            provenance={**facts.provenance, "sampling": facts.sampling},
            versions={**options.versions, **({"torch": str(facts.device["torch"])} if "torch" in facts.device else {})},
            hashes={
                "space": space.digest,
                "search_prompts": search.digest,
                "heldout_prompts": heldout.digest,
                **({"model": str(facts.provenance["hash"])} if "hash" in facts.provenance else {}),
            },
            device=facts.device,
            engine=facts.engine,
            engine_choice=facts.engine_choice,
            heldout_engine=facts.heldout_engine,
            includes=facts.includes,
            grids=facts.grids,
            chunks=facts.chunks,
            pixels=facts.pixels,
            budget=options.budget.text,
            budget_ms=ledger.limits.budget_ms if baseline.latency else math.nan,
            limits=self.metrics if self.quality else (),
            higher_is_better=facts.higher_is_better,
            floors=dict(space.floors),
            seed=options.seed,
            micro_batch=search.micro_batch,
            search_prompts=search.texts,
            search_seeds=search.seeds,
            heldout_prompts=heldout.texts,
            heldout_seeds=heldout.seeds,
            baseline=baseline,
            candidates=tuple(sorted(everyone, key=lambda c: c.trial_number)),
            front=tuple(ledger.front()),
            picks=dict(conclusion.picks),
            verdict=conclusion.verdict,
            exit_code=EXIT_CODES[conclusion.verdict],
            reason=conclusion.reason,
            stop_reason=self.stop_reason,
            trials=self.told,
            sampled=sum(not c.source.startswith("enqueued") for c in ledger.candidates.values()),
            phases_s=dict(self.progress.seconds),
            search=self.search_facts,
            failures=tuple(ledger.failures),
            samples=tuple(samples),
            smallest_budget_ms=conclusion.smallest_budget_ms,
            nearest=conclusion.nearest,
            judged_on=tuple(self.judged_on),
            settle_heldout=conclusion.settle_heldout,
        )


def _with_scales(candidate: Measured, scale_ms: tuple[float, ...]) -> Measured:
    """The candidate with the time of each scale in its newest measurement."""
    if isinstance(candidate, Finalist):
        latency = dataclasses.replace(candidate.verification.latency, scale_ms=scale_ms)
        return dataclasses.replace(candidate, verification=dataclasses.replace(candidate.verification, latency=latency))
    return dataclasses.replace(candidate, latency=dataclasses.replace(candidate.latency, scale_ms=scale_ms))
