"""The state dict inside what a trainer saved: next to counters and arguments, under any usual key, nested or not."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

from stagevar.models.checkpoint.names import bare_names, without_wrappers

#: Where state dicts usually are, the preferred first: a raw model before its averages.
_USUAL: tuple[str, ...] = (
    "state_dict", "model", "model_state_dict", "module", "net", "network", "generator", "transformer", "weights",
    "params", "params_ema", "model_ema", "ema", "ema_state_dict", "ema_model",
)  # fmt: skip
_DEPTH = 4


def find_state_dict(
    loaded: Any, nested: tuple[tuple[str, ...], ...] = (), expected: Collection[str] = ()
) -> dict[str, Tensor] | None:
    """The tensors, by name, that fit a module best; None if there are none.

    Values other than tensors (epochs, arguments) are left out.

    Args:
        loaded: what a file holds.
        nested: paths that a family's trainer uses, tried in this order before the usual keys.
        expected: the module's names; of several state dicts with equally many of them, the preferred path wins.
    """
    bare_expected = {without_wrappers(name) for name in expected}
    best, most = None, -1
    for tensors in _candidates(loaded, nested):
        shapes = dict.fromkeys(tensors, (1,))
        present = len(bare_expected & set(bare_names(shapes, bare_expected).values()))
        if present > most:
            best, most = tensors, present
    return best


def _candidates(loaded: Any, nested: tuple[tuple[str, ...], ...]) -> Iterator[dict[str, Tensor]]:
    """State dicts in the order of preference."""
    for route in nested:
        inner: Any = loaded
        for key in route:
            inner = inner.get(key) if isinstance(inner, dict) else None
        yield from _here(inner)
    yield from _walk(loaded, _DEPTH)


def _walk(loaded: Any, depth: int) -> Iterator[dict[str, Tensor]]:
    if not isinstance(loaded, dict) or depth == 0:
        return
    if any(isinstance(value, Tensor) for value in loaded.values()):
        yield from _here(loaded)
    inner = {key: value for key, value in loaded.items() if isinstance(value, dict)}
    order = {key: index for index, key in enumerate(_USUAL)}
    for key in sorted(inner, key=lambda key: order.get(key, len(order)) if isinstance(key, str) else len(order)):
        yield from _walk(inner[key], depth - 1)


def _here(value: Any) -> Iterator[dict[str, Tensor]]:
    if isinstance(value, dict):
        tensors = {key: item for key, item in value.items() if isinstance(key, str) and isinstance(item, Tensor)}
        if tensors:
            yield tensors
