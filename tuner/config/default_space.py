"""The search space of a model that has no file of its own, and what a file leaves out. No torch.

It is data in the notation of a search-space file, made from the model's family, its scales at the requested resolution and
the family's published settings, so it passes the same checks as a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagevar.models.registry import scale_grids
from stagevar.models.spec import ModelSpec
from stagevar.schedule import PRESETS, PROJECTIONS, paper, preset
from stagevar.schedule.grids import Grid

#: Kept shares of the tokens that are searched for every family, besides the published mean share.
_RATIOS = (0.05, 0.1, 0.177, 0.25, 0.35, 0.5, 0.7, 1)
#: Shares this close to the published one are left out in its favor.
_SAME = 0.1
#: Presets that are evaluated before anything is proposed, the most informative first.
_PRESETS = ("stagevar-paper", "stagevar-released", "fastvar", "skip-1", "skip-2")
_ENQUEUED = 4
#: Images per batch of quality evaluation, by the number of tokens of the last scale: about 16,000 tokens at a time.
_BATCH_TOKENS = 16_384
_LARGEST_BATCH = 16
#: Prompts that rank, and others that verify. Verification stops as soon as it can, but a schedule that loses nothing must be
#: verified four times out of five if it changes one prompt in twenty: with 512 that was every other time.
_SEARCH, _HELDOUT = 64, 1536


def default_space(spec: ModelSpec, resolution: str | int | None = None) -> dict[str, Any]:
    """The default space of a registered model, as plain YAML data.

    Raises UsageError for an unknown resolution, and for a model whose scales are not known before it is loaded.
    """
    grids = scale_grids(spec.name, resolution)
    published = spec.published if spec.published and spec.published.scales == len(grids) else None
    setting = paper(grids, published)
    scales = len(grids)
    parameters: dict[str, Any] = {
        "structure_end": {"low": setting.semantic_end, "high": scales - 1},
        "cfg_delay": [0, 1, 2, "never"],
        "branch": ["uncond", "cond"],
        "rank_ratio": _ratios(published.rank_ratio if published else 0.177),
        "rank_decay": [0.35, 0.53, 0.75, 1],
        "rank_delay": {"low": 0, "high": min(2, scales - 1)},
        "projection": list(PROJECTIONS),
        "rope": ["first", "index"],
        "site": ["chunk", "trunk"],
        "skip_last": {"low": 0, "high": 2 if scales >= 10 else 1},
    }
    if spec.family == "var":  # positions are learned and part of the tokens
        del parameters["rope"]
    return {
        "model": spec.name,
        "objectives": {"latency": "ms", "quality": _quality(spec.family)},
        "constraints": {"floors": {}},
        "semantic_end": setting.semantic_end,
        "parameters": parameters,
        "enqueue": _presets(grids, spec),
        "prompts": {
            "source": "imagenet" if spec.family == "var" else "geneval",
            "search": _SEARCH,
            "heldout": _HELDOUT,
            "micro_batch": max(1, min(_LARGEST_BATCH, _BATCH_TOKENS // (grids[-1][0] * grids[-1][1]))),
        },
    }


def _ratios(published: float) -> list[float]:
    """The searched shares including the published one, and a smaller one below it if it would be the smallest."""
    others = [ratio for ratio in _RATIOS if abs(ratio - published) > _SAME * published]
    smaller = [0.02] if published < min(others) else []
    return sorted([*smaller, published, *others])


def _quality(family: str) -> dict[str, Any]:
    """Metrics by family. A class index has no caption, so VAR is judged by similarity to the full schedule's image."""
    if family == "var":
        metrics = [
            {"name": "lpips", "weight": 1, "max_drop": 0.1},
            {"name": "clip_image_similarity", "weight": 1, "max_drop": 0.05},
        ]
    else:
        metrics = [
            {"name": "geneval", "weight": 1, "max_drop": 0.02},
            {"name": "clip_score", "weight": 1, "max_drop": 0.3},
            {"name": "clip_image_similarity", "weight": 0},  # reported, no limit
        ]
    return {"metrics": metrics}


def _presets(grids: Sequence[Grid], spec: ModelSpec) -> list[str]:
    """Presets that expand differently for this model; STAR's released code, for one, runs the paper's setting."""
    expanded: dict[Any, str] = {}
    for name in _PRESETS:
        assert name in PRESETS
        chunks = spec.published.chunks if spec.published else 1
        expanded.setdefault(preset(name, grids, spec.published).expand(grids, chunks), name)
    return list(expanded.values())[:_ENQUEUED]


def completed(given: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A space's data with what it leaves out taken from another: section by section, prompts and objectives key by key.

    Given parameters replace all others; without a given semantic_end, it is lowered to where these parameters start.
    """
    found = {**base, **{section: value for section, value in given.items() if value is not None}}
    for section in ("prompts", "objectives"):
        if isinstance(given.get(section), dict):
            found[section] = {**base.get(section, {}), **given[section]}
    if given.get("parameters") is not None and given.get("semantic_end") is None:
        start = _first(given["parameters"])
        if start is not None:
            found["semantic_end"] = min(base.get("semantic_end", 0), start)
    return found


def _first(parameters: Any) -> int | None:
    """Where structure_end starts, None for anything that the checks will reject."""
    values = parameters.get("structure_end") if isinstance(parameters, dict) else None
    values = [values.get("low")] if isinstance(values, dict) else values
    if not isinstance(values, list) or not values or not all(type(value) is int for value in values):
        return None
    return max(0, int(min(values)))
