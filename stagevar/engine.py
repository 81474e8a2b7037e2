"""How the steps of a generation reach the device: launched one kernel at a time, or replayed from recorded graphs.

With static schedules every scale of a profile has fixed shapes, and the sampler's randomness depends on nothing but keys
in one small tensor. So the graph engine records each distinct prefix of steps once, over buffers that stay where they are
(conditioning, keys, KV cache, code sum), and replays it for every later image. A node of that tree takes its parent's
output buffers as its inputs, and nothing is copied but text and keys. Nodes of one tree share a memory pool, which is
sound because a walk only ever reads outputs of its own ancestors, and those stay allocated.

Both engines run the same kernels in the same order. Recording is behind a small interface, so that tests on a CPU replay
traced operations instead of CUDA graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stagevar.errors import UsageError
from stagevar.noise import NoiseSource, PromptNoise
from stagevar.schedule import ScaleStep

if TYPE_CHECKING:
    from stagevar.cache import KVCache
    from stagevar.models.base import Conditioning

#: Text rows are padded to a multiple of this, so that prompts of different lengths replay the same graphs.
TEXT_BUCKET = 32


@dataclass(frozen=True)
class Start:
    """What a generation starts from; the graph engine hands out buffers that stay in place."""

    conditioning: Conditioning
    noise: NoiseSource
    code_sum_BdHW: Tensor
    resident: Resident | None = None


class Engine(ABC):
    """Carries out scales and decoding for a sampler.

    Attributes: name, part of every latency figure. max_caches: KV caches kept for different batches or schedules.
    """

    name: ClassVar[str]
    max_caches: int = 1

    @abstractmethod
    def start(self, wanted: Start, cache: KVCache, fixed: object) -> Start:
        """What this generation will read instead of `wanted`; `fixed` is whatever else decides its computations."""

    @abstractmethod
    def run(
        self, resident: Resident | None, steps: tuple[ScaleStep, ...], cache: KVCache, scale: Callable[[], Any]
    ) -> Any:
        """Runs the last of `steps` after the others; `scale()` does it eagerly and returns a value with `lengths`."""

    @abstractmethod
    def decode(self, code_sum_BdHW: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """The decoder's output for a code sum."""

    @abstractmethod
    def forget(self, cache: KVCache) -> None:
        """Drops whatever refers to a cache that is about to be freed."""


class EagerEngine(Engine):
    """Every kernel is launched as the code reaches it. Always available."""

    name = "eager"

    def start(self, wanted: Start, cache: KVCache, fixed: object) -> Start:
        return wanted

    def run(
        self, resident: Resident | None, steps: tuple[ScaleStep, ...], cache: KVCache, scale: Callable[[], Any]
    ) -> Any:
        return scale()

    def decode(self, code_sum_BdHW: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        return decode(code_sum_BdHW)

    def forget(self, cache: KVCache) -> None:
        return None


class Recorder(ABC):
    """Records a computation over fixed buffers."""

    @abstractmethod
    def record(self, run: Callable[[], Any], reset: Callable[[], None]) -> tuple[Callable[[], None], Any]:
        """(replay, outputs). `reset` undoes the bookkeeping of `run`, which may be called several times.

        The outputs hold valid values only after a replay; every replay overwrites them.
        """

    def memory_bytes(self) -> int:
        """Memory that recordings hold, 0 where it is not known."""
        return 0


class CudaRecorder(Recorder):
    """CUDA graphs in one shared memory pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self._before = torch.cuda.memory_reserved(device)

    def record(self, run: Callable[[], Any], reset: Callable[[], None]) -> tuple[Callable[[], None], Any]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            run()  # lets libraries choose kernels and allocate workspaces, which is not allowed while capturing
        torch.cuda.current_stream(self.device).wait_stream(side)
        reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = run()
        return graph.replay, outputs

    def memory_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device) - self._before


@dataclass
class _Node:
    replay: Callable[[], None]
    outputs: Any


@dataclass
class Resident:
    """The buffers of one batch shape and the recorded prefixes over them."""

    conditioning: Conditioning
    noise: PromptNoise
    code_sum_BdHW: Tensor
    cache: KVCache
    nodes: dict[tuple[ScaleStep, ...], _Node] = field(default_factory=dict)


class GraphEngine(Engine):
    """Records each distinct prefix of steps once and replays it.

    Args:
        recorder: CUDA graphs in production.
        max_nodes: recorded prefixes kept per batch shape; beyond it the oldest leaves are dropped and recorded again
            when needed.

    Attributes: recorded, replayed: how often each happened.
    """

    name = "graph"
    max_caches = 3

    def __init__(self, recorder: Recorder, max_nodes: int = 256):
        self.recorder, self.max_nodes = recorder, max_nodes
        self.recorded = self.replayed = 0
        self._residents: dict[Any, Resident] = {}
        self._decoders: dict[tuple[int, ...], tuple[Tensor, Callable[[], None], Tensor]] = {}

    def start(self, wanted: Start, cache: KVCache, fixed: object) -> Start:
        if not isinstance(wanted.noise, PromptNoise):
            return wanted  # injected randomness cannot be replayed
        conditioning = wanted.conditioning.padded(TEXT_BUCKET)
        leaves = conditioning.tensors()
        key = (id(cache), fixed, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        resident = self._residents.get(key)
        if resident is None:
            resident = Resident(conditioning.clone(), wanted.noise, wanted.code_sum_BdHW.clone(), cache)
            self._residents[key] = resident
        else:
            for mine, theirs in zip(resident.conditioning.tensors(), leaves, strict=True):
                mine.copy_(theirs)
            resident.noise.refresh(wanted.noise)
        return Start(resident.conditioning, resident.noise, resident.code_sum_BdHW, resident)

    def run(
        self, resident: Resident | None, steps: tuple[ScaleStep, ...], cache: KVCache, scale: Callable[[], Any]
    ) -> Any:
        if resident is None or not self._rooted(resident, steps[:-1]):
            return scale()
        node = resident.nodes.get(steps)
        if node is None:
            self._make_room(resident, steps)
            lengths = cache.lengths
            replay, outputs = self.recorder.record(scale, lambda: cache.rewind(lengths))
            node = resident.nodes[steps] = _Node(replay, outputs)
            self.recorded += 1
        node.replay()
        self.replayed += 1
        cache.rewind(node.outputs.lengths)
        return node.outputs

    @staticmethod
    def _rooted(resident: Resident, prefix: tuple[ScaleStep, ...]) -> bool:
        """Whether the last step that really ran before here is recorded (skipped scales change no buffer)."""
        while prefix and prefix[-1].skipped:
            prefix = prefix[:-1]
        return not prefix or prefix in resident.nodes

    def _make_room(self, resident: Resident, wanted: tuple[ScaleStep, ...]) -> None:
        while len(resident.nodes) >= self.max_nodes:
            parents = {steps[:-1] for steps in resident.nodes}
            victim = next((s for s in resident.nodes if s not in parents and s != wanted[: len(s)]), None)
            if victim is None:
                return
            del resident.nodes[victim]

    def decode(self, code_sum_BdHW: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        shape = tuple(code_sum_BdHW.shape)
        if shape not in self._decoders:
            held = code_sum_BdHW.clone()
            replay, image = self.recorder.record(lambda: decode(held), lambda: None)
            self._decoders[shape] = (held, replay, image)
        held, replay, image = self._decoders[shape]
        held.copy_(code_sum_BdHW)
        replay()
        return image

    def forget(self, cache: KVCache) -> None:
        self._residents = {key: r for key, r in self._residents.items() if r.cache is not cache}


def build_engine(name: str, device: torch.device) -> Engine:
    """An engine by name: "eager" or "graph". Raises UsageError for an unknown name or where graphs cannot be recorded."""
    if name == "eager":
        return EagerEngine()
    if name != "graph":
        raise UsageError(f"unknown engine {name!r}; use eager or graph")
    if device.type != "cuda":
        raise UsageError(f"engine graph needs a CUDA device, not {device.type}; use --engine eager")
    return GraphEngine(CudaRecorder(device))
