"""How much memory a model needs, reckoned before anything is loaded, and a refusal when it cannot fit.

The arithmetic, per term:

* weights: the sum over the state dict of elements times the bytes of the precision each gets.
* KV cache: 2 (key, value) x 2 (branches) x batch x layers x width x tokens of all scales x bytes. A schedule that skips
  scales, keeps fewer tokens or drops a branch needs less; this is the bound that tuning allocates.
* activations of the largest scale, per row and token of width C and precision b bytes: the residual stream and its norm
  in float32 (8 C), the normed input in b, then the larger of attention (q, k, v in b, q and k twice in float32, output)
  and the feed-forward (hidden before and after its GELU).
* decoding: at full resolution the decoder holds about four maps of 2 x base channels; at most 2 Mpx at a time.
* text encoder: its weights while it is loaded. It can be freed after encoding, so it is shown but added only to the
  weights, not to the working memory of sampling.

A fixed share is added for the allocator and the CUDA context.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar.errors import UsageError

if TYPE_CHECKING:
    import torch

    from stagevar.models.loading import Part, Parts
    from stagevar.models.registry import LoadRequest

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

    @property
    def sampling(self) -> int:
        """While sampling and decoding, the text encoder freed."""
        return self.weights + self.tokenizer + self.kv_cache + max(self.activations, self.decoding) + self.overhead

    @property
    def encoding(self) -> int:
        """While prompts are encoded with the model already loaded."""
        return self.weights + self.tokenizer + self.text_encoder + self.overhead

    @property
    def peak(self) -> int:
        """The most that is needed at once."""
        return max(self.sampling, self.encoding)

    def lines(self) -> list[str]:
        """A readable account, one line per use, in MiB."""
        rows = {
            "transformer": self.weights,
            "tokenizer": self.tokenizer,
            "KV cache": self.kv_cache,
            "activations": self.activations,
            "image decoding": self.decoding,
            "text encoder (freed after encoding)": self.text_encoder,
            "context and allocator": self.overhead,
            "peak": self.peak,
        }
        return [f"{name:<36}{size / MIB:>10,.0f} MiB" for name, size in rows.items()]


def estimate(parts: Parts, request: LoadRequest) -> MemoryEstimate:
    """What a model needs on the request's device for its batch, resolution and precision."""
    transformer = parts.transformer.module
    element = request.dtype.itemsize
    depth, width = transformer.depth, transformer.width
    tokens = [h * w for h, w in parts.grids]
    rows = 2 * request.batch
    hidden = 4 * width
    attention = 3 * width * element + 4 * width * 4 + width * element
    per_token = 8 * width + width * element + max(attention, 2 * hidden * element)
    height, image_width = parts.pixels
    pixels = min(request.batch * height * image_width, max(2 * MIB, height * image_width))
    return MemoryEstimate(
        weights=_part_bytes(parts.transformer),
        tokenizer=_part_bytes(parts.tokenizer),
        kv_cache=2 * rows * depth * width * sum(tokens) * element,
        activations=rows * max(tokens) * per_token,
        decoding=4 * 2 * _decoder_channels(parts.tokenizer) * pixels * element,
        text_encoder=parts.text_bytes,
    )


def _part_bytes(part: Part) -> int:
    """Bytes of a module's state, shared storage counted once."""
    seen, total = set(), 0
    for key, value in part.module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            size = part.precision(key).itemsize if value.is_floating_point() else value.element_size()
            total += value.numel() * size
    return total


def _decoder_channels(part: Part) -> int:
    """Channels at full resolution: what the last convolution of the decoder reads."""
    weights = [value for key, value in part.module.state_dict().items() if "conv_out" in key and key.endswith("weight")]
    return max((value.shape[1] for value in weights if value.shape[0] == 3), default=128)


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device now; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def require(needed: MemoryEstimate, device: torch.device, name: str) -> None:
    """Raises UsageError when a model cannot fit into what is free on the device."""
    free = available_bytes(device)
    if free is not None and needed.peak > free:
        raise UsageError(
            f"{name} needs about {needed.peak / MIB:,.0f} MiB on {device}, {free / MIB:,.0f} MiB are free; "
            "use a larger device, a smaller --resolution or batch, or a smaller model"
        )


def estimate_model(name: str, **options: object) -> MemoryEstimate:
    """The estimate for a model by name; options as for `registry.load_model`. Loads nothing."""
    from stagevar.models.registry import model_parts, resolve

    request = resolve(name, **options)  # type: ignore[arg-type]
    return estimate(model_parts(request), request)
