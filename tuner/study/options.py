"""What a user asks of a study, and what its search may do to cost less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuner.config.limits import Budget

if TYPE_CHECKING:
    from tuner.proposals.sensitivity import Sensitivities
    from tuner.study.earlier_verifications import EarlierStudy

#: Number of schedules that are proposed and walked together.
ROUND = 5
#: Number of schedules that a full search evaluates, and one that follows the predicted front.
FULL_TRIALS, QUICK_TRIALS = 30, 12


@dataclass(frozen=True)
class SearchShortcuts:
    """What the search does to cost less than one schedule at a time on all prompts, timed end to end.

    Attributes:
        batch: number of schedules proposed together.
        tree: they are walked as a tree, so what they share runs once.
        table: latency is predicted from measured step costs.
        rungs: clearly worse schedules are pruned after a few prompts.
        overlap: the next round is proposed while this one runs.
        sensitivity: lasting changes are measured first, and the front that they predict is proposed first.
        few: presets that are predicted to break a limit are skipped, and only the requested trials are made while
            predictions hold; FULL_TRIALS if they do not.
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

    Attributes:
        max_drop: largest drop per metric; a single number is for the primary metric, and the space provides the rest.
        trials: distinct schedules to evaluate, not counting the full one.
        time_budget_s: tuning time, including verification.
        sampler, storage: see TrialSampler.
        command: the command that reproduces the study.
        versions: for the record.
        samples: number of prompts whose images are kept for the report.
        patience: the search ends after this many schedules without a larger feasible hypervolume; None never ends it.
        shortcuts: how the search costs less than measuring everything.
        earlier: sensitivities that another study of the model measured.
        earlier_study: what that study proved on these held-out prompts.
        one_by_one: finalists are judged one after another until one is verified, instead of all together.
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
    earlier_study: EarlierStudy | None = None
    one_by_one: bool = False

    @property
    def most_trials(self) -> int:
        """The most schedules that are evaluated if predictions do not hold."""
        return max(self.trials, FULL_TRIALS) if self.shortcuts.few else self.trials
