"""The steps of a generation, recorded once and replayed.

With static schedules every scale of a profile has fixed shapes, and the sampler's randomness depends on nothing but keys
in one small tensor. So the graph engine records each distinct prefix of steps once, over buffers that stay where they are
(conditioning, keys, KV cache, code sum), and replays it for every later image. A node of that tree takes its parent's
output buffers as its inputs. Where a family divides its text conditioning (`NextScaleModel.text_inputs`), its second half
is a recording too, one per shape of the text, and the root of the trees of all batches and schedules with that shape: its
outputs are the conditioning that they read. So nothing is copied but padded text, its mask and keys.

Memory. Recordings of text and steps share a pool: the scratch space of one may become the outputs of another that is
recorded later, so a replay may destroy the outputs of every later recording. That is sound as long as whatever is still to
be read was recorded before whatever is still to be replayed. It holds from the beginning of a generation to its end:

* Its text is replayed first, when nothing is left to be read: beginning a generation ends the one before, of whatever
  shape, and what was split off that one has copies.
* Then steps are replayed, which read outputs of their text and their ancestors. These were recorded before them: a text
  before any step over it, and neither text nor ancestor is dropped, and recorded again, before what reads it.
* No other text is replayed meanwhile, nor steps over one.

It does not hold for the decoder, which is replayed in the middle of a walk, though it may have been recorded before the text
and the steps of that walk; hence its pool is its own.

Both engines run the same kernels in the same order, except for the masked text rows that the graph engine adds up to a
bucket.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stagevar.engine.base import Engine, Start
from stagevar.engine.recorder import Recorder, Recording, RecordingFailed, StaticBuffers
from stagevar.schedule import ScaleStep
from stagevar.tensors.noise import NoiseSource, PromptNoise

if TYPE_CHECKING:
    from stagevar.models.base import Conditioning, NextScaleModel, TextInputs
    from stagevar.tensors.cache import KVCache

#: Text rows are padded to a multiple of this, so that prompts of different lengths replay the same graphs.
TEXT_BUCKET = 32


@dataclass
class RecordedText(Recording):
    """The recording that makes a conditioning of padded text, and the buffers that it reads."""

    inputs: tuple[Tensor, ...]


def _shapes(tensors: Iterable[Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


class GraphEngine(Engine):
    """Records each distinct prefix of steps once and replays it.

    What cannot be recorded runs eagerly, with a warning: the first failure ends recording, but earlier recordings are
    still replayed. Injected randomness is never recorded. One engine serves one sampler.

    Args:
        recorder: CUDA graphs in production.
        max_nodes: recorded prefixes kept per batch shape; beyond that the oldest leaves are dropped, and recorded again
            when needed.

    Attributes:
        recorded, replayed: how often each happened to a step.
        recording_s: seconds spent on recording, including warm-up.
        texts: recordings that make a conditioning, by shapes of the padded text.
        fallback_reason: why nothing more is recorded.
    """

    max_caches = 3

    def __init__(self, recorder: Recorder, max_nodes: int = 256, compiled: bool = False):
        self.recorder, self.max_nodes, self.compiled = recorder, max_nodes, compiled
        self.name = "graph-compiled" if compiled else "graph"
        self.recorded = self.replayed = 0
        self.recording_s = 0.0
        self.texts: dict[Any, RecordedText] = {}
        self.fallback_reason = None
        self._residents: dict[Any, StaticBuffers] = {}
        self._decoders: dict[tuple[int, ...], tuple[Tensor, Callable[[], None], Tensor]] = {}

    def condition(
        self, transformer: NextScaleModel[Any], prompts: Any, negative: Any | None, noise: NoiseSource
    ) -> Conditioning:
        text = None
        if isinstance(noise, PromptNoise):
            inputs = transformer.text_inputs(prompts, negative, TEXT_BUCKET)
            text = None if inputs is None else self._recorded_text(inputs, noise.keys_B2.device)
        if text is None:
            return transformer.condition(prompts, negative)
        text.replay()
        return text.outputs

    def _recorded_text(self, inputs: TextInputs[Any], device: torch.device) -> RecordedText | None:
        """The recording for these inputs, which they were copied into; None if it failed, now or earlier."""
        key = _shapes(inputs.tensors)
        text = self.texts.get(key)
        if text is not None:
            for mine, theirs in zip(text.inputs, inputs.tensors, strict=True):
                mine.copy_(theirs)
        elif self.fallback_reason is None:
            held, compute = tuple(tensor.to(device, copy=True) for tensor in inputs.tensors), inputs.conditioner()
            recorded = self._record(lambda: compute(*held), lambda: None)
            if recorded is not None:
                text = self.texts[key] = RecordedText(*recorded, held)
        return text

    def start(self, wanted: Start, cache: KVCache, fixed: object) -> Start:
        if not isinstance(wanted.noise, PromptNoise):
            return wanted  # injected randomness cannot be replayed
        conditioning, noise = wanted.conditioning, wanted.noise
        recorded = any(text.outputs is conditioning for text in self.texts.values())
        key = (id(cache), fixed, id(conditioning) if recorded else _shapes(conditioning.tensors()))
        resident = self._residents.get(key)
        if resident is not None:
            if not recorded:
                for mine, theirs in zip(resident.conditioning.tensors(), conditioning.tensors(), strict=True):
                    mine.copy_(theirs)
            resident.noise.refresh(noise)
        elif self.fallback_reason is not None:
            return wanted  # nothing will be recorded over it
        else:
            held = conditioning if recorded else conditioning.clone()
            resident = self._residents[key] = StaticBuffers(held, noise, wanted.code_sum_BdHW.clone(), cache)
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
            node = resident.nodes[steps] = Recording(*recorded)
            self.recorded += 1
        node.replay()
        self.replayed += 1
        cache.rewind(node.outputs.lengths)
        return node.outputs

    def _record(
        self, run: Callable[[], Any], reset: Callable[[], None], separate_pool: bool = False
    ) -> tuple[Callable[[], None], Any] | None:
        """(replay, outputs), or None if recording failed, now or earlier."""
        if self.fallback_reason is not None:
            return None
        started = time.perf_counter()
        if not (self._decoders if separate_pool else self.texts or any(r.nodes for r in self._residents.values())):
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
        read = {id(resident.conditioning) for resident in self._residents.values()}
        self.texts = {key: text for key, text in self.texts.items() if id(text.outputs) in read}

    def release(self) -> None:
        self.texts.clear()
        self._residents.clear()
        self._decoders.clear()
