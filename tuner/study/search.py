"""The search: rounds of proposals, each judged as a tree on rungs of prompts, until a reason to stop.

What makes it cheap can be switched off one by one (`Savings`), and is, by benchmarks and by users who want every schedule
measured to the end. Nothing here changes what is claimed: finalists are always measured again, end to end, on prompts that
the search never saw.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stagevar.errors import InfrastructureError, OutOfDeviceMemory, ScheduleError, first_line
from stagevar.schedule import Steps
from tuner.config.prompts import PromptSet
from tuner.config.space import draws, steps_key
from tuner.evaluation.evaluator import Evaluator
from tuner.evaluation.executor import Executor, Failed, NotMeasured, QualityTask
from tuner.evaluation.step_costs import TOLERANCE, StepCosts
from tuner.proposals.sampler_process import ProposerProcess
from tuner.proposals.trial_sampler import STARTUP_TRIALS, Proposal, Proposer, Told
from tuner.results.candidate import Candidate, LatencyStats
from tuner.results.codec import build
from tuner.statistics.pruning import clearly_worse, promoted, rungs
from tuner.study.ledger import Ledger
from tuner.study.options import ROUND, Savings
from tuner.study.progress import Progress
from tuner.study.verdict import preference
from tuner.study.verification import BASELINE, latency_stats, paired_differences

#: State of a candidate that found too little memory, and how its error begins.
NOT_MEASURED = "not measured"
SEARCH_ROUNDS = 7
#: Warm-up runs per schedule in the search at most; a noisy machine never settles, and finalists are measured again.
SEARCH_WARM_UP = 4
#: Schedules drawn from the space whose steps fill the table, and the timed walks over them.
TABLE_SCHEDULES, TABLE_ROUNDS = 24, 3
#: While schedules are predicted, one of every so many rounds is timed, to keep the error honest.
CHECK_EVERY = 4
#: Share of a round's time above which waiting for the Gaussian process is not worth it.
ASK_SHARE = 0.1
_MOST_DUPLICATES = 60
_DEFAULT_SAVINGS = Savings()


@dataclass(frozen=True)
class _Pending:
    """A proposal that has to be evaluated."""

    proposal: Proposal
    steps: Steps
    key: str


@dataclass
class _Round:
    """What was asked together. repeated: trials that stand for a schedule of this round or the one before."""

    pending: list[_Pending] = field(default_factory=list)
    repeated: list[tuple[int, str]] = field(default_factory=list)
    exhausted: bool = False


class Search:
    """One run of the search over a ledger, from wherever its evidence stands.

    Args:
        trials: distinct schedules to evaluate. patience: end when the feasible hypervolume has not moved for so many; None
            never. out_of_time: why tuning time is over, or "". stop: asked between rounds whether to end now.

    Attributes: stop_reason: one line. told: trials told, repeats included.
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
        savings: Savings = _DEFAULT_SAVINGS,
        out_of_time: Callable[[], str] = lambda: "",
        stop: Callable[[], bool] = lambda: False,
    ):
        self.ledger, self.evaluator, self.executor, self.prompts = ledger, evaluator, executor, search_prompts
        self.progress, self.trials, self.seed, self.patience, self.savings = progress, trials, seed, patience, savings
        self.auto, self.out_of_time, self.stop = sampler == "auto", out_of_time, stop
        self.table = StepCosts(ledger.full, ledger.facts.chunks)
        self.stop_reason, self.told = "", 0
        self._presets_first = 0
        self._gave_up_table = False
        self._rounds = 0
        self._best, self._best_at = 0.0, 0
        self._prompts_run = 0
        self._asked_s = self._waited_s = 0.0
        self.ask_seconds: list[float] = []
        self.proposed = ""
        kind = ProposerProcess if savings.overlap else Proposer
        self.proposer = kind(run_dir, ledger.space, seed, ledger.constraint_names, sampler, storage)
        self._thread = ThreadPoolExecutor(1) if savings.overlap else None
        self._impatient = threading.Event()

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Searches until a reason to stop; `records` is the evidence so far."""
        self._begin(records)
        self._loop()
        self.told = len(self.proposer.completed())
        self.ask_seconds, self.proposed = list(self.proposer.ask_seconds), self.proposer.proposes

    def close(self) -> None:
        """Ends the proposing process; to be called whatever happened."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self.proposer.close()

    def _begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        ledger, facts = self.ledger, self.ledger.facts
        known: dict[int, Told | None] = {}
        unmeasured: dict[str, Candidate] = {}
        for record in records:
            if record["kind"] == "unmeasured":
                candidate = build(Candidate, record["candidate"])
                unmeasured[candidate.key], known[candidate.trial] = candidate, None
            if record["kind"] == "dropped":
                ledger.dropped[record["key"]] = record["ratio"]
            if record["kind"] != "trial":
                continue
            candidate = build(Candidate, record["candidate"])
            ledger.keep(candidate)
            unmeasured.pop(candidate.key, None)
            known[candidate.trial] = ledger.told(candidate) if candidate.state == "complete" else None
            if candidate.state == "complete" and not candidate.latency.predicted:
                self.table.check(ledger.steps[candidate.key], candidate.latency.ratio.mean)
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
        if self.savings.table and self.trials > max(len(presets), ledger.evaluated):
            with self.progress.part("timing"):
                self._fill_table()
        for proposal in self.proposer.recover(known):
            self._give_up(proposal)
        self.proposer.enqueue(presets)
        self._again(list(unmeasured.values()))
        self._presets_first = len(presets)
        self._show()

    def _again(self, unmeasured: Sequence[Candidate]) -> None:
        """Proposes first what an earlier run found too little memory for: there may be more now."""
        if not unmeasured:
            return
        ledger = self.ledger
        presets = {
            c.trial: c.source.removeprefix("enqueued: ") for c in unmeasured if c.source.startswith("enqueued: ")
        }
        grids = ledger.facts.grids
        values = {
            c.trial: ledger.space.nearest_values(ledger.space.known_schedule(presets[c.trial], grids), grids)
            if c.trial in presets
            else c.params
            for c in unmeasured
        }
        self.proposer.again([Proposal(trial, found, presets.get(trial)) for trial, found in values.items()])

    def _loop(self) -> None:
        round_ = _Round()
        while not self._reason_to_stop():
            if not round_.pending:
                start = time.perf_counter()
                with self.progress.part("asking"):
                    round_ = self._ask(self.trials - self.ledger.evaluated, frozenset())
                self._waited_s += time.perf_counter() - start
            following = self._evaluate(round_) if round_.pending else _Round()
            self._settle(round_.repeated)
            if round_.exhausted:
                what = "no new schedule within the budget" if self.ledger.dropped else "no new schedule"
                self.stop_reason = f"{what} in {_MOST_DUPLICATES} proposals: the space is exhausted"
                return
            round_ = following
        self._withdraw(round_)

    def _reason_to_stop(self) -> bool:
        ledger = self.ledger
        if ledger.evaluated >= self.trials:
            self.stop_reason = f"{self.trials} schedules were evaluated"
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

    def _ask(self, left: int, busy: frozenset[str]) -> _Round:
        """A round of new schedules, at most `left`; trials whose schedule is known are told at once.

        busy: keys under evaluation. Presets come first and together: they share most of their steps.
        """
        start = time.perf_counter()
        ledger, size = self.ledger, self.savings.batch
        if self.savings.tree and self.savings.batch > 1:
            size = max(size, self._presets_first)
        self._presets_first = 0
        missing, found, seen, misses = min(size, left), _Round(), set(busy), 0
        while len(found.pending) < missing and misses < _MOST_DUPLICATES:
            if self._impatient.is_set():
                self._impatient.clear()
                self._hand_over()
            proposal = self.proposer.ask(random=misses > ROUND)
            key = self._register(proposal)
            if key in seen:
                found.repeated.append((proposal.trial, key))
            elif ledger.knows(key):
                self._tell_known(proposal.trial, key)
            elif proposal.preset is None and (ratio := self._hopeless(key)) is not None:
                ledger.record_dropped(proposal.trial, key, ratio)
                self._tell_known(proposal.trial, key)
            else:
                seen.add(key)
                found.pending.append(_Pending(proposal, ledger.steps[key], key))
                continue
            misses += 1
        found.exhausted = len(found.pending) < missing
        self._asked_s += time.perf_counter() - start
        return found

    def _register(self, proposal: Proposal) -> str:
        ledger, grids = self.ledger, self.ledger.facts.grids
        if proposal.preset is not None:
            return ledger.register(ledger.space.known_schedule(proposal.preset, grids))
        return ledger.register(ledger.space.schedule(proposal.values, grids))

    def _hopeless(self, key: str) -> float | None:
        """The predicted ratio of a schedule that is beyond the budget by more than the table may err, else None."""
        steps = self.ledger.steps[key]
        if not self._predicts(steps):
            return None
        prediction = self.table.predict(steps)
        least = prediction.ratio * (1 - 2 * prediction.error)
        return prediction.ratio if least > self.ledger.budget_ratio else None

    def _tell_known(self, trial: int, key: str) -> None:
        ledger = self.ledger
        if key in ledger.failed or key in ledger.unmeasured:
            self.proposer.fail(trial)
        elif key in ledger.dropped:
            self.proposer.tell(trial, ledger.told_dropped(key))
        else:
            self.proposer.tell(
                trial, ledger.told(ledger.baseline if key == ledger.full_key else ledger.candidates[key])
            )

    def _settle(self, repeated: Sequence[tuple[int, str]]) -> None:
        for trial, key in repeated:
            self._tell_known(trial, key)

    def _withdraw(self, round_: _Round) -> None:
        """Gives back what was asked ahead and is not wanted any more."""
        for pending in round_.pending:
            self.proposer.withdraw(pending.proposal.trial)
        for trial, key in round_.repeated:
            if self.ledger.knows(key):
                self._tell_known(trial, key)
            else:
                self.proposer.withdraw(trial)

    def _give_up(self, proposal: Proposal) -> None:
        ledger = self.ledger
        candidate = ledger.blank(self._register(proposal), proposal)
        candidate = dataclasses.replace(candidate, state="failed", error="crashed the driver process three times")
        if candidate.key not in ledger.candidates and candidate.key not in ledger.failed:
            ledger.record("trial", candidate)
            ledger.keep(candidate)

    # ------------------------------------------------------------------------------------------------ one round

    def _evaluate(self, round_: _Round) -> _Round:
        """Measures a round, writes the evidence, tells the sampler; returns the next round where it was asked meanwhile."""
        began = time.perf_counter()
        asked = self._asked_s
        ledger, pending = self.ledger, round_.pending
        self._rounds += 1
        self.proposer.begin([p.proposal.trial for p in pending])
        with self.progress.part("timing"):
            latencies, errors = self._latencies(pending)
        ahead = None if round_.exhausted else self._ask_ahead(pending)
        alive = [p for p in pending if p.key not in errors]
        values: dict[str, dict[str, tuple[float, ...]]] = {p.key: {} for p in alive}
        stopped: dict[str, str] = {}
        if ledger.quality and alive:
            with self.progress.part("quality"):
                values, stopped, broken = self._judge(alive, latencies)
            errors |= broken
        found = []
        for p in pending:
            candidate = ledger.blank(p.key, p.proposal)
            if p.key in errors:
                candidate = self._without_values(candidate, errors[p.key])
            else:
                candidate = self._measured(candidate, latencies[p.key], values[p.key], stopped.get(p.key))
            ledger.record("unmeasured" if candidate.state == NOT_MEASURED else "trial", candidate)
            found.append(candidate)
        start = time.perf_counter()
        with self.progress.part("waiting for asks"):
            following = self._await(ahead, start - began) if ahead is not None else _Round()
        self._waited_s += time.perf_counter() - start
        for candidate in found:
            ledger.keep(candidate)
            if candidate.state == "complete":
                self.proposer.tell(candidate.trial, ledger.told(candidate))
            else:
                self.proposer.fail(candidate.trial)
        self._note_hypervolume()
        self._show()
        if self._thread is None:
            self._judge_sampler(self._asked_s - asked, time.perf_counter() - began)
        return following

    @staticmethod
    def _without_values(candidate: Candidate, outcome: Failed) -> Candidate:
        if isinstance(outcome, NotMeasured):
            return dataclasses.replace(candidate, state=NOT_MEASURED, error=f"{NOT_MEASURED} here: {outcome.error}")
        return dataclasses.replace(candidate, state="failed", error=outcome.error)

    def _ask_ahead(self, pending: Sequence[_Pending]) -> Future[_Round] | None:
        left = self.trials - self.ledger.evaluated - len(pending)
        if self._thread is None or left < 1 or self.stop():
            return None
        return self._thread.submit(self._ask, left, frozenset(p.key for p in pending))

    def _await(self, ahead: Future[_Round], round_s: float) -> _Round:
        """The next round. Asks that hold this one up by more than their share are the Gaussian process's last."""
        try:
            return ahead.result(timeout=ASK_SHARE * round_s if self.auto else None)
        except TimeoutError:
            if self.ledger.evaluated >= STARTUP_TRIALS:  # before that nothing was asked of it
                self._impatient.set()
            return ahead.result()

    def _judge_sampler(self, asking_s: float, round_s: float) -> None:
        """Hands over to TPE when asks take too much of a round; here nothing runs beside them."""
        if self.auto and self.ledger.evaluated > STARTUP_TRIALS and asking_s > ASK_SHARE * round_s:
            self._hand_over()

    def _hand_over(self) -> None:
        if self.proposer.proposes == "gp":
            self.proposer.hand_over()
            self.progress.say(f"GP sampling takes more than {100 * ASK_SHARE:.0f} % of a round; switching to TPE")

    def _measured(
        self,
        candidate: Candidate,
        latency: LatencyStats,
        values: dict[str, tuple[float, ...]],
        stopped: str | None,
    ) -> Candidate:
        ledger = self.ledger
        count = len(values.get("quality", ()))
        base = {metric: v[:count] for metric, v in ledger.baseline.values.items()}
        differences = paired_differences(values, base, ledger.facts.higher_is_better)
        return ledger.judged(
            dataclasses.replace(
                candidate, latency=latency, values=values, differences=differences, stopped_early=stopped
            )
        )

    # ------------------------------------------------------------------------------------------------ quality

    def _judge(
        self, alive: Sequence[_Pending], latencies: Mapping[str, LatencyStats]
    ) -> tuple[dict[str, dict[str, tuple[float, ...]]], dict[str, str], dict[str, Failed]]:
        """Values per metric and prompt by key; why some were stopped early; why others have no values."""
        batches = self.prompts.batches
        looks = rungs(batches) if self.savings.rungs else [batches]
        values: dict[str, dict[str, list[float]]] = {p.key: {} for p in alive}
        stopped: dict[str, str] = {}
        errors: dict[str, Failed] = {}
        running, done = list(alive), 0
        for look in looks:
            gathered: dict[Steps, dict[int, Any]] = {p.steps: {} for p in running}
            for task, outcomes in self.executor.run(self._tasks(list(gathered), range(done, look))):
                for steps, outcome in zip(task.schedules, outcomes, strict=True):
                    gathered[steps][task.batch] = outcome
                if self.savings.tree and all(isinstance(outcome, Failed) for outcome in outcomes):
                    break  # no prompt could mend it
            for p in running:
                parts = [gathered[p.steps][batch] for batch in sorted(gathered[p.steps])]
                failed = [part for part in parts if isinstance(part, Failed)]
                if failed:
                    # One that fails on some prompts has failed, whatever others found too little memory for.
                    errors[p.key] = next((f for f in failed if not isinstance(f, NotMeasured)), failed[0])
                    continue
                for part in parts:
                    for metric, row in part.items():
                        values[p.key].setdefault(metric, []).extend(float(v) for v in row)
            running, done = [p for p in running if p.key not in errors], look
            if look < batches and running:
                stopped |= self._stop_early(running, values, latencies)
                running = [p for p in running if p.key not in stopped]
            if not running:
                break
        whole = {key: {m: tuple(v) for m, v in rows.items()} for key, rows in values.items()}
        self._prompts_run += sum(len(rows.get("quality", ())) for rows in whole.values())
        return whole, stopped, errors

    def _tasks(self, schedules: Sequence[Steps], batches: Sequence[int]) -> list[QualityTask]:
        """One task per micro-batch for all schedules, or one for each where they are not walked as a tree."""
        groups = [tuple(schedules)] if self.savings.tree else [(steps,) for steps in schedules]
        return [QualityTask(group, "search", batch) for group in groups for batch in batches]

    def _stop_early(
        self,
        running: Sequence[_Pending],
        values: Mapping[str, Mapping[str, Sequence[float]]],
        latencies: Mapping[str, LatencyStats],
    ) -> dict[str, str]:
        ledger = self.ledger
        rivals, base = ledger.rivals(), ledger.baseline.values
        found = {}
        for p in running:
            ratio = latencies[p.key].ratio.mean
            why = clearly_worse(values[p.key], ratio, base, ledger.metrics, rivals)
            if why is not None:
                found[p.key] = why
        left = [p for p in running if p.key not in found]
        seen = len(left) and len(values[left[0].key]["quality"])
        if len(left) + len(rivals) >= STARTUP_TRIALS and left:
            points = [(latencies[p.key].ratio.mean, float(np.mean(values[p.key]["quality"]))) for p in left]
            points += [(ratio, float(np.mean(theirs[:seen]))) for ratio, theirs in rivals.values()]
            best = set(promoted(points))
            for index, p in enumerate(left):
                if index not in best:
                    found[p.key] = f"in the last quarter by non-dominated rank on {seen} prompts"
        return found

    # ------------------------------------------------------------------------------------------------ latency

    def _latencies(self, pending: Sequence[_Pending]) -> tuple[dict[str, LatencyStats], dict[str, Failed]]:
        """Latency by key, predicted where the table may be trusted and timed end to end elsewhere; errors by key."""
        predicted = {p.key for p in pending if p.proposal.preset is None and self._predicts(p.steps)}
        if predicted and self._rounds % CHECK_EVERY == 0:
            predicted.discard(next(p.key for p in pending if p.key in predicted))
        timings, errors = self._timings({p.key: p.steps for p in pending if p.key not in predicted})
        full_ms = self.ledger.baseline.latency.median_ms
        found = {}
        for p in pending:
            if p.key in predicted:
                found[p.key] = self.ledger.predicted(self.table.predict(p.steps))
            elif p.key not in errors:
                timing, sentinel = timings[p.key]
                found[p.key] = latency_stats(
                    timing.samples_ms,
                    sentinel.samples_ms,
                    full_ms,
                    timing.warm_up_runs,
                    timing.warmed,
                    timing.disturbed,
                    timing.card,
                )
                self.table.check(p.steps, found[p.key].ratio.mean)
        return found, errors

    def _predicts(self, steps: Steps) -> bool:
        if not self.table.covers(steps):
            return False
        if not self.table.trusted and np.isfinite(self.table.error) and not self._gave_up_table:
            self._gave_up_table = True
            self.progress.say(
                f"step-cost model error is {100 * self.table.error:.1f} % (limit {100 * TOLERANCE:.0f} %); "
                "timing schedules end to end"
            )
        return self.table.trusted

    def _fill_table(self) -> None:
        """Times the steps of the presets and of schedules drawn from all over the space, one image at a time."""
        time_steps = getattr(self.evaluator, "step_ms", None)
        if time_steps is None:
            return
        ledger = self.ledger
        chosen = {ledger.full_key: ledger.full}
        chosen |= {key: steps for key, steps in ledger.steps.items() if self.table.covers(steps)}
        wanted = len(chosen) + min(TABLE_SCHEDULES, 3 * self.trials)
        for steps in draws(ledger.space, ledger.facts.grids, ledger.facts.chunks, self.seed, 20 * wanted):
            if len(chosen) >= wanted:
                break
            if self.table.covers(steps):
                chosen.setdefault(steps_key(steps), steps)
        try:
            self.table.observe(time_steps(list(chosen.values()), TABLE_ROUNDS))
        except Exception as error:
            if isinstance(error, InfrastructureError) and not isinstance(error, OutOfDeviceMemory):
                raise
            self.savings = dataclasses.replace(self.savings, table=False)
            self.progress.say(f"could not time individual steps; timing schedules end to end: {first_line(error)}")

    def _timings(self, schedules: Mapping[str, Steps]) -> tuple[dict[str, tuple[Any, Any]], dict[str, Failed]]:
        """Timing and the full schedule's in the same rounds, by key; and why others have none."""
        if not schedules:
            return {}, {}
        try:
            found = self.evaluator.latency({BASELINE: self.ledger.full, **schedules}, SEARCH_ROUNDS, SEARCH_WARM_UP)
            return {key: (found[key], found[BASELINE]) for key in schedules}, {}
        except OutOfDeviceMemory as error:
            if len(schedules) == 1:
                return {}, dict.fromkeys(schedules, NotMeasured(str(error)))
        except InfrastructureError:
            raise
        except Exception as error:
            if len(schedules) == 1:
                return {}, dict.fromkeys(schedules, Failed(first_line(error)))
        timings, broken = {}, {}
        for key, steps in schedules.items():
            one, bad = self._timings({key: steps})
            timings |= one
            broken |= bad
        return timings, broken

    # ------------------------------------------------------------------------------------------------ what to show

    def _show(self) -> None:
        ledger = self.ledger
        feasible = [c for c in ledger.candidates.values() if c.feasible]
        if not feasible:
            line = f"{ledger.evaluated} of {self.trials} schedules, none within the limits yet"
        else:
            best = max(feasible, key=preference)
            gain = ledger.baseline.latency.median_ms / best.latency.drift_corrected_ms
            line = f"{ledger.evaluated} of {self.trials} schedules, best so far {gain:.2f}x"
            if ledger.quality:
                primary = ledger.metrics[0].metric
                line += f", {primary} {best.differences[primary].mean:+.3g}"
        self.progress.update(ledger.evaluated, line)

    def facts(self) -> dict[str, Any]:
        """How the search saved work, for the result."""
        ledger, evaluator = self.ledger, self.evaluator
        predicted = [c for c in ledger.candidates.values() if c.latency and c.latency.predicted]
        return {
            "savings": dataclasses.asdict(self.savings),
            "stopped_early": sum(c.stopped_early is not None for c in ledger.candidates.values()),
            "dropped": len(ledger.dropped),
            "predicted": len(predicted),
            "table_error": float(self.table.error) if np.isfinite(self.table.error) else None,
            "table_checks": self.table.checks,
            "prompts_run": self._prompts_run,
            "scales_run": getattr(evaluator, "scales_run", None),
            "scales_alone": getattr(evaluator, "scales_alone", None),
            "hypervolume": ledger.hypervolume(),
            "ask_seconds": [round(s, 4) for s in self.ask_seconds],
            "waited_s": round(self._waited_s, 3),
            "proposing_at_the_end": self.proposed,
        }
