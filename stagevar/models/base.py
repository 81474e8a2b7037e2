"""What the sampler needs from a next-scale model, a tokenizer and a text encoder. Every family implements exactly this.

Rows: a forward pass works on R rows. While guidance runs, R = 2B with the B conditional rows first and the B
unconditional rows after them; after the cutoff R = B rows of the branch that was kept.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from stagevar.tensors.noise import ScaleNoise

Grid = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """A place where an accelerator may reduce tokens: kind is trunk, chunk, attn, cross or mlp; index its chunk or layer."""

    kind: str
    index: int = 0


#: run(x_RLC, positions) -> y_RLC: the computation that a site wraps. `positions` are raster positions inside the scale:
#: None for all in order, (r,) shared by the rows, or (R, r) per row.
SiteFn = Callable[[Tensor, "Tensor | None"], Tensor]
#: around(site, x_RLC, positions, run) -> y_RLC
Around = Callable[[Site, Tensor, "Tensor | None", SiteFn], Tensor]
#: attend(layer, q_RHLc, k_RHLc, v_RHLc, softmax_scale) -> out_RHLc over everything cached, after appending k and v.
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def apply_guidance(x_RLC: Tensor, guidance: float) -> Tensor:
    """Both branches' streams mixed into one for the conditional rows: u + s(c - u)."""
    cond, uncond = x_RLC.chunk(2)
    return torch.lerp(uncond, cond, guidance)


def around_nothing(site: Site, x_RLC: Tensor, positions: Tensor | None, run: SiteFn) -> Tensor:
    """The exact forward: every site runs on all its tokens."""
    return run(x_RLC, positions)


def leaves_layers_alone(around: Around) -> bool:
    """Whether a hook runs every site inside layers unchanged and keeps nothing from it, so that sublayers may be chained."""
    return around is around_nothing or getattr(around, "leaves_layers_alone", False)


class Conditioning(ABC):
    """What a prompt batch contributes to every scale, precomputed once. Rows as described in the module docstring."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of rows."""

    @abstractmethod
    def select(self, rows: slice | list[int]) -> Conditioning:
        """The same conditioning restricted to these rows (views for a slice; a list of row numbers copies)."""

    def tensors(self) -> list[Tensor]:
        """Every tensor of the conditioning, in a fixed order."""
        return list(_leaves(vars(self)))

    def clone(self) -> Conditioning:
        """A copy with its own tensors."""
        return dataclasses.replace(self, **_cloned(vars(self)))  # type: ignore[type-var]


def by_layer(conditioning: Conditioning, fuse: tuple[int, float] | None) -> Callable[[int], Any]:
    """The conditioning that each layer reads: from a fusing layer on that of the conditional rows."""
    if fuse is None:
        return lambda layer: conditioning
    conditional = conditioning.select(slice(0, conditioning.rows // 2))
    return lambda layer: conditional if layer >= fuse[0] else conditioning


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(part) for key, part in value.items()}
    return type(value)(_cloned(part) for part in value) if isinstance(value, list | tuple) else value


class Residual(Protocol):
    """The multi-scale residual loop of a tokenizer (bits or vector-quantized)."""

    grids: tuple[Grid, ...]

    def zeros(self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor: ...

    def add(self, code_sum_BdHW: Tensor, tokens: Tensor, scale: int) -> Tensor: ...

    def next_input(self, code_sum_BdHW: Tensor, scale: int) -> Tensor: ...


class ImageTokenizer(Protocol):
    """Turns a code sum into pixels and (if it has an encoder) an image into a latent."""

    latent_dim: int

    @property
    def residual(self) -> Residual: ...

    def decode(self, code_sum_BdHW: Tensor) -> Tensor:
        """Image (B, 3, H, W), nominally in [-1, 1], not clamped."""
        ...


class TextEncoder(Protocol):
    """Prompts to whatever the family's `condition` reads."""

    def encode(self, prompts: Sequence[str]) -> Any: ...


Conditions = TypeVar("Conditions", bound=Conditioning)


@dataclass(frozen=True)
class TextInputs(Generic[Conditions]):
    """The text of a batch as tensors of few different shapes, and what makes its conditioning of them.

    Attributes:
        tensors: on any device.
        conditioner: makes the function from these tensors, on the model's device, to the conditioning. The function can be
            recorded: it waits for nothing, and what no prompt changes was made with it, so its results may outlive it.
    """

    tensors: tuple[Tensor, ...]
    conditioner: Callable[[], Callable[..., Conditions]]


class NextScaleModel(nn.Module, ABC, Generic[Conditions]):
    """A transformer that predicts one whole scale at a time; generic over its conditioning.

    Attributes:
        depth, width, heads, head_dim: of the transformer, set by the family.
        chunk_layers: layer range of each chunk.
        prefix_tokens: tokens that the first scale runs, and caches, before its grid's own; only families that read text
            as a prefix have any.
    """

    depth: int
    width: int
    heads: int
    head_dim: int
    chunk_layers: tuple[range, ...]
    prefix_tokens: int = 0

    @abstractmethod
    def condition(self, prompts: Any, negative: Any | None = None) -> Conditions:
        """Conditioning of 2B rows (conditional rows first) from a text encoder's output."""

    def text_inputs(
        self, prompts: Any, negative: Any | None = None, multiple: int = 1
    ) -> TextInputs[Conditions] | None:
        """What `condition` computes, in two halves: padded inputs, and the rest; None for families that do not divide it.

        Args:
            prompts, negative: as for `condition`.
            multiple: text is padded to a multiple of so many rows, which are masked. So the conditioning differs from
                `condition`'s by these rows and by rounding.
        """
        return None

    @abstractmethod
    def embed(self, features_BLt: Tensor | None, scale: int, conditioning: Conditions) -> Tensor:
        """Trunk input x_RLC of a scale; `features_BLt` is `Residual.next_input` (None at scale 0), repeated over branches."""

    @abstractmethod
    def trunk(
        self,
        x_RLC: Tensor,
        scale: int,
        conditioning: Conditions,
        attend: Attend,
        around: Around = around_nothing,
        inner_guidance: dict[int, float] | None = None,
        fuse: tuple[int, float] | None = None,
    ) -> Tensor:
        """All blocks, in order.

        Args:
            inner_guidance: layer -> s; mixes the branches after that layer: u + s(c - u).
            fuse: (layer, s); mixes them in the same way before that layer, and runs it and all later ones on the B
                conditional rows alone, so that the result has B rows. Not inside a site that reduces tokens.
        """

    @abstractmethod
    def logits(self, x_RLC: Tensor, conditioning: Conditions) -> Tensor:
        """Logits (R, L, V) in float32."""

    @abstractmethod
    def draw(self, logits_BLV: Tensor, noise: ScaleNoise, sampling: Sampling) -> Tensor:
        """Tokens of one scale from guided, tempered logits; randomness only from `noise`."""

    def scale_tokens(
        self,
        logits_BLV: Tensor,
        x_RLC: Tensor,
        scale: int,
        noise: ScaleNoise,
        sampling: Sampling,
        residual: Residual,
    ) -> Tensor:
        """`draw`, for families whose tokens follow from the logits alone; others override it.

        Args:
            x_RLC: the trunk's output in the rows that the logits were made from, 2B if guidance mixed them.
            residual: the tokenizer's, which takes what this returns.
        """
        return self.draw(logits_BLV, noise, sampling)

    def set_grids(self, grids: Sequence[Grid]) -> None:
        """Prepares position tables for a resolution and aspect ratio (called once, before the first `embed`)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Guidance convention: logits = u + s(c - u); s = 1 turns it off.

    Attributes:
        guidance: one value per scale (`per_scale` expands a number).
        temperature: divides the logits; one value per scale.
        top_k, top_p: 0 turns them off.
        inner_guidance_layers: blocks after which the branches are mixed; negative numbers count from the end, as in
            Infinity's cfg_insertion_layer.
        logits_guidance: whether the logits are mixed as well.
    """

    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    top_k: int = 0
    top_p: float = 0.0
    logits_guidance: bool = True
    inner_guidance_layers: tuple[int, ...] = ()

    @staticmethod
    def per_scale(value: float | Sequence[float], scales: int) -> tuple[float, ...]:
        """A number or a list as a tuple with one entry per scale (a short list repeats its last entry)."""
        if isinstance(value, int | float):
            return (float(value),) * scales
        values = tuple(float(v) for v in value)
        return (values + values[-1:] * scales)[:scales]


class Provenance(TypedDict, total=False):
    """What profiles record about a loaded model's weights.

    Attributes:
        weights: SHA-256 of each part's content.
        weight_files: SHA-256 of every file.
        sources: hub files with their commits.
        load: options that load the same model again.
        random_seed: of random weights, instead of files.
        hash, preset, made: of a shipped model.
    """

    weights: dict[str, str]
    weight_files: list[str]
    sources: dict[str, str]
    load: Mapping[str, object]
    text: Mapping[str, object]
    random_seed: int
    hash: str
    preset: str
    made: str


@dataclass
class LoadedModel:
    """Everything needed to make images: what `registry.load_model` returns and the Sampler takes.

    Attributes:
        kv_cache: one of stagevar.tensors.cache.KV_CACHES.
    """

    name: str
    transformer: NextScaleModel
    tokenizer: ImageTokenizer
    text: TextEncoder
    sampling: Sampling
    grids: tuple[Grid, ...]
    pixels: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    random_weights: bool = False
    kv_cache: str = "model"
    provenance: Provenance = field(default_factory=Provenance)
