"""What the executor uses of Ray, without processes: nodes with free and taken GPUs or CPUs, and a clock that waiting moves."""

from dataclasses import dataclass, field
from typing import Any

from tuner.cluster.worker import Answer, Place


class _ActorDied(Exception):
    """Ray's errors, of which the fake raises none."""


class _TaskFailed(Exception):
    """What a worker raised."""


class _Errors:
    RayError, RayTaskError = _ActorDied, _TaskFailed


@dataclass
class Affinity:
    node_id: str
    soft: bool


@dataclass(eq=False)
class Ref:
    actor: "Actor"
    method: str
    arguments: tuple[Any, ...]


@dataclass(eq=False)
class Call:
    actor: "Actor"
    method: str

    def remote(self, *arguments):
        return Ref(self.actor, self.method, arguments)


@dataclass(eq=False)
class Actor:
    node: str
    wanted: dict[str, Any]
    placed: bool = False

    def __getattr__(self, method):
        return Call(self, method)


@dataclass
class FakeRay:
    """Nodes by name with their resources; `free` of them may be taken by an actor, the others are somebody else's.

    Args:
        listed: resources per node.
        facts: what every worker's evaluator says of itself.
        free: GPUs (or CPUs) that are free, per node.
        events: what happens at a time, such as a node that joins.
    """

    listed: dict[str, dict[str, float]]
    facts: Any
    free: dict[str, int]
    events: list[tuple[float, Any]] = field(default_factory=list)
    now: float = 0.0
    actors: list[Actor] = field(default_factory=list)
    exceptions: Any = _Errors

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()

    def nodes(self):
        return [
            {"NodeID": node, "Alive": True, "Resources": resources, "NodeManagerHostname": node}
            for node, resources in self.listed.items()
        ]

    def remote(self, kind):
        return self

    def options(self, scheduling_strategy, **wanted):
        self.asked = (scheduling_strategy.node_id, wanted)
        return _Placing(self)

    def wait(self, refs, num_returns, timeout):
        for actor in self.actors:
            if not actor.placed and self.free[actor.node] > 0:
                self.free[actor.node] -= 1
                actor.placed = True
        done = [ref for ref in refs if ref.actor.placed][:num_returns]
        if not done:
            self.sleep(timeout)
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref):
        place = Place(ref.actor.node, ref.actor.node, 1)
        values = {"started": None, "load": (self.facts, place), "timed": ("timing", place)}
        return Answer(values[ref.method], ())

    def kill(self, actor, no_restart):
        if actor.placed:
            self.free[actor.node] += 1
        self.actors.remove(actor)


@dataclass
class _Placing:
    ray: FakeRay

    def remote(self, node, own_gpu):
        assert own_gpu == ("num_gpus" in self.ray.asked[1])
        assert node == self.ray.asked[0]
        self.ray.actors.append(Actor(*self.ray.asked))
        return self.ray.actors[-1]
