"""How many kernels an image of Infinity-2B launches, counted on a card that is made up: nothing is computed."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from stagevar.engine import TEXT_BUCKET, GraphEngine, Recorder, kernels
from stagevar.models import fused
from stagevar.models.base import LoadedModel
from stagevar.models.layers import Chained, Pieces, modulated_norm
from stagevar.models.loading import default_sampling
from stagevar.models.registry import model_parts, published, resolve
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import preset
from stagevar.schedule.grids import infinity_grids
from stagevar.tensors.noise import Draws, PromptNoise, normal, philox4x32, uniform
from tests.fakes.cuda import CUDA, fake_mode

#: Blocks and chunks of Infinity-2B.
DEPTH, CHUNKS = 32, 8
#: Operations that are several kernels, or none.
_KERNELS = {
    "aten.scatter.src": 2,
    "aten.sort.stable": 4,
    "aten.empty.memory_format": 0,
    "aten.empty_like.default": 0,
    "aten.new_empty.default": 0,
    "aten.detach.default": 0,
    "aten.lift_fresh.default": 0,
    "prim.device.default": 0,
    # Flash attention writes its output so that heads of a token are adjacent: joining them is a view on a card.
    "aten.flatten.using_ints": 0,
}
#: Kernels of each compiled piece, as Inductor generates them for a card.
_COMPILED = {"modulated_norm": 1, "real_heads": 3, "philox": 1}
#: Those of stagevar.engine.kernels; GELU is part of its product.
_KERNELS_OF_OURS = {"gated_norm": 1, "heads_into_cache": 1, "gelu_linear": 1, "draws": 1}


class Launches(TorchDispatchMode):
    """Counts kernels. A mask of truth values costs attention two more, which make numbers of it."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self._inside = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self._inside:
            self.count += self._kernels(function, args, kwargs or {}, result)
        return result

    @staticmethod
    def _kernels(function, args, kwargs, result) -> int:
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        made = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        name = str(function)
        if all(x.device != CUDA for x in (*given, *made)):
            return 0
        if "attention" in name:
            return 1 + 2 * any(x.dtype == torch.bool for x in given)
        if name in _KERNELS:
            return _KERNELS[name]
        shared = {x.untyped_storage()._cdata for x in given} & {x.untyped_storage()._cdata for x in made}
        return 0 if shared and (function.is_view or (made[0] is given[0] and not name.endswith("_.default"))) else 1

    def piece(self, name: str, function):
        """The function as a compiled piece: its kernels instead of its operations."""

        def run(*arguments):
            self._inside = True
            try:
                return function(*arguments)
            finally:
                self._inside = False
                self.count += {**_COMPILED, **_KERNELS_OF_OURS}[name]

        return run


def _on_card(module: nn.Module, precision) -> nn.Module:
    for name, part in module.named_modules(remove_duplicate=False):
        for store in (part._parameters, part._buffers):
            for last, value in store.items():
                if value is None:
                    continue
                dtype = precision(f"{name}.{last}".lstrip(".")) if value.is_floating_point() else value.dtype
                fresh = torch.empty(value.shape, dtype=dtype, device=CUDA)
                store[last] = nn.Parameter(fresh, requires_grad=False) if store is part._parameters else fresh
    return module.eval()


def _draw(keys_R2, count, draw, word_R1=0):
    return torch.empty(len(keys_R2), count, device=CUDA)


def launches_per_scale(schedule: str, engine: str) -> list[int]:
    """Kernels of every scale of Infinity-2B at 1024 px, batch 1, as "graph-compiled" or "graph-kernels" records them.

    Counted for one block, for two in one chunk and for two in two: all blocks launch alike, and so do all chunks.
    """
    counts = {shape: _launches(schedule, engine, *shape) for shape in ((1, 1), (2, 1), (2, 2))}
    return [
        one + (DEPTH - 1) * (two - one) + (CHUNKS - 1) * (apart - two)
        for one, two, apart in zip(counts[1, 1], counts[2, 1], counts[2, 2], strict=True)
    ]


def launches_of_begin() -> int:
    """Kernels outside recordings that begin an image, of a text length that was met before, whichever graph engine."""
    one, two = (_launches_of_begin(depth) for depth in (1, 2))
    return one + (DEPTH - 1) * (two - one)


def _launches_of_begin(depth: int) -> int:
    counter = Launches()
    with fake_mode(), torch.inference_mode():
        model, _ = _model(counter, "graph-compiled", depth, 1)
        sampler = Sampler(model, engine=GraphEngine(Unlaunched()))
        text = torch.empty(25, model.transformer.config.text_dim)
        sampler.begin(["a"], [0], encoded=[text])
        with counter:
            sampler.begin(["b"], [1], encoded=[text])
    return counter.count


class Unlaunched(Recorder):
    """Replaying launches nothing that is counted."""

    def record(self, run, reset, separate_pool=False):
        return lambda: None, run()


def _launches(schedule: str, engine: str, depth: int, chunks: int) -> list[int]:
    counter = Launches()
    with fake_mode(), torch.inference_mode():
        model, noise = _model(counter, engine, depth, chunks)
        transformer = model.transformer
        inputs = transformer.text_inputs([torch.empty(25, transformer.config.text_dim)], None, TEXT_BUCKET)
        conditioning = inputs.conditioner()(*(tensor.to(CUDA) for tensor in inputs.tensors))
        transformer.condition = lambda prompts, negative=None: conditioning
        sampler = Sampler(model)
        steps = preset(schedule, model.grids, published(model.name)).expand(model.grids, sampler.chunks)
        generation = sampler.begin(["a"], [0], steps=steps, encoded=(), noise=noise)
        counts = []
        for step in steps:
            before = counter.count
            with counter:
                sampler.advance(generation, step)
            counts.append(counter.count - before)
    return counts


def _model(counter: Launches, engine: str, depth: int, chunks: int) -> tuple[LoadedModel, PromptNoise]:
    """Infinity-2B with so many blocks, under `fake_mode`, with the engine's pieces; and a batch of one's noise."""
    with mock.patch("stagevar.models.registry.resolve_device", lambda device: CUDA):
        request = resolve("infinity-2b", weights="random", device="cuda", dtype=torch.bfloat16)
    shape = request.spec.settings["transformer"]
    assert (shape["depth"], shape["chunks"]) == (DEPTH, CHUNKS)
    settings = {**request.spec.settings, "transformer": {**shape, "depth": depth, "chunks": chunks}}
    request = dataclasses.replace(request, spec=dataclasses.replace(request.spec, settings=settings))
    made = model_parts(request)
    transformer = _on_card(made.transformer.module, made.transformer.precision)
    transformer.set_grids(*infinity_grids(request.resolution, request.ratio))
    noise = PromptNoise(["a"], [0], "cpu")
    noise.device, noise.keys_B2 = CUDA, torch.empty(1, 2, dtype=torch.int64, device=CUDA)
    noise.words_R1 = torch.empty(2, 1, dtype=torch.int64, device=CUDA)
    chained, philox = None, counter.piece("philox", philox4x32)
    noise.draws = Draws(functools.partial(uniform, philox=philox), functools.partial(normal, philox=philox))
    if engine == "graph-kernels":
        chained = Chained(
            counter.piece("gated_norm", kernels.gated_norm_twin),
            counter.piece("heads_into_cache", kernels.heads_into_cache_twin),
            counter.piece("gelu_linear", kernels.gelu_linear),
        )
        noise.draws = Draws(counter.piece("draws", _draw), counter.piece("draws", _draw))
    pieces = Pieces(
        counter.piece("modulated_norm", modulated_norm),
        counter.piece("real_heads", fused.real_heads),
        fused.pair_table,
        chained,
    )
    for part in transformer.modules():
        if hasattr(part, "pieces"):
            part.pieces = pieces
    model = LoadedModel(
        "infinity-2b",
        transformer,
        _on_card(made.tokenizer.module, made.tokenizer.precision),
        None,
        default_sampling(request, len(made.grids)),
        made.grids,
        made.pixels,
        CUDA,
        torch.bfloat16,
        random_weights=True,
    )
    return model, noise
