"""How much memory a model needs, estimated before anything is loaded, and a refusal when it cannot fit.

The arithmetic, per term:

* weights: the sum over the state dict of elements times the bytes of the precision each gets. A schedule with scales in
  8 bits adds a byte per weight of the blocks' products, and four per output channel.
* KV cache: 2 (key, value) x batch x width x bytes x the entries that the schedule makes, summed over branches and layers
  (2 x layers x tokens of all scales for the full schedule, the bound that tuning allocates). With 8 bits an entry takes
  one byte per channel and four per head.
* activations of the largest scale, per row and token of width C and precision b bytes: the residual stream and its norm
  in float32 (8 C), the normed input in b, then the larger of attention (q, k, v in b, q and k twice in float32, output)
  and the feed-forward (hidden before and after its GELU). A reduced scale has its residual stream in full and the rest
  for the tokens that it keeps. One layer's 8-bit entries are widened to b at a time.
* restoration: outputs (float32) that a reduced scale is restored from, of two scales while one replaces the other.
* decoding: at full resolution the decoder holds about four maps of 2 x base channels; at most 2 Mpx at a time. The KV
  cache is still there, unless that leaves too little room: `Sampler.generate` then frees it first.
* text encoder: its weights while it is loaded. It can be freed after encoding, so it is shown but added only to the
  weights, not to the working memory of sampling.

A fixed share is added for the allocator and the CUDA context.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stagevar.errors import UsageError
from stagevar.schedule import LowRank, Pivotal, ScaleStep, Steps

if TYPE_CHECKING:
    import torch
    from torch import nn

    from stagevar.models.base import NextScaleModel
    from stagevar.models.parts import Part, Parts
    from stagevar.models.request import LoadRequest, ModelRequest

MIB = 2**20
#: CUDA context and allocator slack, and what Python and torch take on a CPU.
_OVERHEAD_BYTES = 600 * MIB


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by use; see the module's docstring for the arithmetic."""

    weights: int
    tokenizer: int
    kv_cache: int
    activations: int
    decoding: int
    text_encoder: int
    overhead: int = _OVERHEAD_BYTES
    restoration: int = 0

    @property
    def sampling(self) -> int:
        """While sampling and decoding, the text encoder freed."""
        return self.held + self.kv_cache + max(self.activations + self.restoration, self.decoding)

    @property
    def generating(self) -> int:
        """Like `sampling`, but with the KV cache freed before decoding."""
        return self.held + max(self.kv_cache + self.activations + self.restoration, self.decoding)

    @property
    def held(self) -> int:
        """What is held all the time."""
        return self.weights + self.tokenizer + self.overhead

    @property
    def encoding(self) -> int:
        """While prompts are encoded with the model already loaded."""
        return self.weights + self.tokenizer + self.text_encoder + self.overhead

    @property
    def least(self) -> int:
        """Below this much a model is refused."""
        return max(self.generating, self.encoding)

    @property
    def peak(self) -> int:
        """The most that is needed at once."""
        return max(self.sampling, self.encoding)

    @property
    def rows(self) -> dict[str, int]:
        """Bytes by use, in words, and the two sums that decide."""
        return {
            "transformer": self.weights,
            "tokenizer": self.tokenizer,
            "KV cache": self.kv_cache,
            "activations": self.activations,
            "restoration": self.restoration,
            "image decoding": self.decoding,
            "text encoder (freed after encoding)": self.text_encoder,
            "context and allocator": self.overhead,
            "sampling, cache freed before decoding": self.generating,
            "peak": self.peak,
        }

    def lines(self) -> list[str]:
        """A readable account, one line per use, in MiB."""
        return [f"{name:<40}{size / MIB:>10,.0f} MiB" for name, size in self.rows.items()]


def estimate(parts: Parts, request: LoadRequest) -> MemoryEstimate:
    """What a model needs on the request's device for its batch, resolution, precision and schedule.

    Raises:
        ScheduleError: if the request's schedule does not fit the model.
    """
    from stagevar.schedule import exact

    transformer = cast("NextScaleModel", parts.transformer.module)
    element, batch, width = request.dtype.itemsize, request.batch, transformer.width
    chunks, depth = transformer.chunk_layers, transformer.depth
    schedule = request.schedule or exact(len(parts.grids))
    steps = schedule.expand(parts.grids, len(chunks))

    def kept(index: int) -> int:
        """Outputs of a scale that a later one may be restored from; any may be while the schedule is still being searched."""
        step, later = steps[index], steps[index + 1 :]
        rows = len(step.branches) * batch * step.tokens * width * 4
        if request.schedule is None:
            return rows * (len(chunks) + 1) if later else 0
        sites = max((len(s.reduction.ranks) for s in later if isinstance(s.reduction, LowRank)), default=0)
        if step.keeps is not None:
            sites += 3 * len(range(depth)[slice(*step.keeps)])
        return rows * sites

    eight_bit = any(step.precision != "model" for step in steps)
    ran = [index for index, step in enumerate(steps) if not step.skipped]
    return MemoryEstimate(
        weights=_part_bytes(parts.transformer) + (_eight_bit_bytes(transformer) if eight_bit else 0),
        tokenizer=_part_bytes(parts.tokenizer),
        kv_cache=kv_cache_bytes(transformer, steps, batch, element, request.kv_cache),
        activations=working_bytes(transformer, steps, batch, element, request.kv_cache),
        decoding=decoding_bytes(parts.tokenizer.module, parts.pixels, batch, element),
        text_encoder=parts.text_bytes,
        restoration=max(kept(one) + kept(other) for one, other in zip(ran, ran[1:] or ran, strict=False)),
    )


def kv_cache_bytes(
    transformer: NextScaleModel, steps: Steps, batch: int, element: int, kv_cache: str, alike: bool = False
) -> int:
    """The KV cache of one schedule.

    Args:
        element: bytes of the blocks' precision.
        kv_cache: "model" or "int8".
        alike: whether every layer and branch has equally many entries, as on cards with enough memory.
    """
    from stagevar.tensors.cache import even, step_lengths

    lengths = step_lengths(steps, transformer.chunk_layers, transformer.prefix_tokens)
    entries = sum(sum(layers) for layers in (even(lengths) if alike else lengths).values())
    eight_bit = kv_cache == "int8"
    entry = transformer.heads * (transformer.head_dim + 4) if eight_bit else transformer.width * element
    return 2 * batch * entries * entry


def working_bytes(transformer: NextScaleModel, steps: Steps, batch: int, element: int, kv_cache: str) -> int:
    """Activations of the scale that needs most; arguments as for `kv_cache_bytes`."""
    from stagevar.tensors.cache import step_lengths

    width, chunks, depth, prefix = (
        transformer.width,
        transformer.chunk_layers,
        transformer.depth,
        transformer.prefix_tokens,
    )
    hidden = 4 * width
    attention = 3 * width * element + 4 * width * 4 + width * element
    per_token = width * element + max(attention, 2 * hidden * element)

    def working(index: int) -> int:
        step = steps[index]
        rows = len(step.branches) * batch
        widened = 0
        if kv_cache == "int8":
            widened = 2 * width * element * max(map(max, step_lengths(steps[: index + 1], chunks, prefix).values()))
        return rows * (step.tokens * 8 * width + max(_reduced_tokens(step, depth)) * per_token + widened)

    return max(working(index) for index, step in enumerate(steps) if not step.skipped)


def decoding_bytes(tokenizer: nn.Module, pixels: tuple[int, int], batch: int, element: int) -> int:
    """Maps of the decoder at full resolution."""
    height, width = pixels
    at_once = min(batch * height * width, max(2 * MIB, height * width))
    return 4 * 2 * _decoder_channels(tokenizer) * at_once * element


def _reduced_tokens(step: ScaleStep, depth: int) -> list[int]:
    """Tokens inside the layers of a step, per part of the model that has a number of its own."""
    if isinstance(step.reduction, LowRank):
        return list(step.reduction.ranks)
    if isinstance(step.reduction, Pivotal):
        inside = len(range(depth)[slice(*step.reduction.layers)])
        return [step.reduction.kept, *([step.tokens] if inside < depth else [])]
    return [step.tokens]


def _eight_bit_bytes(transformer: nn.Module) -> int:
    from stagevar.models.precision import is_quantizable

    products = [module.weight for name, module in transformer.named_modules() if is_quantizable(name, module)]
    return sum(weight.numel() + 4 * weight.shape[0] for weight in products)


def _part_bytes(part: Part) -> int:
    """Bytes of a module's state, shared storage counted once."""
    seen, total = set(), 0
    for key, value in part.module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            size = part.precision(key).itemsize if value.is_floating_point() else value.element_size()
            total += value.numel() * size
    return total


def _decoder_channels(tokenizer: nn.Module) -> int:
    """Channels at full resolution: what the last convolution of the decoder reads."""
    state = tokenizer.state_dict() if hasattr(tokenizer, "state_dict") else {}  # some decode without weights
    weights = [value for key, value in state.items() if "conv_out" in key and key.endswith("weight")]
    return max((value.shape[1] for value in weights if value.shape[0] == 3), default=128)


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device now, including what torch's allocator keeps for reuse; None if the system does not say."""
    if device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _meminfo("MemAvailable")


def total_bytes(device: torch.device) -> int | None:
    """All memory of a device, the same whatever runs there; None if the system does not say."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    return _meminfo("MemTotal")


def _meminfo(name: str) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def largest_batch(model: ModelRequest, at_most: int, room_bytes: int) -> int:
    """The largest of `at_most`, its half, its quarter and so on whose estimate stays within the room; at least 1."""
    batch = at_most
    while batch > 1 and estimate_model(dataclasses.replace(model, batch=batch)).peak > room_bytes:
        batch //= 2
    return batch


def require(needed: MemoryEstimate, device: torch.device, name: str) -> None:
    """Raises UsageError if a model cannot fit into the device's free memory."""
    free = available_bytes(device)
    if free is not None and needed.least > free:
        raise UsageError(
            f"{name} needs about {needed.least / MIB:,.0f} MiB on {device}, but only {free / MIB:,.0f} MiB are free; "
            "use a larger device, a smaller --resolution or batch, --kv-cache int8, or a smaller model"
        )


def estimate_model(model: ModelRequest) -> MemoryEstimate:
    """The estimate for a requested model. Loads nothing."""
    from stagevar.models.registry import model_parts, resolve

    request = resolve(model)
    return estimate(model_parts(request), request)
