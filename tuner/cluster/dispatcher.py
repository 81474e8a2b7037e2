"""Who gets which job, whom to suspect when workers die, and when one is given up: decisions only, Ray is nowhere here.

The executor tells what happened (a worker joined, answered, failed, was lost with its node) and carries out what this says.
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
#: Workers that a tree of schedules may take down before each is tried alone, and that a single one may before it fails.
TREE_ATTEMPTS, SINGLE_ATTEMPTS = 2, 3


@dataclass(eq=False)
class Job:
    """One call of a worker's method.

    suspect: what is suspected when workers die of it. number: place in the call. task, members: of a quality job: the task
    and which of its schedules.
    exclusive: it times, so no other worker of the machine may be busy meanwhile, but for one that times on a GPU of its own.
    pinned: always on the same worker, while that one lives.
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

    node: Ray's id. host: the machine, on which there may be several nodes.
    state: "held" (to be built), "loading", "ready", "quarantined" or "gone".
    failures: what each failure since the last success was about.
    """

    id: str
    node: str
    host: str
    state: str = "held"
    job: Job | None = None
    failures: list[Any] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether its process is at work, be it on loading."""
        return self.job is not None or self.state == "loading"


Ended = tuple[Job, Any]


def quality_job(task: QualityTask, number: int, members: Sequence[int]) -> Job:
    """The job of some of a task's schedules."""
    part = QualityTask(tuple(task.schedules[i] for i in members), task.split, task.batch)
    return Job("quality", (part,), frozenset(part.schedules), task, number, tuple(members))


def cut(schedules: Sequence[Steps], pieces: int) -> list[tuple[int, ...]]:
    """Indices of schedules in at most `pieces` groups of like size; those with a long common past together."""
    if not schedules:
        return []
    order = sorted(range(len(schedules)), key=lambda i: [repr(step) for step in schedules[i]])
    return [tuple(int(i) for i in part) for part in np.array_split(order, min(pieces, len(order))) if len(part)]


class Dispatcher:
    """The slots of a cluster and the jobs of one call at a time.

    Args:
        own_gpus: workers have a GPU each, so that several may time at once. say: told a line whenever a worker is rebuilt,
            quarantined or lost.

    Attributes: slots: by id. counts: rebuilds, lost nodes, quarantined workers. reasons: of the last few failures.
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
        """Takes in a slot, whose worker is still to be built."""
        self.slots[slot.id] = slot

    def to_build(self, one_at_a_time: bool) -> list[WorkerSlot]:
        """Slots whose worker is built now. one_at_a_time: none has chosen the engine yet, which the others then take."""
        held = [slot for slot in self.slots.values() if slot.state == "held"]
        if one_at_a_time:
            return [] if any(slot.state == "loading" for slot in self.slots.values()) else held[:1]
        return held

    @property
    def workers(self) -> int:
        """How many workers are there or on their way."""
        return sum(slot.state in ("ready", "loading") for slot in self.slots.values())

    @property
    def timers(self) -> int:
        """How many workers may time at once: one per GPU, or one per machine."""
        ready = [slot for slot in self.slots.values() if slot.state == "ready"]
        return max(1, len(ready) if self.own_gpus else len({slot.host for slot in ready}))

    @property
    def timer(self) -> str | None:
        """The slot of pinned jobs, once there was one."""
        return self._timer

    # ------------------------------------------------------------------------------------------------ jobs

    def begin(self, jobs: Sequence[Job]) -> None:
        """The jobs of a new call; those of an abandoned one are forgotten, and their answers dropped."""
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
        """The job for an idle worker: its own micro-batches first (their text and references are there), then others'.

        A job avoids workers that it failed on as long as there are others.
        """
        alive = {s.id for s in self.slots.values() if s.state in ("ready", "loading")}
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
        """Whether a job may start while another worker of the machine does what it does."""
        timing = other.job is not None and other.job.exclusive
        if job.exclusive and timing:
            return self.own_gpus
        return not job.exclusive and not timing

    # ------------------------------------------------------------------------------------------------ what happened

    def answered(self, slot: WorkerSlot, value: Any) -> list[Ended]:
        """A worker gave a value, or an error that is the job's own; nothing where the job's call was abandoned."""
        job, slot.job = slot.job, None
        slot.failures.clear()
        return self._ended([(job, value)]) if job is not None and job in self._pending else []

    def failed(self, slot: WorkerSlot, why: str) -> list[Ended]:
        """A worker died or hangs: it is rebuilt ("held" again) or quarantined. Returns the jobs that end with it.

        Where its node is gone, nobody is suspected and the job goes to another worker first.
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
            self.say(f"worker {slot.id} quarantined after {QUARANTINE_AFTER} failures in a row, the last: {why}")
        else:
            slot.state = "held"
            self.counts["rebuilds"] += 1
            self.say(f"worker {slot.id} is rebuilt: {why}")
        return self._ended(ended)

    def lost(self, slot: WorkerSlot) -> None:
        """A node died under a worker; what died there before is forgiven.

        A running call stays to be booked: it ends with an error, and `failed` hands its job out again.
        """
        if slot.state != "quarantined":
            self.say(f"worker {slot.id} is lost with its node")
        self.counts["lost"] += 1
        self._note(slot, "its node died")
        slot.state = "gone"
        for deaths in self._deaths.values():
            deaths[:] = [other for other in deaths if other != slot.id]

    def _resolve(self, job: Job, why: str, slot: WorkerSlot) -> list[Ended]:
        """Whether the job goes again, in parts, or is given up; what turns out to be its fault, workers are forgiven."""
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
