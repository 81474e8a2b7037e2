"""Compiled pieces against the plain ones: each whole, without a graph break, equal to the bit or to rounding."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from stagevar.engine import EagerEngine, fell_back_because
from stagevar.models import fused
from stagevar.models.layers import Pieces, Rotation, cosine_heads, modulated_norm, rope_table, rotate, turns
from stagevar.models.registry import load_model
from stagevar.sampling.sampler import Sampler
from stagevar.tensors import noise
from stagevar.testing.recorder import Recorder, largest_difference
from stagevar.testing.tiny import GRIDS, tiny_infinity
from tests.stagevar.engine.test_graph import SCHEDULES

PROMPTS, SEEDS = ["a red ring", "two stars"], [1, 2]


@pytest.fixture(scope="module")
def model():
    return tiny_infinity()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pairs_are_rotated_as_complex_numbers_are():
    x, table = numbers(4, 2, 14, 8), rope_table(GRIDS[1:4], GRIDS[-1], 8)[:, :14]
    assert torch.allclose(fused.rotate_pairs(x, table), rotate(x, turns(table)), atol=1e-6)
    by_row = table[:, torch.stack([torch.randperm(14) for _ in range(4)])]
    assert torch.allclose(fused.rotate_pairs(x, by_row), rotate(x, turns(by_row)), atol=1e-6)


def test_a_scale_makes_its_rotary_table_once_for_the_same_positions():
    table, made = rope_table(GRIDS[1:4], GRIDS[-1], 8)[:, :14], []
    rotation = Rotation(table, lambda part: made.append(part) or turns(part))
    some, others = torch.tensor([3, 1]), torch.tensor([[0, 2], [5, 4]])
    for _ in range(3):
        assert torch.equal(rotation.at(None), turns(table))
    for positions in (some, others):
        for _ in range(3):
            assert torch.equal(rotation.at(positions), turns(table[:, positions]))
    assert torch.equal(rotation.at(some), turns(table[:, some]))
    assert len(made) == 4  # all, some, others, and some again after others


def test_constants_follow_weights_that_are_trained_between_prompts(model):
    """A conditioning made after the weights changed has the new ones."""
    transformer = copy.deepcopy(model.transformer)
    before = transformer.condition(model.text.encode(["a"])).constants[0]
    with torch.no_grad():
        block = transformer.layers()[0]
        for weight in (block.sa.q_bias, block.sa.scale_mul_1H11, block.ca_norm.weight):
            weight += 0.5
    after = transformer.condition(model.text.encode(["a"])).constants[0]
    assert not torch.equal(before.heads[0], after.heads[0]) and not torch.equal(before.heads[1], after.heads[1])
    assert torch.equal(after.norm_weight_C, block.ca_norm.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_piece_is_one_graph(dtype):
    """Traced whole (a break would raise) and in few versions over the shapes of many scales."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    norm, heads, philox = (
        torch.compile(piece, dynamic=True, fullgraph=True, backend=counter)
        for piece in (modulated_norm, fused.real_heads, noise.philox4x32)
    )
    with torch.inference_mode():
        for rows, tokens in ((4, 1), (4, 4), (4, 9), (4, 16), (2, 25), (2, 36)):
            x, scale, shift = numbers(rows, tokens, 32), numbers(rows, 1, 32, seed=1), numbers(rows, 1, 32, seed=2)
            assert torch.equal(norm(x, scale, shift, dtype), modulated_norm(x, scale, shift, dtype))
            qkv, table = numbers(rows, tokens, 96).to(dtype), rope_table([(1, tokens)], (6, 36), 16)
            ours = heads(qkv, 2, torch.ones(1, 2, 1, 1), table)
            for one, other in zip(ours, cosine_heads(qkv, 2, torch.ones(1, 2, 1, 1), turns(table)), strict=True):
                assert one.dtype == dtype and torch.allclose(one.float(), other.float(), atol=1e-6, rtol=2**-7)
            keys = noise.key_tensor([(seed, "x") for seed in range(rows)])
            draws = (noise.uniform(keys, tokens, (1, 2), philox=who) for who in (philox, noise.philox4x32))
            assert torch.equal(*draws)
    assert counter.frame_count <= 9


def test_compiled_draws_are_the_plain_ones():
    """Bit for bit, products that overflow 64 bits included: whoever draws, a seed means the same image."""
    with torch.inference_mode():
        keys = noise.key_tensor([(1, "x"), (2, "y"), (2**31, "z")])
        for count, site in ((7, "b"), (1030, "c")):
            word = noise.hash_words("bits", site)
            for draw in (noise.uniform, noise.normal):
                assert torch.equal(draw(keys, count, word, 2, fused.philox()), draw(keys, count, word, 2))


def test_compiled_kernels_are_near_the_plain_pieces():
    """The default compiler's kernels, at a size that none of them was special for."""
    x, scale, shift, qkv = (numbers(4, n, 32 * k, seed=k) for n, k in ((9, 1), (1, 1), (1, 1), (9, 3)))
    table, scales = rope_table([(3, 3)], (6, 6), 16), torch.ones(1, 2, 1, 1)
    with torch.inference_mode():
        ours = (fused.pieces().modulated_norm(x, scale, shift), *fused.pieces().cosine_heads(qkv, 2, scales, table))
        plain = (modulated_norm(x, scale, shift), *cosine_heads(qkv, 2, scales, turns(table)))
    assert all(torch.allclose(one, other, atol=2e-6) for one, other in zip(ours, plain, strict=True))


def test_a_compiled_generation_is_the_plain_one(model, monkeypatch):
    """Guided in full, then one branch of a few projected tokens."""
    plain = Recorder(model)
    plain.run(SCHEDULES["paper"], PROMPTS, SEEDS)
    ours = Recorder(model, forced=plain.tokens)
    traced = (torch.compile(piece, dynamic=True, backend="aot_eager") for piece in (modulated_norm, fused.real_heads))
    made = Pieces(*traced, fused.pair_table)
    monkeypatch.setattr(fused, "pieces", lambda: made)
    ours._transformers["model"] = fused.compiled(model.transformer)
    ours.run(SCHEDULES["paper"], PROMPTS, SEEDS)
    assert largest_difference(ours.logits, plain.logits) < 1e-4


def test_what_cannot_be_compiled_runs_plainly_and_says_why(monkeypatch):
    def refusing(graph, inputs):
        raise RuntimeError("no C++ compiler")

    real = torch.compile
    monkeypatch.setattr(fused, "_plain_because", {})
    assert fused.plain_because() is None
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: real(function, dynamic=dynamic, backend=refusing))
    norm, arguments = fused.compiler(modulated_norm), (numbers(2, 3, 8), numbers(2, 1, 8), numbers(2, 1, 8))
    with pytest.warns(UserWarning, match="modulated_norm runs uncompiled: .*no C") as warned:
        for _ in range(2):
            assert torch.equal(norm(*arguments), modulated_norm(*arguments))
    assert len(warned) == 1
    assert "modulated_norm is not compiled" in fused.plain_because()
    assert "modulated_norm" in fell_back_because(EagerEngine(compiled=True))
    assert fell_back_because(EagerEngine()) is None


@pytest.mark.parametrize("batches", [(1, 2, 4)])
def test_no_piece_has_more_variants_than_the_compiler_keeps(model, monkeypatch, batches):
    """Beyond eight it would run plainly and say nothing; only numbers of tokens are variables of the kernels."""
    counters = []

    def counted(function, dynamic):
        counters.append(CompileCounterWithBackend("eager"))
        return real(function, dynamic=dynamic, backend=counters[-1])

    real = torch.compile
    monkeypatch.setattr(torch, "compile", counted)
    made = Pieces(
        fused.compiler(modulated_norm, fused.NORM_AXES),
        fused.compiler(fused.real_heads, fused.HEADS_AXES),
        fused.pair_table,
    )
    monkeypatch.setattr(fused, "pieces", lambda: made)
    sampler = Sampler(model)
    sampler._transformers["model"] = fused.compiled(model.transformer)
    for batch in batches:
        for steps in SCHEDULES.values():
            sampler.generate(["a"] * batch, range(batch), steps)
    assert counters and all(counter.frame_count <= 4 for counter in counters)
    width = model.transformer.width
    for counter in counters:
        for graph in counter.graphs:
            shapes = [tuple(n.meta["example_value"].shape) for n in graph.graph.nodes if n.op == "placeholder"
                      and isinstance(n.meta["example_value"], torch.Tensor)]  # fmt: skip
            stream = next(shape for shape in shapes if len(shape) == 3)
            assert isinstance(stream[0], int) and stream[2] in (width, 3 * width) and isinstance(stream[2], int)


def test_the_engine_takes_the_compiled_pieces(model):
    sampler = Sampler(model, engine="compiled")
    assert sampler.engine.name == "compiled"
    coarse = sampler._transformer("int8")
    blocks = [*sampler._transformer("model").layers(), *coarse.layers()]
    assert all(part.pieces is fused.pieces() for block in blocks for part in (block, block.sa))
    assert all(block.pieces is not fused.pieces() for block in model.transformer.layers())
    assert sampler._draws is fused.draws()


def test_other_families_have_compiled_pieces_too():
    for name, places in (("var-tiny", 2), ("star-tiny", 1)):
        transformer = fused.compiled(load_model(name, weights="random", device="cpu").transformer)
        assert sum(hasattr(part, "pieces") for part in transformer.modules()) == places * transformer.depth
