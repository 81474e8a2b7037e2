"""Recording a computation over fixed buffers: CUDA graphs, behind an interface that CPU tests implement differently."""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stagevar.errors import first_line
from stagevar.schedule import ScaleStep
from stagevar.tensors.noise import PromptNoise

if TYPE_CHECKING:
    from stagevar.models.base import Conditioning
    from stagevar.tensors.cache import KVCache


class RecordingFailed(Exception):
    """A computation ran, but could not be recorded; the message says why."""


class Recorder(ABC):
    """Records a computation over fixed buffers."""

    @abstractmethod
    def record(
        self, run: Callable[[], Any], reset: Callable[[], None], separate_pool: bool = False
    ) -> tuple[Callable[[], None], Any]:
        """Records `run`: (replay, outputs). `reset` undoes the bookkeeping of `run`, which may be called several times.

        The outputs hold valid values only after a replay. Every replay overwrites them, and may overwrite the outputs
        of anything recorded later with the same `separate_pool`. Buffers that `run` reads but did not make are read in
        place at every replay, so the caller must keep them.

        Raises:
            RecordingFailed: if `run` works but cannot be recorded; the device is still usable then. Errors of `run`
                itself pass through, and so does torch.OutOfMemoryError: with more memory it could be recorded.
        """

    def new_pool(self, separate_pool: bool) -> None:  # noqa: B027  only CUDA graphs have pools
        """Called before the first recording with this `separate_pool`, or the first after all earlier ones were dropped.

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


def ends_capture_cleanly(version: str) -> bool:
    """Whether a failed capture leaves the allocator as it was (pytorch/pytorch#180395, fixed in 2.12)."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) >= (2, 12)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
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
                with capture, no_collection():
                    outputs = run()
            except RuntimeError as error:
                torch.cuda.set_stream(current)  # torch before 2.13 stays on the capturing stream
                torch.cuda.synchronize()  # raises where the device itself is lost
                cause = first_cause(error)
                if not ends_capture_cleanly(torch.__version__):
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
class Recording:
    """A recorded computation and where a replay leaves what it returned."""

    replay: Callable[[], None]
    outputs: Any


@dataclass
class StaticBuffers:
    """The buffers of one batch shape and the recorded prefixes over them."""

    conditioning: Conditioning
    noise: PromptNoise
    code_sum_BdHW: Tensor
    cache: KVCache
    nodes: dict[tuple[ScaleStep, ...], Recording] = field(default_factory=dict)
