"""A CUDA device without a card: shapes and devices are followed, nothing is computed, and waiting for values is an error."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from stagevar.models.base import LoadedModel
from stagevar.models.variants import variant
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import Steps
from stagevar.tensors.noise import PromptNoise

CUDA = torch.device("cuda", 0)


@contextlib.contextmanager
def fake_mode():
    """The mode under which everything here happens."""
    # Which attention kernel can run is asked of a real card once an order is given.
    unordered = mock.patch("stagevar.sampling.sampler.attention_kernels", lambda device: contextlib.nullcontext())
    card = mock.patch("stagevar.sampling.sampler.total_bytes", lambda device: 80 * 2**30)
    with FakeTensorMode(allow_non_fake_inputs=True), unordered, card:
        yield


def _moved(module: nn.Module) -> nn.Module:
    module = variant(module, lambda name, part: None)
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                fresh = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(fresh, requires_grad=False)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
    return module


def _elsewhere(value):
    """The same structure with fake tensors on the card."""
    return tree_map_only(
        torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA), value
    )


def begin_on_fake_cuda(model: LoadedModel, prompts: Sequence[str], steps: Steps, **sampler_options):
    """(sampler, generation) of the model on a made-up card; to be called, and advanced, under `fake_mode`.

    Text and keys are made on the CPU and moved: a generation starts when they are there.
    """
    with unset_fake_temporarily():
        conditioning = model.transformer.condition(model.text.encode(prompts))
        noise = PromptNoise(prompts, range(len(prompts)), "cpu")
    transformer, tokenizer = _moved(model.transformer), model.tokenizer
    transformer.set_grids(model.grids)
    conditioning = dataclasses.replace(conditioning, **_elsewhere(vars(conditioning)))
    if hasattr(conditioning, "constants"):
        conditioning = dataclasses.replace(conditioning, constants=transformer.constants())
    transformer.condition = lambda prompts, negative=None: conditioning
    if isinstance(tokenizer, nn.Module):
        tokenizer = _moved(tokenizer)
        if hasattr(tokenizer, "set_grids"):  # the residual loop of some reads weights
            tokenizer.set_grids(model.grids)
    noise.keys_B2, noise.words_R1, noise.device = _elsewhere(noise.keys_B2), _elsewhere(noise.words_R1), CUDA
    moved = dataclasses.replace(model, transformer=transformer, tokenizer=tokenizer, device=CUDA)
    sampler = Sampler(moved, **sampler_options)
    return sampler, sampler.begin(prompts, range(len(prompts)), steps=steps, encoded=(), noise=noise)


class NoWaiting(TorchDispatchMode):
    """Refuses whatever makes the host wait for the device or copies between them.

    Sizes that depend on values (nonzero, masks as indices, unique) and reading a value are refused by fake tensors
    themselves. Attribute: kernels, how many operations that are not views ran.
    """

    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        made = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        for tensor in (*given, *made):
            assert tensor.device == CUDA, f"{function} moves data between host and device"
        self.kernels += not function.is_view
        return result
