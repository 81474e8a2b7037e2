"""What a sampler needs of an engine, and the one that launches every kernel as the code reaches it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from stagevar.schedule import ScaleStep
from stagevar.tensors.noise import Draws, NoiseSource

if TYPE_CHECKING:
    from stagevar.engine.recorder import StaticBuffers
    from stagevar.models.base import Conditioning, NextScaleModel
    from stagevar.models.infinity.tokenizer import Swished
    from stagevar.models.layers import Chained
    from stagevar.tensors.cache import KVCache


@dataclass(frozen=True)
class Start:
    """What a generation starts from; the graph engine hands out buffers that stay in place."""

    conditioning: Conditioning
    noise: NoiseSource
    code_sum_BdHW: Tensor
    resident: StaticBuffers | None = None


class Engine(ABC):
    """Carries out scales and decoding for a sampler.

    Attributes:
        name: part of every latency figure.
        max_caches: KV caches kept for different batches or schedules.
        compiled: whether the pieces between matrix products are compiled kernels (stagevar.models.fused).
        chained, draws: replacements for some of those pieces (stagevar.engine.kernels); None for no replacement.
        swished: replacement for the norms of the decoder, or None.
        fallback_reason: why it launches every kernel as eager does although its name says otherwise; None if it does
            not.
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

    def condition(
        self, transformer: NextScaleModel[Any], prompts: Any, negative: Any | None, noise: NoiseSource
    ) -> Conditioning:
        """The conditioning that a generation with this noise starts from; arguments as for `NextScaleModel.condition`.

        It may overwrite that of the generation before, which must have ended.
        """
        return transformer.condition(prompts, negative)

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
