"""How the steps of a generation reach the device: launched one kernel at a time, or replayed from recorded graphs.

With static schedules every scale of a profile has fixed shapes, and the sampler's randomness depends on nothing but keys
in one small tensor. So the graph engine records each distinct prefix of steps once, over buffers that stay where they are
(conditioning, keys, KV cache, code sum), and replays it for every later image. A node of that tree takes its parent's
output buffers as its inputs, and nothing is copied but text and keys.

Memory. Recordings of steps share a pool: the scratch space of one may become the outputs of another that is recorded
later, so a replay may destroy the outputs of every later recording. That is sound as long as whatever is still to be read
was recorded before whatever is still to be replayed. It holds along a walk: one reads outputs of one's ancestors only,
they were recorded before their descendants, and an ancestor is never dropped before them. It does not hold for the
decoder, which is replayed in the middle of a walk; hence its pool is its own.

Both engines run the same kernels in the same order, but for the masked text rows that the graph engine adds up to a
bucket. Recording is behind a small interface, so that tests on a CPU replay traced operations instead of CUDA graphs.
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stagevar.choices import ENGINES, check_engine
from stagevar.errors import UsageError, first_line
from stagevar.schedule import ScaleStep
from stagevar.tensors.noise import Draws, NoiseSource, PromptNoise

if TYPE_CHECKING:
    from stagevar.models.base import Conditioning
    from stagevar.models.infinity.tokenizer import Swished
    from stagevar.models.layers import Chained
    from stagevar.tensors.cache import KVCache

#: Text rows are padded to a multiple of this, so that prompts of different lengths replay the same graphs.
TEXT_BUCKET = 32


@dataclass(frozen=True)
class Start:
    """What a generation starts from; the graph engine hands out buffers that stay in place."""

    conditioning: Conditioning
    noise: NoiseSource
    code_sum_BdHW: Tensor
    resident: StaticBuffers | None = None


class Engine(ABC):
    """Carries out scales and decoding for a sampler.

    Attributes: name, part of every latency figure. max_caches: KV caches kept for different batches or schedules.
    compiled: whether the pieces between matrix products are compiled kernels (stagevar.models.fused). chained, draws: what
    stands in for some of them (stagevar.engine.kernels), swished: for norms of the decoder; None where nothing does.
    fallback_reason: why it launches every kernel as eager does although its name says otherwise, None while all is well.
    """

    name: str
    max_caches: ClassVar[int] = 1
    compiled: bool = False
    chained: Chained | None = None
    draws: Draws | None = None
    swished: Swished | None = None
    fallback_reason: str | None = None

    @property
    def that_ran(self) -> str:
        """The name of the engine that figures are of: eager's where this one fell back."""
        return "eager" if self.fallback_reason else self.name

    @abstractmethod
    def start(self, wanted: Start, cache: KVCache, fixed: object) -> Start:
        """What this generation will read instead of `wanted`; `fixed` is whatever else decides its computations."""

    @abstractmethod
    def run(
        self, resident: StaticBuffers | None, steps: tuple[ScaleStep, ...], cache: KVCache, scale: Callable[[], Any]
    ) -> Any:
        """Runs the last of `steps` after the others; `scale()` does it eagerly and returns a value with `lengths`."""

    @abstractmethod
    def decode(self, code_sum_BdHW: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """The decoder's output for a code sum."""

    @abstractmethod
    def forget(self, cache: KVCache) -> None:
        """Drops whatever refers to a cache that is about to be freed."""

    def release(self) -> None:  # noqa: B027  an engine that keeps nothing has nothing to free
        """Drops everything that takes memory; it is made again when next needed."""


class EagerEngine(Engine):
    """Every kernel is launched as the code reaches it. Always available."""

    def __init__(self, compiled: bool = False):
        self.compiled = compiled
        self.name = "compiled" if compiled else "eager"

    def start(self, wanted: Start, cache: KVCache, fixed: object) -> Start:
        return wanted

    def run(
        self, resident: StaticBuffers | None, steps: tuple[ScaleStep, ...], cache: KVCache, scale: Callable[[], Any]
    ) -> Any:
        return scale()

    def decode(self, code_sum_BdHW: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        return decode(code_sum_BdHW)

    def forget(self, cache: KVCache) -> None:
        return None


class RecordingFailed(Exception):
    """A computation ran, but could not be recorded; the message says why."""


class Recorder(ABC):
    """Records a computation over fixed buffers."""

    @abstractmethod
    def record(
        self, run: Callable[[], Any], reset: Callable[[], None], separate_pool: bool = False
    ) -> tuple[Callable[[], None], Any]:
        """(replay, outputs). `reset` undoes the bookkeeping of `run`, which may be called several times.

        The outputs hold valid values only after a replay; every replay overwrites them, and may overwrite the outputs of
        whatever was recorded later with the same `separate_pool`. Buffers that `run` reads and did not make are read where they
        are at every replay, so whoever records keeps them.

        Raises RecordingFailed when `run` works but cannot be recorded; the device is usable then. What `run` itself
        raises passes through, and so does torch.OutOfMemoryError: with more room it can be recorded.
        """

    def new_pool(self, separate_pool: bool) -> None:  # noqa: B027  only CUDA graphs have pools
        """Called before the first of some recordings with this `separate_pool`: none of the earlier ones is left.

        An allocator's pool ends with its last graph and cannot be recorded into again.
        """

    def memory_bytes(self) -> int:
        """Memory that recordings hold, 0 where it is not known."""
        return 0


def first_cause(error: BaseException) -> BaseException:
    """The error that others were raised in handling: a failed capture reports its end, not what ended it."""
    seen = {id(error)}
    while (earlier := error.__cause__ or error.__context__) is not None and id(earlier) not in seen:
        seen.add(id(earlier))
        error = earlier
    return error


def _ends_capture_cleanly(version: str) -> bool:
    """Whether a failed capture leaves the allocator as it was (pytorch/pytorch#180395, fixed in 2.12)."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) >= (2, 12)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: it may destroy another graph, which is not allowed while capturing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaRecorder(Recorder):
    """CUDA graphs, in one memory pool for steps and one for what is recorded apart.

    Warming up and capturing use one side stream throughout, the same for all recorders of a device: whatever libraries keep
    per stream (cuBLAS a workspace of 32 MiB) then exists once, before a capture and outside the pools, and the allocator's
    cache of that stream is reused by the next recording.
    """

    _sides: ClassVar[dict[int, Any]] = {}

    #: Why nothing can be recorded in this process any more.
    _spoiled: ClassVar[str | None] = None

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            index = torch.cuda.current_device()
            if index not in self._sides:
                self._sides[index] = torch.cuda.Stream()
            self._side = self._sides[index]
            self._pools = {separate_pool: torch.cuda.graph_pool_handle() for separate_pool in (False, True)}

    def record(
        self, run: Callable[[], Any], reset: Callable[[], None], separate_pool: bool = False
    ) -> tuple[Callable[[], None], Any]:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                run()  # lets libraries choose kernels and allocate workspaces, which is not allowed while capturing
            current.wait_stream(self._side)
            reset()
            if CudaRecorder._spoiled is not None:
                raise RecordingFailed(CudaRecorder._spoiled)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are forbidden while capturing: another may load images or score them meanwhile.
            capture = torch.cuda.graph(
                graph, pool=self._pools[separate_pool], stream=self._side, capture_error_mode="thread_local"
            )
            try:
                with capture, _no_collection():
                    outputs = run()
            except RuntimeError as error:
                torch.cuda.set_stream(current)  # torch before 2.13 stays on the capturing stream
                torch.cuda.synchronize()  # raises where the device itself is lost
                cause = first_cause(error)
                if not _ends_capture_cleanly(torch.__version__):
                    CudaRecorder._spoiled = (
                        f"recording failed earlier in this process ({first_line(cause)}), after which torch "
                        f"{torch.__version__} cannot record again; restart the process"
                    )
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from error
                raise RecordingFailed(first_line(cause)) from error
        return graph.replay, outputs

    def new_pool(self, separate_pool: bool) -> None:
        with torch.cuda.device(self.device):
            self._pools[separate_pool] = torch.cuda.graph_pool_handle()

    def memory_bytes(self) -> int:
        pools = set(self._pools.values())
        return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) in pools)


@dataclass
class _Node:
    replay: Callable[[], None]
    outputs: Any


@dataclass
class StaticBuffers:
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

    What cannot be recorded runs eagerly, with a warning: the first failure ends recording, and whatever was recorded
    before it goes on being replayed. Injected randomness is never recorded. One engine serves one sampler.

    Attributes: recorded, replayed: how often each happened. recording_s: seconds spent on recording, warm-up included.
    fallback_reason: why nothing more is recorded.
    """

    max_caches = 3

    def __init__(self, recorder: Recorder, max_nodes: int = 256, compiled: bool = False):
        self.recorder, self.max_nodes, self.compiled = recorder, max_nodes, compiled
        self.name = "graph-compiled" if compiled else "graph"
        self.recorded = self.replayed = 0
        self.recording_s = 0.0
        self.fallback_reason = None
        self._residents: dict[Any, StaticBuffers] = {}
        self._decoders: dict[tuple[int, ...], tuple[Tensor, Callable[[], None], Tensor]] = {}

    def start(self, wanted: Start, cache: KVCache, fixed: object) -> Start:
        if not isinstance(wanted.noise, PromptNoise):
            return wanted  # injected randomness cannot be replayed
        conditioning = wanted.conditioning.padded(TEXT_BUCKET)
        leaves = conditioning.tensors()
        key = (id(cache), fixed, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        resident = self._residents.get(key)
        if resident is None:
            resident = StaticBuffers(conditioning.clone(), wanted.noise, wanted.code_sum_BdHW.clone(), cache)
            self._residents[key] = resident
        else:
            for mine, theirs in zip(resident.conditioning.tensors(), leaves, strict=True):
                mine.copy_(theirs)
            resident.noise.refresh(wanted.noise)
        return Start(resident.conditioning, resident.noise, resident.code_sum_BdHW, resident)

    def run(
        self, resident: StaticBuffers | None, steps: tuple[ScaleStep, ...], cache: KVCache, scale: Callable[[], Any]
    ) -> Any:
        if resident is None or not self._rooted(resident, steps):
            return scale()
        node = resident.nodes.get(steps)
        if node is None:
            lengths = cache.lengths
            if self.fallback_reason is None:
                self._make_room(resident, steps)
            recorded = self._record(scale, lambda: cache.rewind(lengths))
            if recorded is None:
                cache.rewind(lengths)
                return scale()
            node = resident.nodes[steps] = _Node(*recorded)
            self.recorded += 1
        node.replay()
        self.replayed += 1
        cache.rewind(node.outputs.lengths)
        return node.outputs

    def _record(
        self, run: Callable[[], Any], reset: Callable[[], None], separate_pool: bool = False
    ) -> tuple[Callable[[], None], Any] | None:
        """(replay, outputs), or None where recording failed, now or earlier."""
        if self.fallback_reason is not None:
            return None
        started = time.perf_counter()
        if not (self._decoders if separate_pool else any(r.nodes for r in self._residents.values())):
            self.recorder.new_pool(separate_pool)
        try:
            recorded = self.recorder.record(run, reset, separate_pool)
        except RecordingFailed as failure:
            self.fallback_reason = str(failure)
            warnings.warn(f"CUDA graph capture failed, engine {self.name} falls back to eager: {failure}", stacklevel=5)
            return None
        finally:
            self.recording_s += time.perf_counter() - started
        return recorded

    @staticmethod
    def _parent(steps: tuple[ScaleStep, ...]) -> tuple[ScaleStep, ...]:
        """The prefix whose outputs these steps' last one reads: skipped scales change no buffer."""
        steps = steps[:-1]
        while steps and steps[-1].skipped:
            steps = steps[:-1]
        return steps

    def _rooted(self, resident: StaticBuffers, steps: tuple[ScaleStep, ...]) -> bool:
        """Whether the last step that really ran before the last of these is recorded."""
        parent = self._parent(steps)
        return not parent or parent in resident.nodes

    def _make_room(self, resident: StaticBuffers, wanted: tuple[ScaleStep, ...]) -> None:
        while len(resident.nodes) >= self.max_nodes:
            parents = {self._parent(steps) for steps in resident.nodes}
            victim = next((s for s in resident.nodes if s not in parents and s != wanted[: len(s)]), None)
            if victim is None:
                return
            del resident.nodes[victim]

    def decode(self, code_sum_BdHW: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        shape = tuple(code_sum_BdHW.shape)
        if shape not in self._decoders:
            held = code_sum_BdHW.clone()
            recorded = self._record(lambda: decode(held), lambda: None, separate_pool=True)
            if recorded is None:
                return decode(code_sum_BdHW)
            self._decoders[shape] = (held, *recorded)
        held, replay, image = self._decoders[shape]
        held.copy_(code_sum_BdHW)
        replay()
        return image

    def forget(self, cache: KVCache) -> None:
        self._residents = {key: r for key, r in self._residents.items() if r.cache is not cache}

    def release(self) -> None:
        self._residents.clear()
        self._decoders.clear()


def fell_back_because(engine: Engine) -> str | None:
    """Why an engine no longer does what its name says, None while it does; figures of one that does not are another's."""
    why = engine.fallback_reason
    if why is None and engine.compiled:
        from stagevar.models import fused

        why = fused.plain_because()
    return why


def build_engine(name: str, device: torch.device, recorder: Recorder | None = None) -> Engine:
    """An engine by name, one of ENGINES; recorder: instead of CUDA graphs.

    Raises UsageError for an unknown name or where graphs cannot be recorded.
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; use {', '.join(ENGINES)}")
    check_engine(name, device.type)
    compiled = name.endswith("compiled")
    if name == "graph-kernels":
        return _with_kernels(GraphEngine(recorder or CudaRecorder(device), compiled=True))
    if name.startswith("graph"):
        return GraphEngine(recorder or CudaRecorder(device), compiled=compiled)
    return EagerEngine(compiled)


def _with_kernels(engine: GraphEngine) -> GraphEngine:
    """The engine with Triton kernels. Raises UsageError where they cannot run."""
    from stagevar.engine import decoder_kernels, kernels

    why = kernels.available()
    if why is not None:
        raise UsageError(f"engine graph-kernels cannot run here: {why}; use --engine graph-compiled")
    engine.name, engine.chained, engine.draws = "graph-kernels", kernels.chained(), kernels.draws()
    engine.swished = decoder_kernels.swished_norm()
    return engine
