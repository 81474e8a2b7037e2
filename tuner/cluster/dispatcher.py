"""Which worker gets which job, what to suspect when workers die, and when to give up on one: decisions only, no Ray.

The executor reports what happened (a worker joined, answered, failed, was lost with its node) and carries out the decisions.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stagevar.schedule import Steps
from tuner.evaluation.executor import QualityTask

#: Failures in a row after which a worker gets no more jobs.
QUARANTINE_AFTER = 3
#: States of a worker that is on its way: Ray places its process, it has a process, it loads.
BUILDING = ("placing", "placed", "loading")
#: Workers that a tree of schedules may crash before each schedule is tried alone, and that one schedule may before it fails.
TREE_ATTEMPTS, SINGLE_ATTEMPTS = 2, 3


@dataclass(eq=False)
class Job:
    """One call of a worker's method.

    Attributes:
        suspect: what to suspect if workers die of it.
        number: place in the call.
        task, members: for a quality job, the task and which of its schedules.
        exclusive: whether it times, so that no other worker of the machine may be busy meanwhile, except one that times on
            its own GPU.
        pinned: whether it always runs on the same worker, as long as that one lives.
    """

    method: str
    arguments: tuple[Any, ...]
    suspect: Any
    task: QualityTask | None = None
    number: int = 0
    members: tuple[int, ...] = ()
    exclusive: bool = False
    pinned: bool = False
    failed_on: set[str] = field(default_factory=set)


@dataclass(eq=False)
class WorkerSlot:
    """A GPU (or a share of CPUs) for one worker.

    Attributes:
        node: Ray's id.
        host: the machine, which may have several nodes.
        state: "held" (to be built), one of BUILDING, "waiting" (Ray has found no room for it so far), "ready",
            "quarantined" or "gone".
        failures: what each failure since the last success was about.
        tries: how often it was built.
    """

    id: str
    node: str
    host: str
    state: str = "held"
    job: Job | None = None
    failures: list[Any] = field(default_factory=list)
    tries: int = 0

    @property
    def busy(self) -> bool:
        """Whether its process is working, including starting and loading."""
        return self.job is not None or self.state in BUILDING

    @property
    def alive(self) -> bool:
        """Whether it works or soon will; one that waits for somebody else's GPU may do so for hours."""
        return self.state == "ready" or self.state in BUILDING


Ended = tuple[Job, Any]


def quality_job(task: QualityTask, number: int, members: Sequence[int]) -> Job:
    """The job for some of a task's schedules."""
    part = QualityTask(tuple(task.schedules[i] for i in members), task.split, task.batch)
    return Job("quality", (part,), frozenset(part.schedules), task, number, tuple(members))


def cut(schedules: Sequence[Steps], pieces: int) -> list[tuple[int, ...]]:
    """Indices of schedules in at most `pieces` groups of similar size, with those that share many steps together."""
    if not schedules:
        return []
    order = sorted(range(len(schedules)), key=lambda i: [repr(step) for step in schedules[i]])
    return [tuple(int(i) for i in part) for part in np.array_split(order, min(pieces, len(order))) if len(part)]


class Dispatcher:
    """The slots of a cluster and the jobs of one call at a time.

    Args:
        own_gpus: whether workers have a GPU each, so that several may time at once.
        say: called with a line whenever a worker is rebuilt, quarantined or lost.

    Attributes:
        slots: by id.
        counts: rebuilds, lost nodes, quarantined workers.
        reasons: of the last few failures.
    """

    def __init__(self, own_gpus: bool, say: Callable[[str], None] = lambda line: None):
        self.own_gpus, self.say = own_gpus, say
        self.slots: dict[str, WorkerSlot] = {}
        self.counts: Counter[str] = Counter()
        self.reasons: list[str] = []
        self._queue: deque[Job] = deque()
        self._pending: set[Job] = set()
        self._deaths: dict[Any, list[str]] = {}
        self._owners: dict[tuple[str, int], str] = {}
        self._timer: str | None = None

    # ------------------------------------------------------------------------------------------------ slots

    def add(self, slot: WorkerSlot) -> None:
        """Adds a slot whose worker is not built yet."""
        self.slots[slot.id] = slot

    def to_build(self, one_at_a_time: bool) -> list[WorkerSlot]:
        """Slots whose worker to build now; `one_at_a_time` until one has chosen the engine for all.

        Slots that failed or were tried less often come first.
        """
        held = [slot for slot in self.slots.values() if slot.state == "held"]
        held.sort(key=lambda slot: (len(slot.failures), slot.tries))
        if one_at_a_time:
            return [] if any(slot.state in BUILDING for slot in self.slots.values()) else held[:1]
        return held

    def to_load(self, one_at_a_time: bool) -> list[WorkerSlot]:
        """Slots with a process that may load its evaluator now: not while a worker of the machine times."""
        placed = [slot for slot in self.slots.values() if slot.state == "placed"]
        if one_at_a_time:
            return [] if any(slot.state == "loading" for slot in self.slots.values()) else placed[:1]
        timing = {slot.host for slot in self.slots.values() if slot.job is not None and slot.job.exclusive}
        return [slot for slot in placed if slot.host not in timing]

    @property
    def workers(self) -> int:
        """How many workers exist or are being built."""
        return sum(slot.alive for slot in self.slots.values())

    @property
    def timers(self) -> int:
        """How many workers may time at once: one per GPU, or one per machine."""
        ready = [slot for slot in self.slots.values() if slot.state == "ready"]
        return max(1, len(ready) if self.own_gpus else len({slot.host for slot in ready}))

    @property
    def timer(self) -> str | None:
        """The slot of pinned jobs, None before the first one."""
        return self._timer

    # ------------------------------------------------------------------------------------------------ jobs

    def begin(self, jobs: Sequence[Job]) -> None:
        """Starts the jobs of a new call; those of an abandoned call are forgotten, and their answers dropped."""
        self._queue, self._pending = deque(jobs), set(jobs)

    @property
    def is_done(self) -> bool:
        """Whether every job has ended."""
        return not self._pending

    def assign(self) -> Iterator[tuple[WorkerSlot, Job]]:
        """Gives idle workers their next jobs."""
        for slot in self.slots.values():
            if slot.state != "ready" or slot.busy:
                continue
            job = self.choose(slot)
            if job is None:
                continue
            self._queue.remove(job)
            if job.task is not None:
                self._owners.setdefault((job.task.split, job.task.batch), slot.id)
            if job.pinned:
                self._timer = slot.id
            slot.job = job
            yield slot, job

    def choose(self, slot: WorkerSlot) -> Job | None:
        """The job for an idle worker: its own micro-batches first (it has their text and references), then others'.

        A job avoids workers on which it failed, as long as there are others.
        """
        alive = {s.id for s in self.slots.values() if s.alive}
        beside = [s for s in self.slots.values() if s.host == slot.host and s.busy and s is not slot]

        def fits(job: Job) -> bool:
            if slot.id in job.failed_on and not alive <= job.failed_on:
                return False
            if job.pinned and self._timer in alive and self._timer != slot.id:
                return False
            return all(self._may_run_beside(job, other) for other in beside)

        fitting = [job for job in self._queue if fits(job)]

        def rank(job: Job) -> int:
            owner = self._owners.get((job.task.split, job.task.batch)) if job.task else None
            return 0 if owner == slot.id else 1 if owner not in alive else 2

        return min(fitting, key=rank, default=None)

    def _may_run_beside(self, job: Job, other: WorkerSlot) -> bool:
        """Whether a job may start beside another worker of the machine, given what that one is doing."""
        timing = other.job is not None and other.job.exclusive
        if job.exclusive and timing:
            return self.own_gpus
        return not job.exclusive and not timing

    # ------------------------------------------------------------------------------------------------ what happened

    def answered(self, slot: WorkerSlot, value: Any) -> list[Ended]:
        """Handles a worker's value, or an error of the job's own; returns nothing if the job's call was abandoned."""
        job, slot.job = slot.job, None
        slot.failures.clear()
        return self._ended([(job, value)]) if job is not None and job in self._pending else []

    def failed(self, slot: WorkerSlot, why: str) -> list[Ended]:
        """Handles a worker that died or hangs: it is rebuilt ("held" again) or quarantined. Returns the jobs that end.

        If its node is gone, nothing is suspected and the job is next for another worker.
        """
        job, slot.job = slot.job, None
        again = job is not None and job in self._pending
        if slot.state == "gone":
            if job is not None and again:
                self._queue.appendleft(job)
            return []
        slot.failures.append("load" if job is None else job.suspect)
        self._note(slot, why)
        ended = self._resolve(job, why, slot) if job is not None and again else []
        if len(slot.failures) >= QUARANTINE_AFTER:
            slot.state = "quarantined"
            self.counts["quarantined"] += 1
            self.say(f"worker {slot.id} quarantined after {QUARANTINE_AFTER} failures in a row; the last: {why}")
        else:
            slot.state = "held"
            self.counts["rebuilds"] += 1
            self.say(f"rebuilding worker {slot.id}: {why}")
        return self._ended(ended)

    def lost(self, slot: WorkerSlot) -> None:
        """Handles a worker whose node died; earlier deaths on that node are forgiven.

        A running call is still pending: it ends with an error, and `failed` hands out its job again.
        """
        if slot.state != "quarantined":
            self.say(f"lost worker {slot.id} with its node")
        self.counts["lost"] += 1
        self._note(slot, "its node died")
        slot.state = "gone"
        for deaths in self._deaths.values():
            deaths[:] = [other for other in deaths if other != slot.id]

    def _resolve(self, job: Job, why: str, slot: WorkerSlot) -> list[Ended]:
        """Retries the job, splits it or gives up on it; workers are forgiven failures that turn out to be the job's fault."""
        job.failed_on.add(slot.id)
        if job.pinned:
            self._timer = None
        deaths = self._deaths.setdefault(job.suspect, [])
        deaths.append(slot.id)
        single = job.task is None or len(job.members) == 1
        limit = SINGLE_ATTEMPTS if job.task is not None and single else TREE_ATTEMPTS
        if len(deaths) < limit:
            self._queue.append(job)
            return []
        for other in self.slots.values():
            other.failures = [f for f in other.failures if f != job.suspect]
        alike = [job, *(other for other in self._queue if other.suspect == job.suspect)]
        for twin in alike[1:]:
            self._queue.remove(twin)
        if single:
            error = RuntimeError(f"crashed {len(deaths)} workers; last error: {why}")
            return [(twin, error) for twin in alike]
        for twin in alike:
            assert twin.task is not None
            self._pending.discard(twin)
            parts = [quality_job(twin.task, twin.number, (member,)) for member in twin.members]
            self._pending.update(parts)
            self._queue.extend(parts)
        return []

    def _ended(self, ended: list[Ended]) -> list[Ended]:
        self._pending.difference_update(job for job, _ in ended)
        return ended

    def _note(self, slot: WorkerSlot, why: str) -> None:
        self.reasons = [*self.reasons[-4:], f"worker {slot.id}: {why}"]
