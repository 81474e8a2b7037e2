"""Quality of a round's schedules on growing parts of the search prompts; clearly worse ones are not run on the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stagevar.schedule import Steps
from tuner.config.prompts import PromptSet
from tuner.evaluation.executor import Executor, Failed, NotMeasured, QualityTask
from tuner.proposals.trial_sampler import STARTUP_TRIALS
from tuner.results.candidate import LatencyStats
from tuner.statistics.pruning import prune_reason, rungs, top_by_rank
from tuner.study.ask_ahead import Asked
from tuner.study.ledger import Ledger
from tuner.study.options import SearchShortcuts


@dataclass
class RoundQuality:
    """The quality of one round.

    Attributes:
        values: per prompt, by key and metric.
        pruned: why schedules were pruned, by key.
        errors: why schedules have no values, by key.
    """

    values: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    pruned: dict[str, str] = field(default_factory=dict)
    errors: dict[str, Failed] = field(default_factory=dict)


class PromptRungs:
    """Evaluates rounds on rungs of prompts.

    Attributes:
        prompts_run: how many images' worth of prompts were evaluated.
    """

    def __init__(self, ledger: Ledger, executor: Executor, prompts: PromptSet, shortcuts: SearchShortcuts):
        self.ledger, self.executor, self.prompts, self.shortcuts = ledger, executor, prompts, shortcuts
        self.prompts_run = 0

    def evaluate(self, alive: Sequence[Asked], latencies: Mapping[str, LatencyStats]) -> RoundQuality:
        """Values per metric and prompt of the schedules that have a latency."""
        batches = self.prompts.batches
        looks = rungs(batches) if self.shortcuts.rungs else [batches]
        values: dict[str, dict[str, list[float]]] = {p.key: {} for p in alive}
        pruned: dict[str, str] = {}
        errors: dict[str, Failed] = {}
        running, done = list(alive), 0
        for look in looks:
            gathered: dict[Steps, dict[int, Any]] = {p.steps: {} for p in running}
            for task, outcomes in self.executor.run(self._tasks(list(gathered), range(done, look))):
                for steps, outcome in zip(task.schedules, outcomes, strict=True):
                    gathered[steps][task.batch] = outcome
                if self.shortcuts.tree and all(isinstance(outcome, Failed) for outcome in outcomes):
                    break  # no further prompt could change that
            for p in running:
                parts = [gathered[p.steps][batch] for batch in sorted(gathered[p.steps])]
                failed = [part for part in parts if isinstance(part, Failed)]
                if failed:
                    # A schedule that fails on some prompts has failed, even if others only ran out of memory.
                    errors[p.key] = next((f for f in failed if not isinstance(f, NotMeasured)), failed[0])
                    continue
                for part in parts:
                    for metric, row in part.items():
                        values[p.key].setdefault(metric, []).extend(float(v) for v in row)
            running, done = [p for p in running if p.key not in errors], look
            if look < batches and running:
                pruned |= self._prune(running, values, latencies)
                running = [p for p in running if p.key not in pruned]
            if not running:
                break
        whole = {key: {m: tuple(v) for m, v in rows.items()} for key, rows in values.items()}
        self.prompts_run += sum(len(rows.get("quality", ())) for rows in whole.values())
        return RoundQuality(whole, pruned, errors)

    def _tasks(self, schedules: Sequence[Steps], batches: Sequence[int]) -> list[QualityTask]:
        """One task per micro-batch for all schedules, or one for each schedule if they are not walked as a tree."""
        groups = [tuple(schedules)] if self.shortcuts.tree else [(steps,) for steps in schedules]
        return [QualityTask(group, "search", batch) for group in groups for batch in batches]

    def _prune(
        self,
        running: Sequence[Asked],
        values: Mapping[str, Mapping[str, Sequence[float]]],
        latencies: Mapping[str, LatencyStats],
    ) -> dict[str, str]:
        ledger = self.ledger
        rivals, base = ledger.rivals(), ledger.measured_baseline.values
        reasons = {}
        for p in running:
            ratio = latencies[p.key].share
            why = prune_reason(values[p.key], ratio, base, ledger.metrics, rivals)
            if why is not None:
                reasons[p.key] = why
        left = [p for p in running if p.key not in reasons]
        seen = len(left) and len(values[left[0].key]["quality"])
        if len(left) + len(rivals) >= STARTUP_TRIALS and left:
            points = [(latencies[p.key].share, float(np.mean(values[p.key]["quality"]))) for p in left]
            points += [(ratio, float(np.mean(theirs[:seen]))) for ratio, theirs in rivals.values()]
            best = set(top_by_rank(points))
            # A rank on few prompts is no reason to give up what somebody chose for the space.
            chosen = {name for name, _ in ledger.space.proposals}
            for index, p in enumerate(left):
                if index not in best and p.proposal.preset not in chosen:
                    reasons[p.key] = f"in the last quarter by non-dominated rank on {seen} prompts"
        return reasons
