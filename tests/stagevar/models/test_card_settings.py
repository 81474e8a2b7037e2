"""What a card gets that a CPU does not: precision by its generation, events on the right device, fused attention."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stagevar.models import memory, registry
from stagevar.models.infinity import loader as infinity_loader
from stagevar.models.vq import tokenizer as vqvae
from stagevar.timing import time_once


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_precision_follows_the_card(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert registry.resolve_dtype(None, torch.device("cuda", 0)) == dtype
    assert registry.resolve_dtype("bfloat16", torch.device("cuda", 0)) == torch.bfloat16


def test_time_is_taken_on_the_device_that_runs(monkeypatch):
    """Events are recorded on the current device: with cuda:1 they would time an idle cuda:0."""
    current, log = [0], []

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], torch.device(device).index
        yield
        current[0] = before

    class Event:
        def __init__(self, enable_timing):
            log.append(("event", current[0]))

        def record(self):
            log.append(("record", current[0]))

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: log.append(("wait", current[0])))
    assert time_once(lambda: log.append(("run", current[0])), torch.device("cuda", 1))[1] == 2.0
    assert {place for _, place in log} == {1} and [what for what, _ in log if what != "event"] == [
        "wait", "record", "run", "record", "wait",
    ]  # fmt: skip
    assert current == [0]


def test_memory_that_the_allocator_keeps_for_reuse_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory.available_bytes(torch.device("cuda", 0)) == 500


def test_t5_in_float16_keeps_some_layers_wide():
    wide = 24 * 2048 * 5120
    assert 2 * wide / 2**30 == pytest.approx(0.47, abs=0.01)
    assert wide == infinity_loader._T5_WIDE


def test_the_decoders_attention_has_adjacent_channels_on_a_card(monkeypatch):
    strides, plain = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v):
        strides.append([x.stride(-1) for x in (q, k, v)])
        return plain(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with FakeTensorMode(), torch.device("cuda", 0):
        vqvae._Attention(64)(torch.empty(1, 64, 8, 8))
    assert strides == [[1, 1, 1]]
