"""The graph engine without graphs: every replay launches the same kernels over the same buffers, one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from stagevar.engine import Recorder
from stagevar.models.base import Conditioning


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors of what an engine records: a conditioning, a sampler's saved state, an image, or lists of tensors."""
    if isinstance(value, Tensor | list):
        return list(tree_flatten(value)[0])
    if isinstance(value, Conditioning):
        return value.tensors()
    return [value.code_sum_BdHW, *(cached.y_RLC for cached in value.state.values())]


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, in the order of `tensors_of`."""
    if isinstance(value, Tensor | list):
        return tree_map_only(Tensor, lambda _: next(tensors), value)
    if isinstance(value, Conditioning):
        return dataclasses.replace(value, **tree_map_only(Tensor, lambda _: next(tensors), vars(value)))
    code_sum = next(tensors)
    state = {site: dataclasses.replace(cached, y_RLC=next(tensors)) for site, cached in value.state.items()}
    return dataclasses.replace(value, code_sum_BdHW=code_sum, state=state)


class RelaunchRecorder(Recorder):
    """What a recorded graph must equal bit for bit, including padded text and fixed buffers, but launched eagerly."""

    def record(
        self, run: Callable[[], Any], reset: Callable[[], None], apart: bool = False
    ) -> tuple[Callable[[], None], Any]:
        made = run()
        reset()
        outputs = [tensor.clone() for tensor in tensors_of(made)]

        def replay() -> None:
            for mine, fresh in zip(outputs, tensors_of(run()), strict=True):
                mine.copy_(fresh)

        return replay, with_tensors(made, iter(outputs))
