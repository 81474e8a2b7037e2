"""Asks the sampler for a round of new schedules, directly or on a thread while the previous round runs.

Asking reads a snapshot of what was known and returns proposals. The caller registers schedules, tells the sampler what is
known about them and writes evidence, so that only one thread writes.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from stagevar.schedule import StageSchedule, Steps
from tuner.proposals.sampler_process import SamplerProcess
from tuner.proposals.trial_sampler import Proposal, TrialSampler
from tuner.study.options import ROUND

#: Proposals without a new schedule in a round before the space counts as exhausted.
MOST_DUPLICATES = 60


class Fate(enum.Enum):
    """What becomes of a proposal: evaluated; told together with its twin under evaluation; told at once; dropped."""

    NEW = "new"
    REPEATED = "repeated"
    KNOWN = "known"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Asked:
    """A proposal and what it expands to; `ratio` is the predicted latency ratio for which it is dropped."""

    proposal: Proposal
    schedule: StageSchedule
    steps: Steps
    key: str
    fate: Fate
    ratio: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """What was known about schedules when asking began.

    Args:
        known: keys with something to tell the sampler.
        busy: keys under evaluation.
        hopeless: gives the predicted ratio of a schedule that is certainly over the budget, else None.
    """

    known: frozenset[str]
    busy: frozenset[str]
    hopeless: Callable[[Steps], float | None]


@dataclass
class Round:
    """What was asked together.

    Attributes:
        exhausted: whether fewer new schedules than wanted were found.
        handed_over: whether TPE took over meanwhile.
    """

    asked: list[Asked] = field(default_factory=list)
    exhausted: bool = False
    handed_over: bool = False

    def of(self, fate: Fate) -> list[Asked]:
        """The proposals with this fate."""
        return [asked for asked in self.asked if asked.fate is fate]

    @property
    def new(self) -> list[Asked]:
        """The proposals to evaluate."""
        return self.of(Fate.NEW)


class AskAhead:
    """Asks one sampler for rounds of new schedules.

    Args:
        expand: gives key, schedule and steps of a proposal; changes nothing.
        beside: whether `begin` asks on a thread.
    """

    def __init__(
        self,
        trial_sampler: TrialSampler | SamplerProcess,
        expand: Callable[[Proposal], tuple[str, StageSchedule, Steps]],
        beside: bool,
    ):
        self.trial_sampler, self._expand = trial_sampler, expand
        self._thread = ThreadPoolExecutor(1) if beside else None
        self._impatient = threading.Event()
        self._future: Future[Round] | None = None

    def close(self) -> None:
        """Waits for a pending ask."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def ask(self, wanted: int, snapshot: Snapshot, each: Callable[[Asked], None] = lambda asked: None) -> Round:
        """A round with `wanted` new schedules, or fewer if the sampler finds no more; calls `each` on every proposal."""
        made = Round()
        for asked in self._asks(wanted, snapshot, made):
            made.asked.append(asked)
            each(asked)
        made.exhausted = len(made.new) < wanted
        return made

    def begin(self, wanted: int, snapshot: Snapshot) -> None:
        """Starts asking on the thread, if there is one."""
        if self._thread is not None:
            self._future = self._thread.submit(self.ask, wanted, snapshot)

    def take(self, patience_s: float | None, impatient: bool) -> Round:
        """Waits for the round that `begin` started and returns it, or an empty round if there is none.

        After `patience_s` seconds the Gaussian process hands over to TPE, if `impatient`; None waits as long as it takes.
        """
        if self._future is None:
            return Round()
        future, self._future = self._future, None
        try:
            return future.result(timeout=patience_s)
        except TimeoutError:
            if impatient:
                self._impatient.set()
            return future.result()

    def _asks(self, wanted: int, snapshot: Snapshot, made: Round) -> Iterator[Asked]:
        seen, dropped, misses = set(snapshot.busy), set[str](), 0
        found = 0
        while found < wanted and misses < MOST_DUPLICATES:
            if self._impatient.is_set():
                self._impatient.clear()
                made.handed_over |= self._hand_over()
            proposal = self.trial_sampler.ask(random=misses > ROUND)
            key, schedule, steps = self._expand(proposal)
            fate, ratio = Fate.NEW, None
            if key in seen:
                fate = Fate.REPEATED
            elif key in snapshot.known or key in dropped:
                fate = Fate.KNOWN
            elif proposal.preset is None and (ratio := snapshot.hopeless(steps)) is not None:
                fate = Fate.DROPPED
                dropped.add(key)
            if fate is Fate.NEW:
                seen.add(key)
                found += 1
            else:
                misses += 1
            yield Asked(proposal, schedule, steps, key, fate, ratio)

    def _hand_over(self) -> bool:
        if self.trial_sampler.proposes != "gp":
            return False
        self.trial_sampler.hand_over()
        return True
