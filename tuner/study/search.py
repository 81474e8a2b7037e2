"""The search: rounds of proposals, each judged as a tree on rungs of prompts, until a reason to stop.

Each shortcut can be switched off (`SearchShortcuts`), as benchmarks do, and users who want every schedule measured in full.
None of them changes what is claimed: finalists are always measured again, end to end, on prompts that the search never saw.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from stagevar.errors import ScheduleError
from tuner.config.prompts import PromptSet
from tuner.evaluation.evaluator import Evaluator
from tuner.evaluation.executor import Executor, Failed, NotMeasured
from tuner.proposals.sampler_process import SamplerProcess
from tuner.proposals.sensitivity import Sensitivities
from tuner.proposals.trial_sampler import STARTUP_TRIALS, Proposal, TrialOutcome, TrialSampler
from tuner.results.candidate import Candidate, LatencyStats, Measured, Pruned, Unmeasured
from tuner.results.candidate import Failed as FailedCandidate
from tuner.results.codec import build, to_plain
from tuner.results.result import SearchFacts
from tuner.results.run_dir import EvidenceRecord
from tuner.study.ask_ahead import MOST_DUPLICATES, AskAhead, Asked, Fate, Round, Snapshot
from tuner.study.latency_source import LatencySource
from tuner.study.ledger import Ledger
from tuner.study.options import SearchShortcuts
from tuner.study.predicted_front import PredictedFront
from tuner.study.progress import Progress
from tuner.study.prompt_rungs import PromptRungs, RoundQuality
from tuner.study.searched_space import coverage_of
from tuner.study.verdict import preference
from tuner.study.verification import paired_differences

#: Share of a round's time above which waiting for the Gaussian process is not worth it.
ASK_SHARE = 0.1
_DEFAULT_SHORTCUTS = SearchShortcuts()


class Search:
    """One run of the search over a ledger, continuing from its evidence.

    Args:
        trials: distinct schedules to evaluate.
        patience: end after this many without a larger feasible hypervolume; None never ends it.
        earlier: sensitivities of another study of the model.
        out_of_time: gives why tuning time is over, or "".
        stop: asked between rounds whether to end now.

    Attributes:
        stop_reason: one line.
        told: number of trials told, repeats included.
    """

    def __init__(
        self,
        run_dir: Path,
        ledger: Ledger,
        evaluator: Evaluator,
        executor: Executor,
        search_prompts: PromptSet,
        progress: Progress,
        *,
        trials: int,
        seed: int,
        sampler: str = "auto",
        storage: str | None = None,
        patience: int | None = None,
        shortcuts: SearchShortcuts = _DEFAULT_SHORTCUTS,
        earlier: Sensitivities | None = None,
        out_of_time: Callable[[], str] = lambda: "",
        stop: Callable[[], bool] = lambda: False,
    ):
        self.ledger, self.evaluator, self.progress = ledger, evaluator, progress
        self.trials, self.seed, self.patience, self.shortcuts = trials, seed, patience, shortcuts
        self.auto, self.out_of_time, self.stop = sampler == "auto", out_of_time, stop
        self.latency = LatencySource(ledger, evaluator, progress)
        self.rungs = PromptRungs(ledger, executor, search_prompts, shortcuts)
        self.front: PredictedFront | None = None
        if shortcuts.sensitivity and ledger.quality:
            parts = ledger, executor, search_prompts, self.latency, progress
            self.front = PredictedFront(run_dir, *parts, seed, shortcuts.few, earlier)
        self.stop_reason, self.told = "", 0
        self._presets_first = 0
        self._best, self._best_at = 0.0, 0
        self._waited_s = 0.0
        self.ask_seconds: list[float] = []
        self.proposed = ""
        kind = SamplerProcess if shortcuts.overlap else TrialSampler
        self.trial_sampler = kind(run_dir, ledger.space, seed, ledger.constraint_names, sampler, storage)
        self.asking = AskAhead(self.trial_sampler, ledger.expand, beside=shortcuts.overlap)

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, records: Sequence[EvidenceRecord]) -> None:
        """Searches until a reason to stop; `records` is the evidence so far."""
        self._begin(records)
        self._loop()
        self.told = len(self.trial_sampler.completed())
        self.ask_seconds, self.proposed = list(self.trial_sampler.ask_seconds), self.trial_sampler.proposes

    def close(self) -> None:
        """Ends the proposing process; always call it."""
        self.asking.close()
        self.trial_sampler.close()

    def _begin(self, records: Sequence[EvidenceRecord]) -> None:
        ledger, facts = self.ledger, self.ledger.facts
        known: dict[int, TrialOutcome | None] = {}
        unmeasured: dict[str, Candidate] = {}
        for record in records:
            if record["kind"] == "unmeasured":
                candidate = build(Candidate, record["candidate"])
                unmeasured[candidate.key], known[candidate.trial_number] = candidate, None
            if record["kind"] == "dropped":
                ledger.dropped[record["key"]] = record["ratio"]
            if record["kind"] != "trial":
                continue
            candidate = build(Candidate, record["candidate"])
            ledger.keep(candidate)
            unmeasured.pop(candidate.key, None)
            measured = isinstance(candidate, Measured)
            known[candidate.trial_number] = ledger.outcome(candidate) if measured else None
            if measured and not candidate.latency.predicted:
                self.latency.table.check(ledger.steps[candidate.key], candidate.latency.share)
        self._note_hypervolume()
        presets, unfit = {}, []
        for name in ledger.space.known:
            try:
                schedule = ledger.space.known_schedule(name, facts.grids)
                ledger.register(schedule)
                presets[name] = ledger.space.nearest_values(schedule, facts.grids)
            except ScheduleError as error:
                unfit.append(f"{name}: {error}")
        for line in unfit:
            self.progress.say(f"skipping preset {line}")
        # Known settings are timed end to end; steps price what follows them, and whatever sensitivities predict.
        priced = self.front is not None or self.trials > len(presets)
        if self.shortcuts.table and priced and self.trials > ledger.evaluated and not self.stop():
            with self.progress.part("timing"):
                self.latency.fill_table(self.trials, self.seed)
        if self.front is not None and not self.stop():
            with self.progress.part("sensitivity"):
                self.front.fill(records, self.stop)
            self.trials = self.front.judge(self.trials)
            presets = self.front.worth_trying(presets)
        if self.stop():
            return  # before anything is enqueued: a resume measures what is missing, and may pass presets over
        for proposal in self.trial_sampler.recover(known):
            self._give_up(proposal)
        self.trial_sampler.enqueue(presets)
        self._again(list(unmeasured.values()))
        self._presets_first = len(presets)
        if self.front is not None:
            self._presets_first += self.front.propose(self.trial_sampler, self.trials)
        self._show()

    def _again(self, unmeasured: Sequence[Candidate]) -> None:
        """First proposes what ran out of memory in an earlier run: there may be more now."""
        if not unmeasured:
            return
        ledger = self.ledger
        presets = {
            c.trial_number: c.source.removeprefix("enqueued: ") for c in unmeasured if c.source.startswith("enqueued: ")
        }
        grids = ledger.facts.grids
        values = {
            c.trial_number: ledger.space.nearest_values(
                ledger.space.known_schedule(presets[c.trial_number], grids), grids
            )
            if c.trial_number in presets
            else c.params
            for c in unmeasured
        }
        self.trial_sampler.again([Proposal(trial, found, presets.get(trial)) for trial, found in values.items()])

    def _loop(self) -> None:
        round_ = Round()
        while not self._reason_to_stop():
            if not round_.new:
                with self.progress.part("asking"):
                    round_ = self._ask(self.trials - self.ledger.evaluated)
            following = self._evaluate(round_) if round_.new else Round()
            self._settle(round_.of(Fate.REPEATED))
            if round_.exhausted:
                what = "no new schedule within the budget" if self.ledger.dropped else "no new schedule"
                self.stop_reason = f"{what} in {MOST_DUPLICATES} proposals: the space is exhausted"
                return
            round_ = following
        self._withdraw(round_)

    def _reason_to_stop(self) -> bool:
        ledger = self.ledger
        if ledger.evaluated >= self.trials:
            self.stop_reason = f"as many as asked for (--trials {self.trials})"
        elif self.stop():
            self.stop_reason = "stopped by the user"
        elif self.patience is not None and ledger.evaluated - self._best_at >= self.patience:
            moved = "has not grown" if self._best else "is zero"
            self.stop_reason = f"the feasible hypervolume {moved} for {self.patience} schedules"
        else:
            self.stop_reason = self.out_of_time()
        return bool(self.stop_reason)

    def _note_hypervolume(self) -> None:
        volume = self.ledger.hypervolume()
        if volume > self._best * 1.001:
            self._best, self._best_at = volume, self.ledger.evaluated

    # ------------------------------------------------------------------------------------------------ asking

    def _ask(self, left: int) -> Round:
        """A round of new schedules, at most `left`; trials of known schedules are told right away."""
        start = time.perf_counter()
        found = self.asking.ask(self._wanted(left), self._snapshot(), each=self._take_in)
        self._say_handed_over(found)
        self._waited_s += time.perf_counter() - start
        return found

    def _ask_ahead(self, busy: Sequence[Asked]) -> None:
        """Starts asking for the next round, if there will be one, while this one is evaluated."""
        left = self.trials - self.ledger.evaluated - len(busy)
        if self.shortcuts.overlap and left >= 1 and not self.stop():
            self.asking.begin(self._wanted(left), self._snapshot(p.key for p in busy))

    def _take_ahead(self, round_s: float) -> Round:
        """The next round, if it was asked meanwhile. A Gaussian process that delays a round too long hands over to TPE."""
        start = time.perf_counter()
        with self.progress.part("waiting for asks"):
            patience_s = ASK_SHARE * round_s if self.auto else None
            # The Gaussian process is not asked before its start-up trials are evaluated.
            found = self.asking.take(patience_s, impatient=self.ledger.evaluated >= STARTUP_TRIALS)
        for asked in found.asked:
            self._take_in(asked)
        self._say_handed_over(found)
        self._waited_s += time.perf_counter() - start
        return found

    def _wanted(self, left: int) -> int:
        """Size of the next round. Presets come first and together: they share most of their steps."""
        size = self.shortcuts.batch
        if self.shortcuts.tree and self.shortcuts.batch > 1:
            size = max(size, self._presets_first)
        self._presets_first = 0
        return min(size, left)

    def _snapshot(self, busy: Iterable[str] = ()) -> Snapshot:
        return Snapshot(self.ledger.known, frozenset(busy), self.latency.hopeless)

    def _take_in(self, asked: Asked) -> None:
        """Registers what was proposed, records what is dropped and tells what is already known."""
        self.ledger.register(asked.schedule)
        if asked.fate is Fate.DROPPED:
            assert asked.ratio is not None
            self.ledger.record_dropped(asked.proposal.trial, asked.key, asked.ratio)
        if asked.fate in (Fate.DROPPED, Fate.KNOWN):
            self._tell_known(asked.proposal.trial, asked.key)

    def _say_handed_over(self, round_: Round) -> None:
        if round_.handed_over:
            self.progress.say(f"GP sampling takes more than {100 * ASK_SHARE:.0f} % of a round; switching to TPE")

    def _tell_known(self, trial: int, key: str) -> None:
        ledger = self.ledger
        if key in ledger.failed or key in ledger.unmeasured:
            self.trial_sampler.fail(trial)
        elif key in ledger.dropped:
            self.trial_sampler.tell(trial, ledger.outcome_of_dropped(key))
        else:
            self.trial_sampler.tell(
                trial, ledger.outcome(ledger.measured_baseline if key == ledger.full_key else ledger.candidates[key])
            )

    def _settle(self, repeated: Sequence[Asked]) -> None:
        for asked in repeated:
            self._tell_known(asked.proposal.trial, asked.key)

    def _withdraw(self, round_: Round) -> None:
        """Returns what was asked ahead and is no longer wanted."""
        for asked in round_.new:
            self.trial_sampler.withdraw(asked.proposal.trial)
        for asked in round_.of(Fate.REPEATED):
            if self.ledger.knows(asked.key):
                self._tell_known(asked.proposal.trial, asked.key)
            else:
                self.trial_sampler.withdraw(asked.proposal.trial)

    def _give_up(self, proposal: Proposal) -> None:
        ledger = self.ledger
        key, schedule, _ = ledger.expand(proposal)
        ledger.register(schedule)
        candidate = ledger.blank(key, proposal).becomes(FailedCandidate, error="crashed the driver process three times")
        if candidate.key not in ledger.candidates and candidate.key not in ledger.failed:
            ledger.record("trial", candidate)
            ledger.keep(candidate)

    # ------------------------------------------------------------------------------------------------ one round

    def _evaluate(self, round_: Round) -> Round:
        """Measures a round, writes the evidence, tells the sampler; returns the next round if it was asked meanwhile."""
        began = time.perf_counter()
        ledger, pending = self.ledger, round_.new
        self.trial_sampler.begin([p.proposal.trial for p in pending])
        with self.progress.part("timing"):
            latencies, errors = self.latency.measure(pending)
        if not round_.exhausted:
            self._ask_ahead(pending)
        alive = [p for p in pending if p.key not in errors]
        found = RoundQuality({p.key: {} for p in alive})
        if ledger.quality and alive:
            with self.progress.part("quality"):
                found = self.rungs.evaluate(alive, latencies)
        errors |= found.errors
        candidates: list[Measured | FailedCandidate | Unmeasured] = []
        for p in pending:
            blank = ledger.blank(p.key, p.proposal)
            if p.key in errors:
                candidates.append(_without_values(blank, errors[p.key]))
            else:
                pruned = found.pruned.get(p.key)
                candidates.append(self._measured(blank, latencies[p.key], found.values[p.key], pruned))
            ledger.record("unmeasured" if isinstance(candidates[-1], Unmeasured) else "trial", candidates[-1])
        following = self._take_ahead(time.perf_counter() - began)
        for candidate in candidates:
            ledger.keep(candidate)
            if isinstance(candidate, Measured):
                self.trial_sampler.tell(candidate.trial_number, ledger.outcome(candidate))
            else:
                self.trial_sampler.fail(candidate.trial_number)
        self._note_hypervolume()
        if self.front is not None:
            self.trials = self.front.judge(self.trials)
            self.front.propose(self.trial_sampler, self.trials)
        self._show()
        return following

    def _measured(
        self,
        candidate: Candidate,
        latency: LatencyStats,
        values: dict[str, tuple[float, ...]],
        pruned: str | None,
    ) -> Measured:
        ledger = self.ledger
        count = len(values.get("quality", ()))
        base = {metric: v[:count] for metric, v in ledger.measured_baseline.values.items()}
        differences = paired_differences(values, base, ledger.facts.higher_is_better)
        measured = candidate.becomes(Measured, latency=latency, values=values, differences=differences)
        return ledger.with_verdicts(measured if pruned is None else measured.becomes(Pruned, stopped_early=pruned))

    # ------------------------------------------------------------------------------------------------ what to show

    def _show(self) -> None:
        ledger = self.ledger
        feasible = [c for c in ledger.candidates.values() if c.feasible]
        if not feasible:
            line = f"{ledger.evaluated} of {self.trials} schedules, none within the limits yet"
        else:
            best = max(feasible, key=preference)
            gain = ledger.measured_baseline.latency.median_ms / best.latency.drift_corrected_ms
            line = f"{ledger.evaluated} of {self.trials} schedules, best so far {gain:.2f}x"
            if ledger.quality:
                primary = ledger.metrics[0].metric
                line += f", {primary} {best.differences[primary].mean:+.3g}"
        self.progress.update(ledger.evaluated, line)

    def facts(self) -> SearchFacts:
        """How the search saved work, for the result."""
        ledger, evaluator, table = self.ledger, self.evaluator, self.latency.table
        shortcuts = dataclasses.replace(self.shortcuts, table=self.shortcuts.table and not self.latency.could_not_time)
        predicted = [c for c in ledger.candidates.values() if c.latency.predicted]
        return {
            "savings": dataclasses.asdict(shortcuts),
            "stopped_early": sum(isinstance(c, Pruned) for c in ledger.candidates.values()),
            "dropped": len(ledger.dropped),
            "predicted": len(predicted),
            "table_error": float(table.error) if np.isfinite(table.error) else None,
            "table_checks": table.checks,
            "prompts_run": self.rungs.prompts_run,
            "scales_run": evaluator.scales_run,
            "scales_alone": evaluator.scales_alone,
            "hypervolume": ledger.hypervolume(),
            "ask_seconds": [round(s, 4) for s in self.ask_seconds],
            "waited_s": round(self._waited_s, 3),
            "proposing_at_the_end": self.proposed,
            **({} if self.front is None else {"prediction": self.front.facts()}),
            "space": to_plain(dataclasses.asdict(coverage_of(ledger, table, self.seed))),
        }


def _without_values(candidate: Candidate, outcome: Failed) -> FailedCandidate | Unmeasured:
    if isinstance(outcome, NotMeasured):
        return candidate.becomes(Unmeasured, error=f"{Unmeasured.state} here: {outcome.error}")
    return candidate.becomes(FailedCandidate, error=outcome.error)
