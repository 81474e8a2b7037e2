"""Blocks of pieces across sublayers: what the plain blocks compute, wherever nothing looks at the sublayers."""

import dataclasses

import pytest
import torch

from stagevar.choices import check_engine
from stagevar.engine import build_engine, decoder_kernels, kernels
from stagevar.errors import UsageError
from stagevar.models import fused
from stagevar.models.layers import Chained, Pieces, cosine_heads, modulated_norm
from stagevar.models.registry import load_model
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import fastvar, preset
from stagevar.tensors.cache import KVCache
from stagevar.testing.recorder import Recorder, largest_difference
from stagevar.testing.tiny import GRIDS, tiny_infinity
from tests.stagevar.engine.test_graph import SCHEDULES

PROMPTS, SEEDS = ["a red ring", "two stars"], [1, 2]


@pytest.fixture(scope="module")
def model():
    return tiny_infinity()


def chained_transformer(transformer, monkeypatch):
    """(the transformer with chains of the kernels' twins, how often each twin ran)."""
    calls = dict.fromkeys(("gated_norm", "heads_into_cache", "gelu_linear"), 0)

    def counted(name, function):
        def run(*arguments):
            calls[name] += 1
            return function(*arguments)

        return run

    twins = (kernels.gated_norm_twin, kernels.heads_into_cache_twin, kernels.gelu_linear)
    chained = Chained(*(counted(name, twin) for name, twin in zip(calls, twins, strict=True)))
    plain = Pieces(modulated_norm, lambda *given: cosine_heads(*given, fused.rotate_pairs), fused.pair_table)
    monkeypatch.setattr(fused, "pieces", lambda: plain)
    return fused.compiled(transformer, chained), calls


def run(sampler, steps, deployed):
    generation = sampler.begin(PROMPTS, SEEDS, steps=steps if deployed else None)
    for step in steps:
        sampler.advance(generation, step)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("deployed", [True, False])
def test_chained_blocks_are_the_plain_ones(model, monkeypatch, schedule, deployed):
    """In a cache of both branches in one tensor and in one of each its own, on all tokens and on a few."""
    steps = SCHEDULES[schedule]
    plain = Recorder(model)
    run(plain, steps, deployed)
    ours = Recorder(model, forced=plain.tokens)
    ours._transformers["model"], calls = chained_transformer(model.transformer, monkeypatch)
    run(ours, steps, deployed)
    assert largest_difference(ours.logits, plain.logits) < 1e-4
    assert all(calls.values()) and calls["gated_norm"] == 3 * calls["gelu_linear"]


def test_what_looks_at_sublayers_runs_them_one_by_one(model, monkeypatch):
    steps = fastvar(GRIDS).expand(GRIDS, 2)
    plain = Recorder(model)
    plain.run(steps, PROMPTS, SEEDS)
    ours = Recorder(model, forced=plain.tokens)
    ours._transformers["model"], calls = chained_transformer(model.transformer, monkeypatch)
    ours.run(steps, PROMPTS, SEEDS)
    assert largest_difference(ours.logits, plain.logits) < 1e-4
    ran = [step for step in steps if not step.skipped]
    looked_at = sum(step.reduction is not None or step.keeps is not None for step in ran)
    assert looked_at and calls["gelu_linear"] == (len(ran) - looked_at) * model.transformer.depth


def test_entries_in_eight_bits_are_made_of_finished_heads(model, monkeypatch):
    narrow = dataclasses.replace(model, kv_cache="int8")
    ours = Recorder(narrow)
    ours._transformers["model"], calls = chained_transformer(model.transformer, monkeypatch)
    ours.run(preset("exact", GRIDS).expand(GRIDS, 2), PROMPTS, SEEDS)
    assert not any(calls.values())


def test_products_are_written_where_finished_heads_would_be():
    """Also for a table per row, of a cache whose branches lie apart."""
    generator = torch.Generator().manual_seed(0)
    capacity = {"cond": [9], "uncond": [7]}
    one, other = (KVCache(1, 2, 8, capacity, "cpu", torch.float32) for _ in range(2))
    for tokens, by_row in ((3, False), (4, True)):
        qkv, factor = torch.randn(2, tokens, 48, generator=generator), torch.rand(2, generator=generator)
        table = torch.randn(2, 2, tokens, 4, generator=generator) if by_row else torch.randn(2, tokens, 4)
        out = one.attend_heads(("cond", "uncond"), 0, qkv, factor, table, kernels.heads_into_cache_twin, 1.0)
        q, k, v = cosine_heads(qkv, 2, factor[None, :, None, None], table, fused.rotate_pairs)
        assert torch.allclose(out, other.attend(("cond", "uncond"), 0, q, k, v, 1.0), atol=1e-5)
        for branch in ("cond", "uncond"):
            assert torch.allclose(one.storage(branch, 0), other.storage(branch, 0), atol=1e-6)
    with pytest.raises(RuntimeError, match="cannot take entry"):
        one.attend_heads(("cond", "uncond"), 0, qkv, factor, table, kernels.heads_into_cache_twin, 1.0)


def test_the_engine_of_kernels_is_refused_where_they_cannot_run(monkeypatch):
    with pytest.raises(UsageError, match="engine graph-kernels needs a CUDA device"):
        check_engine("graph-kernels", "cpu")
    monkeypatch.setattr("stagevar.engine.build.CudaRecorder", lambda device: None)
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(UsageError, match="graph-kernels cannot run here: Triton is not installed"):
        build_engine("graph-kernels", torch.device("cuda", 0))
    monkeypatch.setattr(kernels, "available", lambda: None)
    monkeypatch.setattr(kernels, "chained", lambda: "chained")
    monkeypatch.setattr(kernels, "draws", lambda: "draws")
    engine = build_engine("graph-kernels", torch.device("cuda", 0))
    assert (engine.name, engine.compiled, engine.chained, engine.draws) == ("graph-kernels", True, "chained", "draws")
    assert engine.swished.func is decoder_kernels.swished_norm_launch


def test_the_engines_norm_decodes_the_images(model):
    """A sampler decodes by what its engine puts in place of the decoder's norms, where its tokenizer has some."""
    from stagevar.engine import EagerEngine

    model = load_model("infinity-tiny", weights="random", device="cpu")
    steps = preset("exact", model.grids).expand(model.grids, len(model.transformer.chunk_layers))
    engine, calls = EagerEngine(), []
    engine.swished = lambda x, norm: calls.append(1) or decoder_kernels.swished_norm_twin(x, norm)
    ours = Sampler(model, engine=engine).generate(PROMPTS[:1], SEEDS[:1], steps)
    plain = Sampler(model).generate(PROMPTS[:1], SEEDS[:1], steps)
    assert calls and abs(ours.astype(float) - plain).max() <= 1
    engine.swished = calls.append
    assert Sampler(tiny_infinity(), engine=engine)._tokenizer is not None
