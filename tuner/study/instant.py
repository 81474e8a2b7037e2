"""A schedule within minutes, without judging a single image: `--effort instant`.

Steps are timed as for a search, and a few schedules end to end. Quality comes from an earlier study's sensitivities, if there
are any (`--from`), else from what the space knows beforehand: its proposals, then published settings. Nothing is claimed
about it, so the verdict and the profile are "unverified".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagevar.errors import ScheduleError
from stagevar.schedule import Steps
from tuner.proposals.trial_sampler import Proposal
from tuner.results.candidate import Candidate, Failed, LatencyStats, Measured
from tuner.results.result import StudyResult
from tuner.study.finalist_times import BASELINE, timed_stats
from tuner.study.latency_source import SEARCH_ROUNDS, LatencySource
from tuner.study.predicted_front import PredictedFront
from tuner.study.study import Study
from tuner.study.verdict import LEAST_GAIN, Conclusion

#: Schedules that are timed end to end, best first.
TIMED = 3
#: Schedules drawn for the table of step costs, as in a search with few trials.
TABLE_TRIALS = 4


@dataclass(frozen=True)
class Choice:
    """A schedule that may be picked; `quality` is the predicted composite in allowances, None if nothing predicts it."""

    proposal: Proposal
    key: str
    ratio: float
    quality: float | None


class InstantStudy(Study):
    """Picks a schedule by step costs and by what is already known about quality. Takes the arguments of a `Study`."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.quality = self.ledger.quality = self.progress.judged = False

    def run(self) -> StudyResult:
        """Full schedule, step costs, a few timings and a pick; returns the result, which is also in study.json."""
        self.check_identity()
        self._run_baseline(())
        self.progress.phase("timing", 100)
        baseline = self.ledger.baseline
        if isinstance(baseline, Failed):
            result = self._result(Conclusion("failed", f"the full schedule failed: {baseline.error}"))
        else:
            result = self._result(self._choose())
        result.save(self.run_dir)
        return result

    def _choose(self) -> Conclusion:
        ledger = self.ledger
        latency = LatencySource(ledger, self.evaluator, self.progress)
        names = self._known()
        latency.fill_table(TABLE_TRIALS, self.options.seed)
        source, choices = self._choices(latency, names)
        timed = self._timed([choice for choice in choices if choice.ratio <= ledger.budget_ratio][:TIMED])
        self.told, self.stop_reason = len(timed), "no quality was measured"
        within = [(c, stats) for c, stats in timed if stats.share <= ledger.budget_ratio]
        if not within:
            reason = f"no known schedule is predicted to meet {self.options.budget.text}; use --effort quick"
            return Conclusion("unverified", reason, nearest=tuple(c.key for c, _ in timed))
        pick, stats = within[0]
        quality = next(choice.quality for choice in choices if choice.key == pick.key)
        foretold = "" if quality is None else f", predicted to use up {max(0.0, -quality):.2f} of the allowed drop"
        reason = f"{stats.speedup_text}{foretold}; chosen by {source}, no quality was measured"
        return Conclusion("unverified", reason, {"pick": pick.key})

    def _known(self) -> list[str]:
        """Registers the space's schedules that fit the model; returns their names."""
        fitting = []
        for name in self.space.known:
            try:
                self.ledger.register(self.space.known_schedule(name, self.facts.grids))
                fitting.append(name)
            except ScheduleError:
                continue
        return fitting

    def _choices(self, latency: LatencySource, names: Sequence[str]) -> tuple[str, list[Choice]]:
        """What may be picked, best first, and what that order is based on."""
        ledger = self.ledger
        front = PredictedFront(
            *(self.run_dir, ledger, self.executor, self.prompts["search"], latency, self.progress, self.options.seed),
            earlier=self.options.earlier,
        )
        predicts = front.take_earlier()
        known = [self._choice(front, Proposal(number, {}, name)) for number, name in enumerate(names, 1)]
        if predicts:
            drawn = [
                Choice(Proposal(number, forecast.values), forecast.key, forecast.ratio, forecast.quality)
                for number, forecast in enumerate(front.forecasts, len(known) + 1)
            ]
            ranked = [choice for choice in (*known, *drawn) if choice.quality is not None]
            tokens = self._tokens(ranked)
            ranked.sort(key=lambda choice: (round(choice.quality or 0.0, 6), tokens[choice.key]), reverse=True)
            return "an earlier study's sensitivities", ranked
        proposals = {name for name, _ in self.space.proposals}
        tokens = self._tokens(known)
        known.sort(key=lambda choice: (choice.proposal.preset in proposals, tokens[choice.key]), reverse=True)
        return "the space's proposals and published settings", known

    def _choice(self, front: PredictedFront, proposal: Proposal) -> Choice:
        key, _, steps = self.ledger.expand(proposal)
        forecast = front.forecast(proposal.values, steps, key)
        if forecast is None:
            return Choice(proposal, key, front.ratio(steps), None)
        return Choice(proposal, key, forecast.ratio, forecast.quality)

    def _tokens(self, choices: Sequence[Choice]) -> dict[str, float]:
        """Token rows by key: among equals, the less accelerated schedule is picked."""
        chunks = self.facts.chunks
        return {
            choice.key: sum(step.processed_tokens(chunks) for step in self.ledger.expand(choice.proposal)[2])
            for choice in choices
        }

    def _timed(self, choices: Sequence[Choice]) -> list[tuple[Candidate, LatencyStats]]:
        """Candidates that are faster than the full schedule, timed end to end in turn with it."""
        ledger = self.ledger
        done: list[tuple[Candidate, LatencyStats]] = []
        schedules: dict[str, Steps] = {}
        proposals: Mapping[str, Proposal] = {choice.key: choice.proposal for choice in choices}
        for choice in choices:
            key, schedule, steps = ledger.expand(choice.proposal)
            ledger.register(schedule)
            schedules[key] = steps
        if not schedules:
            return done
        found = self.evaluator.latency({BASELINE: ledger.full, **schedules}, SEARCH_ROUNDS)
        for key in schedules:
            stats = timed_stats(found[key], found[BASELINE], ledger.limits.baseline_ms)
            candidate = ledger.blank(key, proposals[key]).becomes(Measured, latency=stats)
            ledger.candidates[key] = ledger.with_verdicts(candidate)
            if stats.share <= LEAST_GAIN:
                done.append((ledger.candidates[key], stats))
        return done
