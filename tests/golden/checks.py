"""What every golden case shares: the weight and input recipes, injected randomness, and the list of checks.

Source: the recipe is documented in the goldens' own README (weights from CRC32-seeded normals, inputs likewise).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_CONSTANT = {"zero_k_bias", "mask", "zero", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV"}


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference found and the largest allowed (0 for things that must be equal)."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit


def difference(name: str, ours: Tensor | np.ndarray, golden: np.ndarray, limit: float) -> Check:
    """Largest absolute difference; shapes that differ, and NaN, count as infinite."""
    ours_np = ours.detach().cpu().double().numpy() if isinstance(ours, Tensor) else np.asarray(ours, dtype=np.float64)
    if ours_np.shape != golden.shape:
        return Check(f"{name} shape {ours_np.shape} != {golden.shape}", math.inf, limit)
    worst = float(np.max(np.abs(ours_np - golden.astype(np.float64)), initial=0.0))
    return Check(name, math.inf if math.isnan(worst) else worst, limit)


def mismatches(name: str, ours: Tensor | np.ndarray, golden: np.ndarray) -> Check:
    """Number of unequal elements, none allowed."""
    ours_np = ours.detach().cpu().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    if ours_np.shape != golden.shape:
        return Check(f"{name} shape {ours_np.shape} != {golden.shape}", math.inf, 0)
    return Check(name, float(np.sum(ours_np != golden)), 0)


def _seeded(tag: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(tag.encode()) & 0xFFFFFFFF)


def recipe_weight(key: str, shape: Sequence[int], prefix: str = "") -> np.ndarray | None:
    """The recipe's value of one state-dict entry, None where the constructor's constant stays."""
    last = key.rsplit(".", 1)[-1]
    if last in _CONSTANT:
        return None
    n = _seeded(prefix + key).standard_normal(tuple(shape))
    if last.startswith("scale_mul"):
        value = math.log(4) + 0.1 * n
    elif last == "weight" and len(shape) == 1:
        value = 1 + 0.1 * n
    elif last == "weight":
        gain = 0.3 if "ada_lin" in key else 0.5 if key == "head.weight" else 1.0
        value = n * gain / math.sqrt(math.prod(shape[1:]))
    elif last in ("bias", "q_bias", "v_bias"):
        value = 0.05 * n
    elif last == "ada_gss":
        value = 0.2 * n
    elif last in ("pos_start", "pos_start_last", "pos_1LC"):
        value = 0.5 * n
    elif last == "cfg_uncond":
        value = 0.3 * n
    elif last == "mat_q":
        value = 0.1 * n
    elif last == "ca_gamma":
        value = 1 + 0.1 * n
    else:
        raise ValueError(f"the weight recipe has no rule for {key!r}")
    return value.astype(np.float32)


def recipe_state(shapes: Mapping[str, Sequence[int]], prefix: str = "") -> dict[str, Tensor]:
    """Every entry of a shape table that the recipe fills."""
    filled = ((key, recipe_weight(key, shape, prefix)) for key, shape in shapes.items())
    return {key: torch.from_numpy(value) for key, value in filled if value is not None}


def load_recipe(module: torch.nn.Module, shapes: Mapping[str, Sequence[int]], prefix: str = "") -> list[Check]:
    """Fills a module by the recipe; the checks say whether its keys and shapes are the reference's."""
    own = {key: list(value.shape) for key, value in module.state_dict().items()}
    wrong = sorted(key for key in own.keys() | shapes.keys() if own.get(key) != list(shapes.get(key, [-1])))
    module.load_state_dict(recipe_state(shapes, prefix), strict=False)
    module.eval()
    return [Check(f"state-dict keys and shapes {wrong[:3] if wrong else ''}".strip(), float(len(wrong)), 0)]


def rand_in(tag: str, shape: Sequence[int], scale: float) -> Tensor:
    """A recipe input, float32."""
    return torch.from_numpy((_seeded(f"input:{tag}").standard_normal(tuple(shape)) * scale).astype(np.float32))


def uniform_in(tag: str, shape: Sequence[int]) -> Tensor:
    """A recipe uniform draw, float64."""
    return torch.from_numpy(_seeded(f"input:{tag}").uniform(size=tuple(shape)))


class RecipeNoise:
    """The goldens' randomness behind the sampler's NoiseSource interface.

    Args:
        batch: images B. tag: of the bit draws (`u{tag}_s{scale}`).
    """

    def __init__(self, batch: int, tag: int | str = ""):
        self.batch, self.tag = batch, tag

    def at(self, scale: int, branches: Sequence[str]) -> _RecipeScaleNoise:
        return _RecipeScaleNoise(self, scale, len(branches) * self.batch)


_SITE_TAGS = {"index": "I", "projection": "Q"}


class _RecipeScaleNoise:
    def __init__(self, source: RecipeNoise, scale: int, rows: int):
        self.source, self.scale, self.rows = source, scale, rows

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        if purpose == "bits":
            # The recipe draws (B, L * bits), which is the same order flattened.
            return uniform_in(f"u{self.source.tag}_s{self.scale}", (self.source.batch, math.prod(shape))).reshape(
                self.source.batch, *shape
            )
        return uniform_in(f"{purpose}_s{self.scale}", (self.source.batch, *shape))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return rand_in(f"{purpose}_s{self.scale}", (self.source.batch, *shape), 1.0)

    def _site_tag(self, purpose: str, site: object) -> str:
        return f"{_SITE_TAGS[purpose]}_s{self.scale}_c{site.index}"  # type: ignore[attr-defined]

    def site_uniform(self, purpose: str, site: object, shape: tuple[int, ...]) -> Tensor:
        return uniform_in(self._site_tag(purpose, site), (self.rows, *shape))

    def site_normal(self, purpose: str, site: object, shape: tuple[int, ...]) -> Tensor:
        return rand_in(self._site_tag(purpose, site), (self.rows, *shape), 1.0)


def load_arrays(json_path: Path) -> dict[str, np.ndarray]:
    """The arrays beside a case's json."""
    with np.load(json_path.with_suffix(".npz"), allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


def worst_by_name(checks: Sequence[Check]) -> list[Check]:
    """One line per kind of check (names up to the first '@'), the one nearest to or furthest over its limit."""
    worst: dict[str, Check] = {}
    for check in checks:
        kind = check.name.split("@")[0]
        if kind not in worst or (not check.ok, check.value) > (not worst[kind].ok, worst[kind].value):
            worst[kind] = check
    return list(worst.values())
