"""The executor on a Ray cluster: one resident worker per GPU, micro-batches handed out by the driver.

The driver decides everything, in `tuner.cluster.dispatcher`: which worker gets which job, when it is rebuilt, when it
has failed too often. Ray, through this file, only places processes and carries values. Workers get a `Recipe` (a
function by name and plain arguments), so paths travel, never weights. A job's values depend on the job alone: whichever
worker evaluates it, once or again after a crash, the merged values equal those of the local executor, bit for bit on the
same kind of device.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from stagevar import logs
from stagevar.errors import InfrastructureError, StagevarError, UsageError, first_line
from tuner.cluster.connection import connect, require
from tuner.cluster.dispatcher import Dispatcher, Ended, Job, WorkerSlot, cut, quality_job
from tuner.cluster.nodes import gpu_kinds, gpus_listed
from tuner.cluster.remote_evaluator import RemoteEvaluator
from tuner.cluster.worker import Place, Recipe, Worker
from tuner.evaluation.evaluator import EvaluationInfo
from tuner.evaluation.executor import Executor, Failed, Outcome, QualityTask, WorkersLost

#: How often the list of nodes is read while jobs run.
NODES_EVERY_S = 3.0
#: Seconds after which a worker without a process counts as waiting for a GPU that somebody else uses.
PLACING_S = 60.0
#: What the driver needs as soon as a timing arrives. Importing it, and torch with it, takes seconds, so this happens at the
#: start, while the workers load.
NEEDED_LATER = ("stagevar.timing",)


@dataclass(eq=False)
class _Process:
    """A worker's process, with the `ref` of the call in flight, if any, and its `deadline` on the monotonic clock."""

    actor: Any
    ref: Any
    deadline: float


class RayExecutor(Executor):
    """Workers on every GPU of one kind; on a cluster without GPUs, one worker per `threads` CPUs.

    Args:
        recipe: what each worker builds.
        address: of the cluster; None starts one on this machine.
        gpu_kind: which kind of GPU, by Ray's accelerator type; needed if there are several.
        task_timeout_s: seconds after which a worker counts as stuck.
        load_timeout_s: the same for building its evaluator.
        patience_s: how long to wait for nodes to (re)join when none is left.
        threads: CPUs per worker if there are no GPUs.
        run_dir: where `measurements.jsonl` goes; None writes nothing.
        say: called with a line whenever a worker joins, leaves or is rebuilt.
        stop: whether the user asked to stop; raises KeyboardInterrupt where there is no worker whose round could end first.

    Attributes:
        evaluator: the study's view of the workers.
        dispatcher: decides which worker does what, and counts failures.

    Raises:
        UsageError: for an unusable cluster or recipe.
        WorkersLost: if no worker could be built.
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
        stop: Callable[[], bool] = lambda: False,
    ):
        self.recipe, self.gpu_kind, self.threads, self.run_dir = recipe, gpu_kind, threads, run_dir
        self.say, self.stop = say, stop
        self.task_timeout_s, self.load_timeout_s, self.patience_s = task_timeout_s, load_timeout_s, patience_s
        self.facts: EvaluationInfo | None = None
        self._workers: dict[str, _Process] = {}
        self._nodes_read = -float("inf")
        self._known_nodes: set[str] = set()
        self._left_out: set[str] = set()
        self._resource: str | None = None  # until a node can be used
        self._disconnect = connect(address)
        self._ray = require()
        self._actor_class = self._ray.remote(Worker)
        self.dispatcher = Dispatcher(own_gpus=False, say=lambda line: self.say(line))
        try:
            self.read_nodes(grow=True)
            self._start()
        except BaseException:
            self.close()
            raise
        assert self.facts is not None  # of the first worker that was ready
        self.evaluator: RemoteEvaluator = RemoteEvaluator(self, self.facts)

    # ------------------------------------------------------------------------------------------------ interface

    def run(self, tasks: Sequence[QualityTask]) -> Iterator[tuple[QualityTask, list[Outcome]]]:
        # Fewer micro-batches than workers: trees are cut, which repeats shared scales but leaves no worker idle.
        pieces = max(1, self.dispatcher.workers // max(1, len(tasks)))
        jobs = [
            quality_job(task, i, members) for i, task in enumerate(tasks) for members in cut(task.schedules, pieces)
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
            task = tasks[job.number]
            if len(outcomes) == len(task.schedules):
                yield task, [outcomes[i] for i in range(len(task.schedules))]

    def call(self, method: str, *arguments: Any, suspect: Any) -> Any:
        """One call of a worker's method; raises what it raised, or RuntimeError if it crashes workers."""
        return self._results([Job(method, arguments, suspect)])[0]

    def time(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[tuple[Any, Place]]:
        """What the evaluator's method measured for each of these arguments, and where; each alone on its GPU.

        The first of the calls always goes to the same worker, as long as it lives. Without GPUs, each machine times one call
        at a time. Once all have ended, raises the first error, or RuntimeError if a call crashes workers.
        """
        jobs = [
            Job("timed", (method, *arguments), object(), number=i, exclusive=True, pinned=i == 0)
            for i, arguments in enumerate(calls)
        ]
        return self._results(jobs)

    @property
    def timers(self) -> int:
        """How many workers may time at once: one per GPU, or one per machine."""
        return self.dispatcher.timers

    def _results(self, jobs: Sequence[Job]) -> list[Any]:
        """The results in the order of the jobs; raises the first error once all have ended."""
        results = [result for _, result in sorted(self._drive(jobs), key=lambda pair: pair[0].number)]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        for slot in self.dispatcher.slots.values():
            self._stop(slot)
            slot.state = "gone"
        self._disconnect()

    # ------------------------------------------------------------------------------------------------ the loop

    def _start(self) -> None:
        """Waits until the first worker is ready."""
        for module in NEEDED_LATER:
            importlib.import_module(module)
        while self.facts is None:
            self.advance(grow=True)

    def _drive(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Every job once with its result or its error."""
        self.dispatcher.begin(jobs)
        # Workers that join during a timing would disturb it on their node.
        grow = not any(job.exclusive for job in jobs)
        while not self.dispatcher.is_done:
            yield from self.advance(grow)

    def advance(self, grow: bool) -> list[Ended]:
        """One turn: hands out jobs, waits for something to happen, handles it. Returns jobs that ended."""
        self.read_nodes(grow)
        self._build_held()
        for slot, job in self.dispatcher.assign():
            process = self._workers[slot.id]
            process.deadline = time.monotonic() + self.task_timeout_s
            process.ref = getattr(process.actor, job.method).remote(*job.arguments)
        slots = self.dispatcher.slots
        if self.stop() and (self.facts is None or not any(slot.alive for slot in slots.values())):
            raise KeyboardInterrupt
        busy = {process.ref: slots[id_] for id_, process in self._workers.items() if process.ref is not None}
        if not busy:
            self._wait_for_nodes()
            return []
        now = time.monotonic()
        wait_s = min(NODES_EVERY_S, max(0.0, min(self._workers[slot.id].deadline for slot in busy.values()) - now))
        ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=wait_s)
        ended: list[Ended] = []
        for ref in ready:
            ended += self._book(busy[ref])
        now = time.monotonic()
        for id_, process in list(self._workers.items()):
            if process.ref is not None and process.ref not in ready and now >= process.deadline:
                slot = slots[id_]
                if slot.state in ("placing", "waiting"):
                    self._keep_waiting(slot)
                    continue
                self.dispatcher.counts["timeouts"] += 1
                limit = self.load_timeout_s if slot.state == "loading" else self.task_timeout_s
                ended += self._fail(slot, f"no answer within {limit:g} s")
        return ended

    def _book(self, slot: WorkerSlot) -> list[Ended]:
        """Handles a worker's answer."""
        errors, process = self._ray.exceptions, self._workers[slot.id]
        try:
            answer = self._ray.get(process.ref)
            logs.pass_on(answer.messages, f"worker {slot.id}")
            value = answer.value
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else RuntimeError(first_line(error))
            if slot.job is None:
                if isinstance(cause, StagevarError) and self.facts is None:
                    raise cause from None
                return self._fail(slot, first_line(cause))
            value = cause
        except errors.RayError as error:
            return self._fail(slot, _why(error))
        process.ref = None
        if slot.job is not None:
            return self.dispatcher.answered(slot, value)
        if slot.state in ("placing", "waiting"):
            slot.state = "placed"
        elif slot.state == "loading":
            self._admit(slot, *value)
        return []

    def _admit(self, slot: WorkerSlot, facts: EvaluationInfo, place: Place) -> None:
        """Handles a loaded worker: it joins if it measures the same as the others."""
        slot.state = "ready"
        if self.facts is None:
            self.facts = facts
            if "engine" in self.recipe.arguments and facts.engine_choice is not None:
                arguments = {**self.recipe.arguments, "engine": facts.engine_choice}
                self.recipe = replace(self.recipe, arguments=arguments)
        elif facts != self.facts:
            differing = [n for n in vars(facts) if getattr(facts, n) != getattr(self.facts, n)]
            theirs = {n: getattr(facts, n) for n in differing}
            self._stop(slot)
            slot.state = "gone"
            what = (
                f"its {', '.join(differing)} {'differs' if len(differing) == 1 else 'differ'} from the other workers'"
            )
            self.say(f"excluding worker {slot.id} on {place.host}: {what} ({theirs!s:.160})")
            return
        self.say(f"worker {slot.id} ready on {place.host}" + (f", GPU {place.gpu}" if place.gpu else ""))

    def _fail(self, slot: WorkerSlot, why: str) -> list[Ended]:
        """Handles a worker that died or hangs: ends its process, checks its node, and decides what becomes of its job."""
        self._stop(slot)
        self._nodes_read = -float("inf")
        self.read_nodes(grow=False)
        return self.dispatcher.failed(slot, why)

    def _stop(self, slot: WorkerSlot) -> None:
        """Kills a worker's process, stuck or not. Ray must not restart it: the driver builds a new one and loads it."""
        process = self._workers.pop(slot.id, None)
        if process is not None:
            self._ray.kill(process.actor, no_restart=True)

    # ------------------------------------------------------------------------------------------------ nodes

    def read_nodes(self, grow: bool) -> None:
        """Adds nodes that joined and drops those that died; reads Ray's list every few seconds at most."""
        now = time.monotonic()
        if now - self._nodes_read < NODES_EVERY_S:
            return
        self._nodes_read = now
        listed = {n["NodeID"]: n for n in self._ray.nodes() if n["Alive"]}
        nodes = {node: n["Resources"] for node, n in listed.items()}
        for slot in self.dispatcher.slots.values():
            if slot.node not in nodes and slot.state != "gone":
                self.dispatcher.lost(slot)
        if not grow:
            return
        for node, resources in self.chosen(nodes).items():
            if node in self._known_nodes:
                continue
            self._known_nodes.add(node)
            assert self._resource is not None  # or no node would be chosen
            size = 1 if self._resource == "GPU" else self.threads
            for index in range(int(resources.get(self._resource, 0)) // size):
                self.dispatcher.add(WorkerSlot(f"{node[:8]}:{index}", node, listed[node]["NodeManagerHostname"]))

    def _build_held(self) -> None:
        """Builds workers that are new or failed; one after another until one has chosen the engine."""
        choosing = self.facts is None and self._resource == "GPU" and self.recipe.arguments.get("engine") == "auto"
        for slot in self.dispatcher.to_build(one_at_a_time=choosing):
            self._build(slot)
        for slot in self.dispatcher.to_load(one_at_a_time=choosing):
            slot.state, process = "loading", self._workers[slot.id]
            process.ref, process.deadline = (
                process.actor.load.remote(self.recipe),
                time.monotonic() + self.load_timeout_s,
            )

    def chosen(self, nodes: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
        """Nodes to use. Raises UsageError if they have several kinds of GPU and none was chosen, or only others."""
        if self._resource is None:
            self._choose_resource(nodes)
        if self._resource is None:
            return {}
        if self._resource == "CPU":
            return dict(nodes)
        kinds = gpu_kinds(nodes)
        listed = gpus_listed(nodes, kinds)
        if self.gpu_kind is None:
            if len({*kinds.values()}) > 1:
                raise UsageError(f"the cluster has several kinds of GPU ({listed}); choose one with --gpu-kind")
            [self.gpu_kind] = {*kinds.values()}
        chosen = {n for n, kind in kinds.items() if kind.lower() == self.gpu_kind.lower()}
        if not chosen and not self.dispatcher.slots:
            raise UsageError(f"no GPU of kind {self.gpu_kind!r} in the cluster ({listed})")
        # Rounding differs between kinds of GPU, and differences between schedules are paired by prompt.
        for node in kinds.keys() - chosen - self._left_out:
            self._left_out.add(node)
            self.say(f"ignoring node {node[:8]} ({kinds[node]}): this study runs on {self.gpu_kind}")
        return {n: nodes[n] for n in nodes if n in chosen}

    def _choose_resource(self, nodes: Mapping[str, Mapping[str, float]]) -> None:
        """Decides for the whole study once a node can be used: GPUs if there are any, never CPUs where a kind was asked for."""
        if any(resources.get("GPU") for resources in nodes.values()):
            self._resource = "GPU"
        elif self.gpu_kind is None and any(resources.get("CPU", 0) >= self.threads for resources in nodes.values()):
            self._resource = "CPU"
            self.say("no GPU in the cluster: using CPUs")
        self.dispatcher.own_gpus = self._resource == "GPU"

    def _build(self, slot: WorkerSlot) -> None:
        """Asks Ray for a worker on its node. At most one call is ever in flight, and Ray repeats none."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        wanted = {"num_gpus": 1, "num_cpus": 0} if self._resource == "GPU" else {"num_cpus": self.threads}
        actor = self._actor_class.options(
            **wanted,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(slot.node, soft=False),
        ).remote(slot.node, self._resource == "GPU")
        slot.state, slot.tries = "placing", slot.tries + 1
        self._workers[slot.id] = _Process(actor, actor.started.remote(), time.monotonic() + PLACING_S)

    def _keep_waiting(self, slot: WorkerSlot) -> None:
        """Handles a worker that Ray has no room for: it stays in Ray's queue, and the study goes on with the others.

        Raises WorkersLost once all have waited for `patience_s`.
        """
        if slot.state == "placing":
            slot.state = "waiting"
            self.say(f"worker {slot.id} waits for a free {self._resource}")
        elif not any(other.alive or other.state == "held" for other in self.dispatcher.slots.values()):
            raise WorkersLost(
                f"the cluster has no free {self._resource}: worker {slot.id} waited for {self.patience_s:g} s; once one is "
                "free, the same command resumes"
            )
        self._workers[slot.id].deadline = time.monotonic() + max(self.patience_s, NODES_EVERY_S)

    def _wait_for_nodes(self) -> None:
        """Waits for nodes to join when no worker is left. Raises WorkersLost if none does."""
        lacking = (
            "CPU" if self._resource == "CPU" else f"GPU of kind {self.gpu_kind!r}" if self.gpu_kind else "GPU or CPU"
        )
        reasons = "; ".join(dict.fromkeys(self.dispatcher.reasons)) or f"the cluster has no {lacking}"
        if any(slot.state == "quarantined" for slot in self.dispatcher.slots.values()):
            raise WorkersLost(f"no workers left ({reasons}); fix the cluster and rerun the command to resume")
        until = time.monotonic() + self.patience_s
        missing = "no workers left" if self.dispatcher.slots else f"the cluster has no {lacking} yet"
        self.say(f"{missing}; waiting up to {self.patience_s:g} s for nodes to join")
        while time.monotonic() < until:
            if self.stop():
                raise KeyboardInterrupt
            self._nodes_read = -float("inf")
            self.read_nodes(grow=True)
            if any(slot.state == "held" for slot in self.dispatcher.slots.values()):
                return
            time.sleep(min(1.0, self.patience_s))
        raise WorkersLost(f"no workers left ({reasons}); fix the cluster and rerun the command to resume")


def _why(error: Exception) -> str:
    """The informative line of one of Ray's errors, which are pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "killed" in line or "died" in line or "cause" in line.lower()]
    return (telling or lines or [type(error).__name__])[0][:200]
