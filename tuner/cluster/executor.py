"""The executor on a Ray cluster: one resident worker per GPU, micro-batches handed out by the driver.

The driver decides everything: which worker gets which job, when one is stuck, when it is rebuilt, when it has failed too
often. Ray only places processes and carries values. Workers get a `Recipe` (a function by name and plain arguments), so
paths travel, never weights. A job's values depend on the job alone: whoever evaluates it, once or again after a crash,
the merged values are those of the executor in this process, bit for bit on the same kind of device.

The only module that imports ray, inside functions: without it everything else works.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import secrets
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stagevar import extras
from stagevar.errors import DeviceBroken, InfrastructureError, StagevarError, UsageError, first_line
from stagevar.schedule import Steps, exact
from tuner.evaluation.evaluator import Evaluator, Facts
from tuner.evaluation.executor import Executor, Failed, Outcome, QualityTask, WorkersLost
from tuner.evaluation.local import evaluate_task
from tuner.evaluation.timed_groups import deal, merged

if TYPE_CHECKING:
    from stagevar.timing import Timing

#: Where each latency figure was measured, one JSON object per line.
MEASUREMENTS_FILE = "measurements.jsonl"
#: Failures in a row after which a worker gets no more jobs.
QUARANTINE_AFTER = 3
#: Workers that a tree of schedules may take down before each is tried alone, and that a single one may before it fails.
TREE_ATTEMPTS, SINGLE_ATTEMPTS = 2, 3
#: How often the list of nodes is read while jobs run.
NODES_EVERY_S = 3.0
#: What the driver needs as soon as a timing arrives. Importing it, and torch with it, takes seconds in which nothing could be
#: evaluated; at the start they pass while the workers load.
NEEDED_LATER = ("stagevar.timing",)
#: Exit status of a worker whose CUDA context is broken beyond repair.
BROKEN_CUDA = 86
_KIND_PREFIX = "accelerator_type:"


def check_installed() -> None:
    """Raises UsageError that names the extra where ray is missing; imports nothing."""
    extras.require("running on a cluster", "ray")


def require(name: str = "ray") -> Any:
    """The module `ray`, or one of its parts such as "ray.tune". Raises UsageError that names the extra."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # they import torch to write what nobody reads
    check_installed()
    try:
        import ray

        return ray if name == "ray" else importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} cannot be imported ({error}); pip install 'stagevar-tune[ray]'") from None


def connect(address: str | None = None) -> Callable[[], None]:
    """Joins the cluster at `address` ("auto": this machine's), or starts one here that only this machine can reach.

    Returns what disconnects; it does nothing where this process was connected already. Raises UsageError.
    """
    if address is None and "ray" not in sys.modules:
        # Read when ray is imported. The first makes it keep to the loopback, which it else maps to the network's address;
        # the others keep other users of this machine out, with a token that nobody else learns.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = require()
    if ray.is_initialized():
        return lambda: None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UsageError(f"no Ray cluster at {address!r} ({first_line(error)}); start one: docs/cluster.md") from None
    return ray.shutdown


# ---------------------------------------------------------------------------------------------------- in the worker


@dataclass(frozen=True)
class Recipe:
    """How a worker builds its evaluator.

    function: "module:function". arguments: its keywords, plain data; paths absolute.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Evaluator:
        return pkgutil.resolve_name(self.function)(**self.arguments)


@dataclass(frozen=True)
class Place:
    """Where a worker runs. node: Ray's id. gpu: UUID of the GPU, empty on CPU."""

    node: str
    host: str
    process: int
    gpu: str = ""


class Worker:
    """One evaluator in one process, built once; Ray runs its calls one at a time."""

    def __init__(self, recipe: Recipe, node: str):
        self.recipe, self.node = recipe, node
        self.evaluator: Evaluator | None = None

    def load(self) -> tuple[Facts, Place]:
        """Builds the evaluator, which takes model and metric models from disk."""
        self.evaluator = self.recipe.build()
        return self.evaluator.facts, self._place()

    def quality(self, task: QualityTask) -> list[Outcome]:
        with _leaving_when_broken():
            return evaluate_task(self.evaluator, task)

    def timed(self, method: str, *arguments: Any) -> tuple[Any, Place]:
        """What a method of the evaluator that times measured, and where."""
        with _leaving_when_broken():
            return getattr(self.evaluator, method)(*arguments), self._place()

    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        with _leaving_when_broken():
            return self.evaluator.images(steps, split, batch)

    def _place(self) -> Place:
        gpu = ""
        if self.evaluator.facts.device.get("kind") == "cuda":
            import torch

            gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return Place(self.node, socket.gethostname(), os.getpid(), gpu)


@contextmanager
def _leaving_when_broken() -> Iterator[None]:
    """Ends this process where no kernel can run in it any more: only a new one helps, and the driver builds it."""
    try:
        yield
    except DeviceBroken:
        os._exit(BROKEN_CUDA)


def free_memory() -> None:
    """Gives back what an ended study held, for the next one in this process; ends a process that cannot run another."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        from stagevar.device_faults import is_broken

        if is_broken(RuntimeError("an ended study"), torch.device("cuda")):
            os._exit(BROKEN_CUDA)
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------- in the driver


@dataclass(eq=False)
class _Seat:
    """A GPU (or a share of CPUs) and the worker on it. state: "held", "loading", "ready", "quarantined" or "gone".

    A seat is held until the first worker has chosen the engine, which the others then take.

    node: Ray's id. host: the machine, on which there may be several nodes.
    """

    id: str
    node: str
    host: str
    state: str = "loading"
    actor: Any = None
    ref: Any = None
    job: _Job | None = None
    deadline: float = 0.0
    place: Place | None = None
    #: What each failure since the last success was about.
    failures: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Job:
    """One call of a worker's method.

    blame: what is suspected when workers die of it. number: place in the call. task, members: of a quality job: the task and
    which of its schedules.
    alone: it times, so no other worker of the machine may be busy meanwhile, but for one that times on a GPU of its own.
    home: always on the same worker, while that one lives.
    """

    method: str
    arguments: tuple[Any, ...]
    blame: Any
    task: QualityTask | None = None
    number: int = 0
    members: tuple[int, ...] = ()
    alone: bool = False
    home: bool = False
    failed_on: set[str] = field(default_factory=set)


def _quality_job(task: QualityTask, number: int, members: Sequence[int]) -> _Job:
    part = QualityTask(tuple(task.schedules[i] for i in members), task.split, task.batch)
    return _Job("quality", (part,), frozenset(part.schedules), task, number, tuple(members))


def cut(schedules: Sequence[Steps], pieces: int) -> list[tuple[int, ...]]:
    """Indices of schedules in at most `pieces` groups of like size; those with a long common past together."""
    if not schedules:
        return []
    order = sorted(range(len(schedules)), key=lambda i: [repr(step) for step in schedules[i]])
    return [tuple(int(i) for i in part) for part in np.array_split(order, min(pieces, len(order))) if len(part)]


class RayExecutor(Executor):
    """Workers on every GPU of one kind; on a cluster without GPUs, one worker per `threads` CPUs.

    Args:
        recipe: what each worker builds. address: of the cluster; None starts one on this machine.
        gpu_kind: which kind of GPU, by Ray's accelerator type; needed where there are several.
        task_timeout_s: after which a worker counts as stuck. load_timeout_s: the same for building its evaluator.
        patience_s: how long to wait for nodes to (re)join when none is left.
        threads: CPUs per worker where there are no GPUs.
        run_dir: where `measurements.jsonl` goes; nothing is written when None.
        say: told a line whenever a worker comes, goes or is rebuilt.

    Attributes: evaluator: the study's view of the workers. counts: rebuilds, timeouts, lost nodes, quarantined workers.

    Raises UsageError for an unusable cluster or recipe, WorkersLost when no worker could be built.
    """

    name: ClassVar[str] = "ray"

    def __init__(
        self,
        recipe: Recipe,
        address: str | None = None,
        *,
        gpu_kind: str | None = None,
        task_timeout_s: float = 1800.0,
        load_timeout_s: float = 1800.0,
        patience_s: float = 300.0,
        threads: int = 1,
        run_dir: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.recipe, self.gpu_kind, self.threads, self.run_dir, self.say = recipe, gpu_kind, threads, run_dir, say
        self.task_timeout_s, self.load_timeout_s, self.patience_s = task_timeout_s, load_timeout_s, patience_s
        self.seats: dict[str, _Seat] = {}
        self.facts: Facts | None = None
        self.counts: Counter[str] = Counter()
        self._deaths: dict[Any, list[str]] = {}
        self._owners: dict[tuple[str, int], str] = {}
        self._timer: str | None = None
        self._reasons: list[str] = []
        self._nodes_read = -float("inf")
        self._known_nodes: set[str] = set()
        self._left_out: set[str] = set()
        self._disconnect = connect(address)
        self._ray = require()
        self._actor_class = self._ray.remote(Worker)
        try:
            self._resource = "GPU" if self._ray.cluster_resources().get("GPU") else "CPU"
            self._read_nodes(grow=True)
            self._start()
        except BaseException:
            self.close()
            raise
        self.evaluator = RemoteEvaluator(self, self.facts)

    # ------------------------------------------------------------------------------------------------ interface

    def run(self, tasks: Sequence[QualityTask]) -> Iterator[tuple[QualityTask, list[Outcome]]]:
        # Fewer micro-batches than workers: trees are cut, which repeats shared scales and leaves no worker idle.
        ready = sum(seat.state in ("ready", "loading") for seat in self.seats.values())
        pieces = max(1, ready // max(1, len(tasks)))
        jobs = [
            _quality_job(task, i, members) for i, task in enumerate(tasks) for members in cut(task.schedules, pieces)
        ]
        yield from ((task, []) for task in tasks if not task.schedules)
        found: list[dict[int, Outcome]] = [{} for _ in tasks]
        for job, result in self._drive(jobs):
            outcomes = found[job.number]
            if isinstance(result, InfrastructureError):
                raise result
            if isinstance(result, BaseException):
                result = [Failed(first_line(result)) for _ in job.members]
            outcomes.update(zip(job.members, result, strict=True))
            if len(outcomes) == len(job.task.schedules):
                yield job.task, [outcomes[i] for i in range(len(job.task.schedules))]

    def call(self, method: str, *arguments: Any, blame: Any) -> Any:
        """One call of a worker's method; raises what it raised, or RuntimeError when it takes workers down."""
        return self._results([_Job(method, arguments, blame)])[0]

    def time(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[tuple[Any, Place]]:
        """What the evaluator's method measured for each of these arguments, and where; each alone on its GPU.

        The first call of any is timed by the same worker as long as it lives. Where machines have no GPUs, each times one
        call at a time. When all have ended, raises what the first raised, or RuntimeError when it takes workers down.
        """
        jobs = [
            _Job("timed", (method, *arguments), object(), number=i, alone=True, home=i == 0)
            for i, arguments in enumerate(calls)
        ]
        return self._results(jobs)

    @property
    def timers(self) -> int:
        """How many workers may time at once: one per GPU, or one per machine."""
        ready = [seat for seat in self.seats.values() if seat.state == "ready"]
        return max(1, len(ready) if self._resource == "GPU" else len({seat.host for seat in ready}))

    def _results(self, jobs: Sequence[_Job]) -> list[Any]:
        """The results in the order of the jobs; raises the first error once all have ended."""
        results = [result for _, result in sorted(self._drive(jobs), key=lambda pair: pair[0].number)]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        for seat in self.seats.values():
            if seat.actor is not None:
                self._stop(seat)
            seat.state = "gone"
        self._disconnect()

    # ------------------------------------------------------------------------------------------------ the loop

    def _start(self) -> None:
        """Waits for the first worker that is ready."""
        for module in NEEDED_LATER:
            importlib.import_module(module)
        while self.facts is None:
            self._advance(deque(), set(), grow=True)

    def _drive(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Any]]:
        """Every job once with its result or its error."""
        queue, pending = deque(jobs), set(jobs)
        # Workers that join while one is being timed would disturb it on their node.
        grow = not any(job.alone for job in jobs)
        while pending:
            for job, result in self._advance(queue, pending, grow):
                pending.discard(job)
                yield job, result

    def _advance(self, queue: deque[_Job], pending: set[_Job], grow: bool) -> list[tuple[_Job, Any]]:
        """One turn: hand out, wait for something to happen, book it. Returns jobs that ended."""
        self._read_nodes(grow)
        self._build_held()
        self._hand_out(queue)
        busy = {seat.ref: seat for seat in self.seats.values() if seat.ref is not None}
        if not busy:
            self._wait_for_nodes()
            return []
        now = time.monotonic()
        wait_s = min(NODES_EVERY_S, max(0.0, min(seat.deadline for seat in busy.values()) - now))
        ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=wait_s)
        ended: list[tuple[_Job, Any]] = []
        for ref in ready:
            ended += self._book(busy[ref], queue, pending)
        now = time.monotonic()
        for seat in busy.values():
            if seat.ref is not None and seat.ref not in ready and now >= seat.deadline:
                self.counts["timeouts"] += 1
                limit = self.load_timeout_s if seat.state == "loading" else self.task_timeout_s
                ended += self._fail(seat, f"no answer within {limit:g} s", queue, pending)
        return ended

    def _hand_out(self, queue: deque[_Job]) -> None:
        idle = [s for s in self.seats.values() if s.state == "ready" and s.ref is None]
        for seat in idle:
            job = self._choose(queue, seat)
            if job is None:
                continue
            queue.remove(job)
            if job.task is not None:
                self._owners.setdefault((job.task.split, job.task.batch), seat.id)
            if job.home:
                self._timer = seat.id
            seat.job, seat.deadline = job, time.monotonic() + self.task_timeout_s
            seat.ref = getattr(seat.actor, job.method).remote(*job.arguments)

    def _choose(self, queue: deque[_Job], seat: _Seat) -> _Job | None:
        """The job for an idle worker: its own micro-batches first (their text and references are there), then others'.

        A job avoids workers that it failed on as long as there are others.
        """
        alive = {s.id for s in self.seats.values() if s.state in ("ready", "loading")}
        beside = [s for s in self.seats.values() if s.host == seat.host and s.ref is not None and s is not seat]

        def fits(job: _Job) -> bool:
            if seat.id in job.failed_on and not alive <= job.failed_on:
                return False
            if job.home and self._timer in alive and self._timer != seat.id:
                return False
            return all(self._may_run_beside(job, other) for other in beside)

        fitting = [job for job in queue if fits(job)]

        def rank(job: _Job) -> int:
            owner = self._owners.get((job.task.split, job.task.batch)) if job.task else None
            return 0 if owner == seat.id else 1 if owner not in alive else 2

        return min(fitting, key=rank, default=None)

    def _may_run_beside(self, job: _Job, other: _Seat) -> bool:
        """Whether a job may start while another worker of the machine does what it does."""
        timing = other.job is not None and other.job.alone
        if job.alone and timing:
            return self._resource == "GPU"
        return not job.alone and not timing

    def _book(self, seat: _Seat, queue: deque[_Job], pending: set[_Job]) -> list[tuple[_Job, Any]]:
        """Takes what a worker answered. A job of an earlier, abandoned call is dropped."""
        errors = self._ray.exceptions
        try:
            value = self._ray.get(seat.ref)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else RuntimeError(first_line(error))
            if seat.state == "loading":
                if isinstance(cause, StagevarError) and self.facts is None:
                    raise cause from None
                return self._fail(seat, first_line(cause), queue, pending)
            value = cause
        except errors.RayError as error:
            return self._fail(seat, _why(error), queue, pending)
        job, seat.ref, seat.job = seat.job, None, None
        if job is None:
            if seat.state == "loading":
                self._welcome(seat, *value)
            return []
        seat.failures.clear()
        return [(job, value)] if job in pending else []

    def _welcome(self, seat: _Seat, facts: Facts, place: Place) -> None:
        """A worker is loaded: it joins if it measures what the others measure."""
        seat.state, seat.place = "ready", place
        if self.facts is None:
            self.facts = facts
            if "engine" in self.recipe.arguments and facts.engine_choice is not None:
                arguments = {**self.recipe.arguments, "engine": facts.engine_choice}
                self.recipe = replace(self.recipe, arguments=arguments)
        elif facts != self.facts:
            differing = [n for n in vars(facts) if getattr(facts, n) != getattr(self.facts, n)]
            theirs = {n: getattr(facts, n) for n in differing}
            self._stop(seat)
            seat.state = "gone"
            self.say(
                f"worker {seat.id} on {place.host} is left out: its {', '.join(differing)} differ ({theirs!s:.160})"
            )
            return
        self.say(f"worker {seat.id} ready on {place.host}" + (f", GPU {place.gpu}" if place.gpu else ""))

    # ------------------------------------------------------------------------------------------------ failures

    def _fail(self, seat: _Seat, why: str, queue: deque[_Job], pending: set[_Job]) -> list[tuple[_Job, Any]]:
        """A worker died or hangs: rebuild or quarantine it, and decide what becomes of its job."""
        job = seat.job
        self._stop(seat)
        self._nodes_read = -float("inf")
        self._read_nodes(grow=False)
        again = job is not None and job in pending
        if seat.state == "gone":
            if again:
                queue.appendleft(job)
            return []
        blame = "load" if job is None else job.blame
        seat.failures.append(blame)
        self._reasons = [*self._reasons[-4:], f"worker {seat.id}: {why}"]
        ended = self._judge(job, why, seat, queue, pending) if again else []
        if len(seat.failures) >= QUARANTINE_AFTER:
            seat.state = "quarantined"
            self.counts["quarantined"] += 1
            self.say(f"worker {seat.id} quarantined after {QUARANTINE_AFTER} failures in a row, the last: {why}")
        else:
            self.counts["rebuilds"] += 1
            self.say(f"worker {seat.id} is rebuilt: {why}")
            self._build(seat)
        return ended

    def _judge(
        self, job: _Job, why: str, seat: _Seat, queue: deque[_Job], pending: set[_Job]
    ) -> list[tuple[_Job, Any]]:
        """Whether the job goes again, in parts, or is given up; what turns out to be its fault, workers are forgiven."""
        job.failed_on.add(seat.id)
        if job.home:
            self._timer = None
        deaths = self._deaths.setdefault(job.blame, [])
        deaths.append(seat.id)
        single = job.task is None or len(job.members) == 1
        limit = SINGLE_ATTEMPTS if job.task is not None and single else TREE_ATTEMPTS
        if len(deaths) < limit:
            queue.append(job)
            return []
        for other in self.seats.values():
            other.failures = [f for f in other.failures if f != job.blame]
        alike = [job, *(other for other in queue if other.blame == job.blame)]
        for other in alike[1:]:
            queue.remove(other)
        if single:
            error = RuntimeError(f"took {len(deaths)} workers down; last error: {why}")
            return [(other, error) for other in alike]
        for other in alike:
            pending.discard(other)
            parts = [_quality_job(other.task, other.number, (member,)) for member in other.members]
            pending.update(parts)
            queue.extend(parts)
        return []

    def _stop(self, seat: _Seat) -> None:
        """Kills a worker's process, stuck or not. Ray must not restart it: the driver builds a new one and loads it."""
        if seat.actor is not None:
            self._ray.kill(seat.actor, no_restart=True)
        seat.actor = seat.ref = seat.job = None

    # ------------------------------------------------------------------------------------------------ nodes

    def _read_nodes(self, grow: bool) -> None:
        """Takes in nodes that joined and drops those that died; reads Ray's list every few seconds at most."""
        now = time.monotonic()
        if now - self._nodes_read < NODES_EVERY_S:
            return
        self._nodes_read = now
        listed = {n["NodeID"]: n for n in self._ray.nodes() if n["Alive"]}
        nodes = {node: n["Resources"] for node, n in listed.items()}
        for seat in self.seats.values():
            if seat.node not in nodes and seat.state != "gone":
                self._lose(seat)
        if not grow:
            return
        for node, resources in self._chosen(nodes).items():
            if node in self._known_nodes:
                continue
            self._known_nodes.add(node)
            size = 1 if self._resource == "GPU" else self.threads
            for index in range(int(resources.get(self._resource, 0)) // size):
                seat = _Seat(f"{node[:8]}:{index}", node, listed[node]["NodeManagerHostname"])
                self.seats[seat.id] = seat
                seat.state = "held"

    def _build_held(self) -> None:
        """Builds workers that were found since; one after the other as long as none has chosen the engine."""
        held = [seat for seat in self.seats.values() if seat.state == "held"]
        alone = self.facts is None and self._resource == "GPU" and self.recipe.arguments.get("engine") == "auto"
        if alone:
            held = [] if any(seat.state == "loading" for seat in self.seats.values()) else held[:1]
        for seat in held:
            self._build(seat)

    def _lose(self, seat: _Seat) -> None:
        """A node died under a worker; its job is handed out again and nobody is blamed.

        A running call stays to be booked: Ray ends it with an error.
        """
        if seat.state != "quarantined":
            self.say(f"worker {seat.id} is lost with its node")
        self.counts["lost"] += 1
        self._reasons = [*self._reasons[-4:], f"worker {seat.id}: its node died"]
        seat.state = "gone"
        for deaths in self._deaths.values():
            deaths[:] = [other for other in deaths if other != seat.id]

    def _chosen(self, nodes: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
        """Nodes to use. Raises UsageError when they have several kinds of GPU and none was chosen."""
        if self._resource == "CPU":
            return dict(nodes)
        kinds: dict[str, str] = {}
        for node, resources in nodes.items():
            if resources.get("GPU"):
                names = [name.removeprefix(_KIND_PREFIX) for name in resources if name.startswith(_KIND_PREFIX)]
                kinds[node] = names[0] if names else "unnamed"
        totals = Counter(dict.fromkeys(kinds.values(), 0))
        for node, kind in kinds.items():
            totals[kind] += int(nodes[node]["GPU"])
        listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(totals.items()))
        if self.gpu_kind is None:
            if len(totals) > 1:
                raise UsageError(f"the cluster mixes kinds of GPU ({listed}); choose one with --gpu-kind")
            [self.gpu_kind] = totals
        chosen = {n for n, kind in kinds.items() if kind.lower() == self.gpu_kind.lower()}
        if not chosen and not self.seats:
            raise UsageError(f"no GPU of kind {self.gpu_kind!r} in the cluster ({listed})")
        # Rounding differs between kinds of GPU, and differences between schedules are paired by prompt.
        for node in kinds.keys() - chosen - self._left_out:
            self._left_out.add(node)
            self.say(f"node {node[:8]} ({kinds[node]}) is left out: this study runs on {self.gpu_kind}")
        return {n: nodes[n] for n in chosen}

    def _build(self, seat: _Seat) -> None:
        """Starts a worker on its node and has it load. At most one call is ever in flight, none is repeated by Ray."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        wanted = {"num_gpus": 1, "num_cpus": 0} if self._resource == "GPU" else {"num_cpus": self.threads}
        seat.actor = self._actor_class.options(
            **wanted,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(seat.node, soft=False),
        ).remote(self.recipe, seat.node)
        seat.state, seat.job, seat.deadline = "loading", None, time.monotonic() + self.load_timeout_s
        seat.ref = seat.actor.load.remote()

    def _wait_for_nodes(self) -> None:
        """No worker is left: waits for nodes to join. Raises WorkersLost when none does."""
        reasons = "; ".join(dict.fromkeys(self._reasons)) or "the cluster has no free " + self._resource
        if any(seat.state == "quarantined" for seat in self.seats.values()):
            raise WorkersLost(f"no workers left ({reasons}); fix the cluster and rerun the command to resume")
        until = time.monotonic() + self.patience_s
        self.say(f"no worker is left, waiting up to {self.patience_s:g} s for nodes to join")
        while time.monotonic() < until:
            self._nodes_read = -float("inf")
            self._read_nodes(grow=True)
            if any(seat.state in ("held", "loading") for seat in self.seats.values()):
                return
            time.sleep(min(1.0, self.patience_s))
        raise WorkersLost(f"no workers left ({reasons}); fix the cluster and rerun the command to resume")


class RemoteEvaluator:
    """An Evaluator whose work is done by the workers of a RayExecutor.

    Schedules that are timed together with the full schedule are dealt out to as many GPUs as are ready. Each GPU times the
    full schedule in the same rounds as its sentinel, and its samples are scaled, round by round, by what the sentinel took
    on the first GPU over what it took here: the ratio to the full schedule is exactly the one measured, in one process,
    and milliseconds are those of the first GPU, always the same one while it lives. `measurements.jsonl` says for every
    timing which node, process and GPU it comes from, and keeps samples of whole schedules as they were measured.
    """

    def __init__(self, executor: RayExecutor, facts: Facts):
        self.executor, self.facts = executor, facts
        self._full = exact(len(facts.grids)).expand(facts.grids, facts.chunks)

    def quality(self, schedules: Sequence[Steps], split: str, batch: int) -> list[Mapping[str, np.ndarray]]:
        [(_, outcomes)] = self.executor.run([QualityTask(tuple(schedules), split, batch)])
        failed = [outcome.error for outcome in outcomes if isinstance(outcome, Failed)]
        if failed:
            raise RuntimeError(failed[0])
        return outcomes

    def latency(self, schedules: Mapping[str, Steps], rounds: int, warm_up_at_most: int = 12) -> Mapping[str, Timing]:
        sentinel = next((name for name, steps in schedules.items() if steps == self._full), None)
        shares = deal(schedules, sentinel, self.executor.timers)
        measured = self.executor.time("latency", [(share, rounds, warm_up_at_most) for share in shares])
        samples = [{name: timing.samples_ms for name, timing in timings.items()} for timings, _ in measured]
        self._record("latency", samples, measured, sentinel=sentinel)
        found = merged([timings for timings, _ in measured], sentinel)
        return {name: found[name] for name in schedules}

    def step_ms(self, schedules: Sequence[Steps], rounds: int = 3) -> Mapping[Steps, tuple[float, ...]]:
        """Milliseconds of steps, by prefix, from walks that start alike; each GPU walks the full schedule (or the first)."""
        sentinel = self._full if self._full in schedules else schedules[0]
        others = [steps for steps in schedules if steps != sentinel]
        parts = cut(others, self.executor.timers) if others else [()]
        calls = [((sentinel, *(others[i] for i in part)), rounds) for part in parts]
        measured = self.executor.time("step_ms", calls)
        prefixes = [sentinel[: depth + 1] for depth in range(len(sentinel))]
        sums = [np.sum([timings[prefix] for prefix in prefixes], axis=0) for timings, _ in measured]
        self._record("steps", [{"sentinel": sum_ms.tolist()} for sum_ms in sums], measured)
        found: dict[Steps, tuple[float, ...]] = {}
        for (timings, _), sum_ms in zip(measured, sums, strict=True):
            factors = sums[0] / sum_ms
            for prefix in timings.keys() - found.keys():
                found[prefix] = tuple(float(ms) for ms in np.asarray(timings[prefix]) * factors)
        return found

    def scale_ms(self, schedules: Mapping[str, Steps], rounds: int = 5) -> Mapping[str, tuple[float, ...]]:
        measured = self.executor.time("scale_ms", [(dict(schedules), rounds)])
        self._record("scales", [measured[0][0]], measured)
        return measured[0][0]

    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        return self.executor.call("images", steps, split, batch, blame=("images", steps))

    def _record(
        self,
        what: str,
        samples_ms: Sequence[Mapping[str, Sequence[float]]],
        measured: Sequence[tuple[Any, Place]],
        **more: Any,
    ) -> None:
        """A line per GPU that took part, the time being the same in all of them."""
        if self.executor.run_dir is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with open(self.executor.run_dir / MEASUREMENTS_FILE, "a", encoding="utf-8") as handle:
            for samples, (_, place) in zip(samples_ms, measured, strict=True):
                record = {"measured": now, "what": what, **vars(place), "device": self.facts.device["name"], **more}
                plain = {name: list(values) for name, values in samples.items()}
                handle.write(json.dumps({**record, "samples_ms": plain}) + "\n")


def _why(error: Exception) -> str:
    """The telling line of one of Ray's errors, which are pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "killed" in line or "died" in line or "cause" in line.lower()]
    return (telling or lines or [type(error).__name__])[0][:200]
