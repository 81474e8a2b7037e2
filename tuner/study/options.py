"""What is asked of a study, and what its search may do to cost less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuner.config.limits import Budget

if TYPE_CHECKING:
    from tuner.proposals.sensitivity import Sensitivities

#: Schedules proposed and walked together.
ROUND = 5
#: Schedules that a whole search evaluates, and one that follows the predicted front.
FULL_TRIALS, QUICK_TRIALS = 30, 12


@dataclass(frozen=True)
class SearchShortcuts:
    """What the search does to cost less than one schedule at a time on all prompts, timed end to end.

    batch: schedules proposed together. tree: they are walked as a tree, so what they share runs once. table: latency is
    predicted from measured step costs. rungs: clearly worse schedules are stopped after a few prompts. overlap: the next
    round is proposed while this one runs. sensitivity: lasting changes are measured first, and the front that they predict is
    proposed first. few: presets that are predicted to break a limit are passed over, and while predictions hold, no more than
    the trials asked for are made; where they do not, FULL_TRIALS.
    """

    batch: int = ROUND
    tree: bool = True
    table: bool = True
    rungs: bool = True
    overlap: bool = True
    sensitivity: bool = False
    few: bool = False


#: Every schedule on every prompt, timed end to end.
EXHAUSTIVE = SearchShortcuts(table=False, rungs=False)


@dataclass(frozen=True)
class Options:
    """What a user asks of a study.

    max_drop: largest drop per metric; a number is the primary metric's, and what is not said comes from the space.
    trials: distinct schedules to evaluate, the full one not counted. time_budget_s: tuning time, verification included.
    sampler, storage: see TrialSampler. command: what reproduces the study. versions: for the record. samples: prompts whose
    images are kept for the report. patience: schedules without a larger feasible hypervolume after which the search ends; None
    never. shortcuts: how the search costs less than measuring everything. earlier: sensitivities that another study of the
    model measured.
    """

    budget: Budget
    max_drop: float | Mapping[str, float] | None = None
    trials: int = 30
    time_budget_s: float | None = None
    seed: int = 0
    sampler: str = "auto"
    storage: str | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    samples: int = 6
    patience: int | None = None
    shortcuts: SearchShortcuts = field(default_factory=SearchShortcuts)
    earlier: Sensitivities | None = None

    @property
    def most_trials(self) -> int:
        """Schedules that are evaluated at most, where predictions do not hold."""
        return max(self.trials, FULL_TRIALS) if self.shortcuts.few else self.trials
