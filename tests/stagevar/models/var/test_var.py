"""VAR: parity with the reference, its conditioning and its draw, and the model contract."""

import builtins
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stagevar.errors import UsageError, WeightsError
from stagevar.models.base import LoadedModel, around_nothing
from stagevar.models.registry import load_model, model_parts, resolve
from stagevar.models.var.transformer import (
    VAR,
    ClassLabels,
    RandomLabels,
    VARConfig,
    class_names,
    draw_index,
    guidance_ramp,
)
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, exact
from stagevar.schedule.grids import square
from stagevar.tensors.noise import PromptNoise, hash_words, key_tensor, uniform
from stagevar.testing.models import masked_attend
from stagevar.testing.recorder import Recorder
from tests import DATA
from tests.contracts.models import ModelContract
from tests.fakes.weights import tiny_vq_model
from tests.golden.var_cases import run_case

SIDES = (1, 2, 3, 4)
GRIDS = square(SIDES)


def tiny_var(**changes) -> LoadedModel:
    """Random weights large enough that every branch, position and layer shows in the logits."""
    torch.manual_seed(0)
    settings = {"depth": 3, "width": 32, "heads": 2, "vocabulary": 24, "code_dim": 4, "classes": 10, **changes}
    transformer = VAR(VARConfig(sides=SIDES, **settings))
    return tiny_vq_model(transformer, ClassLabels(10), GRIDS)


class TestContract(ModelContract):
    prompts = ("3", "0", "9")

    @pytest.fixture(scope="class", params=[False, True], ids=["own-adaln", "shared-adaln"])
    def model(self, request):
        return tiny_var(shared_adaln=request.param)

    def uncached_logits(self, model, x_RLC, conditioning):
        attend = masked_attend([h * w for h, w in model.grids])
        for layer, block in enumerate(model.transformer.blocks):
            x_RLC = block(x_RLC, layer, conditioning.modulation[layer], None, attend, around_nothing)
        return model.transformer.logits(x_RLC, conditioning)


@pytest.mark.parametrize("case", ["var_adaln", "var_sharedaln"])
def test_the_reference_is_met(case):
    checks = run_case(DATA / f"golden/{case}.json")
    assert len(checks) == 16
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize(
    ("depth", "billions", "scales", "pixels"),
    [(16, 0.310, 10, 256), (20, 0.601, 10, 256), (24, 1.033, 10, 256), (30, 2.010, 10, 256), (36, 2.354, 10, 512)],
)
def test_released_sizes(depth, billions, scales, pixels):
    parts = model_parts(resolve(f"var-d{depth}", device="cpu"))
    transformer = parts.transformer.module
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert parts.pixels == (pixels, pixels) and len(parts.grids) == scales
    assert transformer.head_dim == 64 and transformer.heads == depth
    assert transformer.config.shared_adaln == (depth == 36)
    assert len(transformer.chunk_layers) == depth
    tokens = {256: 680, 512: 2240}[pixels]
    assert transformer.pos_1LC.shape[1] == tokens == sum(h * w for h, w in parts.grids)


@torch.inference_mode()
def test_shared_adaln_equals_own_layers_of_the_same_values():
    """gss = W silu(c) + b + g_i is a layer of its own with bias b + g_i."""
    shared, own = tiny_var(shared_adaln=True), tiny_var()
    weights = {k: v for k, v in shared.transformer.state_dict().items() if "shared" not in k and "ada_gss" not in k}
    lin = shared.transformer.shared_ada_lin[1]
    for i, block in enumerate(shared.transformer.blocks):
        weights[f"blocks.{i}.ada_lin.1.weight"] = lin.weight
        weights[f"blocks.{i}.ada_lin.1.bias"] = lin.bias + block.ada_gss.flatten()
    own.transformer.load_state_dict(weights)
    own.tokenizer = shared.tokenizer
    runs = [Recorder(model) for model in (shared, own)]
    for run in runs:
        run.run(exact(4).expand(GRIDS, 3), ["1", "2"], [0, 0])
    for scale in range(4):
        assert (runs[0].logits[scale] - runs[1].logits[scale]).abs().max() < 1e-4


def test_the_guidance_ramp():
    """The reference's (1 + t)c - t u with t = cfg * scale / (scales - 1); scale 0 is unguided."""
    ramp = guidance_ramp(1.5, 4)
    assert ramp == (1.0, 1.5, 2.0, 2.5)
    cond, uncond = 0.7, -0.2
    for scale, s in enumerate(ramp):
        t = 1.5 * scale / 3
        assert uncond + s * (cond - uncond) == pytest.approx((1 + t) * cond - t * uncond)
    assert guidance_ramp(4.0, 1) == (1.0,)


def test_guidance_of_a_loaded_model_ramps_up_to_a_number_and_takes_a_list_as_it_is():
    sampling = load_model("var-tiny", weights="random", device="cpu").sampling
    assert sampling.guidance == guidance_ramp(1.5, 10) and sampling.guidance[-1] == 2.5
    assert (sampling.top_k, sampling.top_p, set(sampling.temperature)) == (900, 0.96, {1.0})
    assert load_model("var-tiny", weights="random", device="cpu", guidance=5).sampling.guidance[-1] == 5
    listed = load_model("var-tiny", weights="random", device="cpu", guidance=[3, 2]).sampling.guidance
    assert listed == (3.0, *(2.0,) * 9)


# ------------------------------------------------------------------------------------------------ the draw


class _Gumbel:
    """Uniforms for independent tokens."""

    def uniform(self, purpose, shape):
        assert purpose == "gumbel"
        return uniform(key_tensor([(1, "")]), int(np.prod(shape)), hash_words("draw")).reshape(1, *shape)


def kept_by_the_reference(logits, top_k, top_p):
    """Entries that top-k, then top-p (ascending cumulative probability above 1 - p) leave, one list at a time."""
    kept = set(range(len(logits)))
    if top_k:
        kept = set(sorted(kept, key=lambda i: -logits[i])[:top_k])
    if top_p:
        weights = {i: math.exp(logits[i] - max(logits)) for i in kept}
        total, running = sum(weights.values()), 0.0
        for i in sorted(kept, key=lambda i: logits[i])[:-1]:
            running += weights[i]
            if running <= (1 - top_p) * total:
                kept.discard(i)
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.7), (6, 0.6), (1, 0.0), (4000, 0.999), (0, 1e-6)]
)
def test_drawn_indices_follow_the_restricted_distribution(top_k, top_p):
    count = 40_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    index = draw_index(logits.expand(1, count, 12), _Gumbel(), top_k, top_p)
    assert index.shape == (1, count) and index.dtype == torch.int64
    share = torch.bincount(index[0], minlength=12) / count
    kept = kept_by_the_reference(logits.tolist(), top_k, top_p)
    wanted = torch.full((12,), -math.inf)
    wanted[list(kept)] = logits[list(kept)]
    wanted = wanted.softmax(0)
    assert set(share.nonzero().flatten().tolist()) <= kept
    assert (share - wanted).abs().max() < 4 * 0.5 / count**0.5


def test_restrictions_are_per_token():
    logits = torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(1)) * 2
    allowed = [[kept_by_the_reference(token.tolist(), 8, 0.8) for token in row] for row in logits]
    for seed in range(20):
        index = draw_index(logits, PromptNoise(["a", "b"], [seed, seed], "cpu").at(0, BOTH), 8, 0.8)
        assert all(int(index[b, i]) in allowed[b][i] for b in range(2) for i in range(7))


# ------------------------------------------------------------------------------------------------ prompts and input


def test_prompts_are_indices_or_imagenet_names():
    labels = ClassLabels()
    assert labels.encode(["207", " 0 ", 999, "golden retriever", "Golden_Retriever", "tench"]) == [
        207,
        0,
        999,
        207,
        207,
        0,
    ]
    assert len(class_names()) == 1000


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("1000", "class 1000 does not exist; this model's prompts are class indices 0 to 999"),
        ("-1", "class -1 does not exist"),
        ("golden retreiver", r"'golden retreiver' is not .*, did you mean golden retriever\?"),
    ],
)
def test_a_prompt_that_is_no_class_is_refused(prompt, message):
    with pytest.raises(UsageError, match=message):
        ClassLabels().encode([prompt])


def test_without_torchvision_indices_still_work(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    class_names.cache_clear()
    try:
        assert ClassLabels().encode(["5"]) == [5]
        with pytest.raises(UsageError, match="class names need torchvision: pip install"):
            ClassLabels().encode(["tench"])
    finally:
        class_names.cache_clear()


def test_random_labels_take_any_prompt():
    labels = RandomLabels(10)
    first = labels.encode(["a red cat", "7", "a red cat"])
    assert first[0] == first[2] and first[1] == 7 and 0 <= first[0] < 10
    assert len(set(labels.encode([f"prompt {i}" for i in range(50)]))) > 5


def test_the_unconditional_rows_are_the_null_class_or_a_negative_one():
    transformer = tiny_var().transformer
    table = transformer.class_emb.weight
    null = transformer.condition([3, 4])
    assert null.rows == 4 and torch.equal(null.class_RC, table[[3, 4, 10, 10]])
    assert torch.equal(transformer.condition([3, 4], [5, 6]).class_RC, table[[3, 4, 5, 6]])
    for prompts, negative in (([10], None), ([1], [10]), ([-1], None)):
        with pytest.raises(UsageError, match="does not exist; use 0 to 9"):
            transformer.condition(prompts, negative)


def test_other_scales_than_the_learned_ones_are_refused():
    with pytest.raises(UsageError, match="fix its scales to sides 1, 2, 3, 4"):
        tiny_var().transformer.set_grids(square((1, 2, 3)))


# ------------------------------------------------------------------------------------------------ loading


def test_a_text_encoder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="reads class labels and has no text encoder"):
        load_model("var-tiny", weights="random", device="cpu", text=tmp_path)


def test_an_aspect_ratio_is_refused():
    with pytest.raises(UsageError, match=r"var-tiny makes square images only; aspect ratio 1\.5"):
        load_model("var-tiny", weights="random", device="cpu", ratio=1.5)


def official_files(folder: Path, model: LoadedModel) -> None:
    """A model's weights in the reference's layout: plain state dicts with its mask buffers and code statistics."""
    state = model.transformer.state_dict()
    if "pos_1LC" in state:
        tokens = state["pos_1LC"].shape[1]
        state = {**state, "lvl_1L": torch.zeros(1, tokens, dtype=torch.int64)}
        state["attn_bias_for_masking"] = torch.zeros(1, 1, tokens, tokens)
    torch.save(state, folder / "transformer.pth")
    usage = {"quantize.ema_vocab_hit_SV": torch.zeros(10, 256)}
    torch.save({**model.tokenizer.state_dict(), **usage}, folder / "vae.pth")


def test_official_files_load_strictly(tmp_path):
    made = load_model("var-tiny", weights="random", seed=3, device="cpu")
    official_files(tmp_path, made)
    options = {"tokenizer": tmp_path / "vae.pth", "device": "cpu"}
    model = load_model("var-tiny", weights=tmp_path / "transformer.pth", **options)
    assert not model.random_weights and isinstance(model.text, ClassLabels)
    steps = exact(10).expand(model.grids, 4)
    images = [Sampler(m).generate(["7"], [1], steps) for m in (made, model)]
    assert images[0].shape == (1, 256, 256, 3) and np.array_equal(*images)
    state = torch.load(tmp_path / "transformer.pth")
    for change, message in (
        ({"extra.weight": torch.zeros(1)}, r"1 unknown \(extra.weight\)"),
        ({"head.bias": torch.zeros(3)}, r"1 mis-shaped \(head.bias \[3\] instead of \[256\]\)"),
    ):
        torch.save({**state, **change}, tmp_path / "bad.pth")
        with pytest.raises(WeightsError, match=message):
            load_model("var-tiny", weights=tmp_path / "bad.pth", **options)
    del state["pos_1LC"]
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(pos_1LC\)"):
        load_model("var-tiny", weights=tmp_path / "bad.pth", **options)


def test_low_precision_blocks_keep_the_rest_in_float32():
    model = load_model("var-tiny", weights="random", device="cpu", dtype="bfloat16")
    assert model.transformer.blocks[0].ffn.fc1.weight.dtype == torch.bfloat16
    assert model.transformer.head.weight.dtype == model.transformer.pos_1LC.dtype == torch.float32
    assert model.tokenizer.dtype == torch.bfloat16
    assert model.tokenizer.quantize.embedding.weight.dtype == torch.float32
    sampler = Recorder(model)
    generation = sampler.run(exact(10).expand(model.grids, 4), ["7"], [1])
    assert generation.code_sum_BdHW.dtype == torch.float32 and sampler.logits[9].dtype == torch.float32
    assert sampler.decode(generation).shape == (1, 256, 256, 3)
