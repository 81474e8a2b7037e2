"""The self-test of a card, on a CPU: what works is found to work, and every kind of fault is told from it."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.relaunch import RelaunchRecorder
from stagevar.engine import GraphEngine
from stagevar.errors import UsageError
from stagevar.profile.card_selftest import selftest
from stagevar.sampling.sampler import Sampler
from stagevar.testing.tiny import tiny_infinity
from tuner.cli import doctor


def test_every_fault_is_told_from_what_works(monkeypatch):
    model = tiny_infinity()

    class Wrong(Sampler):
        def generate(self, *arguments, **options):
            return 255 - super().generate(*arguments, **options)

    def build(name):
        if name == "graph-kernels":
            raise UsageError("engine graph-kernels cannot run here: there is no CUDA device")
        return {
            "eager": lambda: Sampler(model),
            "graph": lambda: Sampler(model, engine=GraphEngine(RelaunchRecorder())),
            "compiled": lambda: Wrong(model),
        }[name]()

    found = {check.name: check.fault for check in selftest(model, build)}
    assert [found[name] for name in ("bfloat16", "8-bit products, int8", "8-bit products, fp8")] == [None] * 3
    assert found["attention, flash"] is None and found["attention, cudnn"] is not None
    assert found["engine graph"] is None
    assert found["engine compiled"].startswith("its image differs from eager's by")
    assert found["engine graph-kernels"].startswith("UsageError: engine graph-kernels cannot run here")


def test_an_engine_that_falls_back_is_a_fault():
    model = tiny_infinity()

    def build(name):
        sampler = Sampler(model)
        if name == "graph":
            sampler.engine.fallback_reason = "operation not permitted"
        return sampler

    found = {check.name: check.fault for check in selftest(model, build)}
    assert found["engine graph"] == "falls back to eager: operation not permitted"
    assert found["engine compiled"] is None


@pytest.mark.parametrize(("known", "state", "words"), [(False, "warn", "nvidia-ml-py"), (True, "ok", "1980 MHz")])
def test_doctor_looks_at_every_card_and_tries_the_current_one(monkeypatch, known, state, words):
    from stagevar import card_state
    from stagevar.profile import card_selftest
    from tests.stagevar.test_card_state import QUIET

    properties = SimpleNamespace(name="H200", total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(card_state, "read_card", lambda device: QUIET if known else None)
    monkeypatch.setattr("stagevar.models.registry.load_model", lambda name, **options: (name, options))
    checks = [card_selftest.Check("bfloat16", None), card_selftest.Check("engine graph", "falls back")]
    monkeypatch.setattr(card_selftest, "selftest", lambda model: iter(checks))
    found = [f for f in doctor.check_device() if f.text.startswith("cuda:0")]
    assert [f.state for f in found] == ["ok", state, "ok", "warn"] and words in found[1].text
    assert found[3].text == "cuda:0 engine graph: falls back"
