"""HART: parity with the reference, its text prefix, its hybrid tokens, and the model contract."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from stagevar.errors import UsageError, WeightsError
from stagevar.models import memory
from stagevar.models.base import LoadedModel, Sampling, around_nothing
from stagevar.models.hart.diffusion_head import STEPS, DiffusionHead, denoising_steps
from stagevar.models.hart.text import QwenText, RandomLanguageText, instruction
from stagevar.models.hart.tokenizer import HybridVAE
from stagevar.models.hart.transformer import HART, HARTConfig, guidance_ramp
from stagevar.models.loading import locate
from stagevar.models.precision import LowPrecisionLinear
from stagevar.models.registry import find, load_model, model_parts, published, resolve, scale_grids
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, StageSchedule, exact, preset
from stagevar.schedule.grids import square
from stagevar.tensors.noise import PromptNoise
from stagevar.testing.models import masked_attend
from stagevar.testing.recorder import SEEDS, Recorder
from tests import DATA
from tests.contracts.models import ModelContract
from tests.fakes.weights import hart_weights
from tests.golden.hart_cases import run_case

SIDES = (1, 2, 3, 4)
GRIDS = square(SIDES)
PROMPTS = ("a red ring", "two blue stars on a wall", "x")
FULL = exact(len(SIDES)).expand(GRIDS, 3)


def tiny_hart(**changes) -> LoadedModel:
    """Random weights large enough that every branch, position and layer shows in the logits."""
    torch.manual_seed(0)
    settings = {"depth": 3, "width": 32, "heads": 2, "text_dim": 12, "text_tokens": 9, "vocabulary": 24, "code_dim": 4}
    settings |= {"head_width": 16, "head_depth": 2, **changes}
    transformer = HART(HARTConfig(sides=SIDES, **settings))
    vae = HybridVAE(GRIDS, 24, 4, 32)
    for name, parameter in (*transformer.named_parameters(), *vae.quantize.named_parameters()):
        mean = float(parameter.ndim == 1 and name.endswith("weight"))  # norms
        torch.nn.init.normal_(parameter, mean, std=0.3 if parameter.ndim > 1 else 0.1)
    transformer.eval().set_grids(GRIDS)
    scales = len(SIDES)
    sampling = Sampling(guidance_ramp(2.0, scales), (1.0,) * scales)
    device = torch.device("cpu")
    return LoadedModel(
        "tiny", transformer, vae.eval(), RandomLanguageText(12, 9), sampling, GRIDS, (64, 64), device, torch.float32
    )


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_hart()


class _AllScales:
    """The rotary tables of all scales, one after the other."""

    def __init__(self, transformer, conditioning):
        tables = [transformer.turning(scale, conditioning).at(None) for scale in range(len(SIDES))]
        self._whole = tuple(torch.cat(parts, dim=2) for parts in zip(*tables, strict=True))

    def at(self, positions):
        return self._whole


class TestContract(ModelContract):
    prompts = PROMPTS

    @pytest.fixture(scope="class")
    def model(self):
        return tiny_hart()

    def uncached_logits(self, model, x_RLC, conditioning):
        prefix = model.transformer.prefix_tokens
        sizes = [h * w for h, w in model.grids]
        attend = masked_attend([prefix + sizes[0], *sizes[1:]])
        turning = _AllScales(model.transformer, conditioning)
        for layer, block in enumerate(model.transformer.blocks):
            x_RLC = block(x_RLC, layer, turning, None, attend, around_nothing)
        return model.transformer.logits(x_RLC[:, prefix:], conditioning)


@pytest.mark.parametrize(("case", "checks"), [("hart_b2", 30), ("hart_smooth", 19), ("hart_fastvar", 47)])
def test_the_reference_is_met(case, checks):
    found = run_case(DATA / f"golden/{case}.json")
    assert len(found) == checks
    assert [check for check in found if not check.ok] == []


# ------------------------------------------------------------------------------------------------ text prefix


def test_the_text_fills_the_cache_before_the_first_image_token(model):
    sampler = Sampler(model)
    generation = sampler.begin(PROMPTS, SEEDS, steps=FULL)
    for step in FULL:
        sampler.advance(generation, step)
        image_tokens = sum(side * side for side in SIDES[: step.scale + 1])
        assert generation.cache.lengths == ((8 + image_tokens,) * 3,) * 2
    assert generation.cache.capacity["cond"] == (8 + 30,) * 3


def test_unconditional_rows_read_zeros_unless_a_negative_prompt_is_given(model):
    transformer, text = model.transformer, model.text
    plain = transformer.condition(text.encode(PROMPTS))
    assert plain.rows == 6 and plain.place_RT[3:].count_nonzero() == 0
    assert torch.equal(plain.text_RTC[3:], transformer.context_embed.bias.expand(3, 9, -1))
    negative = transformer.condition(text.encode(PROMPTS), text.encode(["blurry"] * 3))
    assert torch.equal(negative.text_RTC[:3], plain.text_RTC[:3])
    assert torch.equal(negative.text_RTC[3:], transformer.condition(text.encode(["blurry"] * 3)).text_RTC[:3])


def test_image_tokens_are_placed_behind_each_rows_own_text(model):
    conditioning = model.transformer.condition(model.text.encode(PROMPTS))
    assert conditioning.place_RT[:3, -1].tolist() == [4, 8, 1]
    cos, sin = model.transformer.turning(1, conditioning).at(None)
    frequency = 10000.0 ** (-np.arange(0, 16, 4) / 16)
    for row, offset in enumerate((4, 8, 1)):
        for token, (y, x) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
            y_angle, x_angle = ((place + offset) * frequency for place in (y, x))
            angle = np.concatenate([y_angle, y_angle, x_angle, x_angle])
            assert np.abs(cos[row, 0, token].numpy() - np.cos(angle)).max() < 1e-5
            assert np.abs(sin[row, 0, token].numpy() - np.sin(angle)).max() < 1e-5


def test_other_scales_than_the_models_are_refused(model):
    with pytest.raises(UsageError, match="scales of sides 1, 2, 3, 4; got"):
        tiny_hart().transformer.set_grids(square((1, 2)))


# ------------------------------------------------------------------------------------------------ hybrid tokens


def test_only_the_last_scale_has_a_residual_and_adds_it_unsmoothed(model):
    class Zero(DiffusionHead):
        def forward(self, condition_RLC, noise_BSLd, guidance):
            return torch.zeros_like(noise_BSLd[:, 0])

    without = tiny_hart(smooth=False)
    with_residual = Recorder(without)
    with_residual.run(FULL, PROMPTS)
    without.transformer.diffloss = Zero(4, 32, 16, 2)
    plain = Recorder(without)
    plain.run(FULL, PROMPTS)
    for scale in range(3):
        assert torch.equal(plain.tokens[scale], with_residual.tokens[scale])
    residual = with_residual.tokens[3] - plain.tokens[3]
    assert 0 < float(residual.abs().max()) <= 0.6 + 1e-6
    codebook = without.tokenizer.quantize.embedding.weight.detach()
    distance = torch.cdist(plain.tokens[3].flatten(0, 1).clone(), codebook).amin(-1)
    assert float(distance.max()) < 1e-3
    before, after = (plain._current.code_sum_before(3), plain._current.code_sum_BdHW)
    assert torch.allclose(after - before, plain.tokens[3].transpose(1, 2).unflatten(2, (4, 4)), atol=1e-6)


def test_smooth_codes_are_blends_of_entries(model):
    smooth = Recorder(model)
    flat = dataclasses.replace(model.sampling, temperature=(20.0,) * len(SIDES))  # the logits are large
    smooth.run(FULL, PROMPTS, sampling=flat)
    codebook = model.tokenizer.quantize.embedding.weight.detach()
    for scale in range(3):
        distance = torch.cdist(smooth.tokens[scale].flatten(0, 1).clone(), codebook).amin(-1)
        assert float(distance.max()) > 1e-3
        low, high = codebook.amin(0) - 1e-6, codebook.amax(0) + 1e-6
        assert bool(((smooth.tokens[scale] >= low) & (smooth.tokens[scale] <= high)).all())


def test_vectors_are_told_apart_by_their_nearest_code(model):
    residual = model.tokenizer.residual
    index = torch.tensor([[3, 0, 23]])
    assert residual.nearest(residual.codes(index) + 1e-3).tolist() == index.tolist()


def test_late_scales_draw_from_half_as_many_codes():
    model = tiny_hart(smooth=False)
    seen = []
    model.transformer.draw = lambda logits, noise, sampling: (
        seen.append(sampling.top_k),
        torch.zeros(logits.shape[:2], dtype=torch.long),
    )[1]
    noise = PromptNoise(["a"], [1], "cpu")
    logits, x = torch.zeros(1, 1, 24), torch.zeros(1, 1, 32)
    sampling = dataclasses.replace(model.sampling, top_k=20)
    model.transformer.grids = square(tuple(range(1, 12)))
    for scale in range(9):
        model.transformer.scale_tokens(logits, x, scale, noise.at(scale, ("cond",)), sampling, model.tokenizer.residual)
    assert seen == [20] * 7 + [10] * 2


def test_guidance_of_the_last_scale_is_that_of_the_one_before():
    assert guidance_ramp(4.5, 14)[:2] == (1.0, 1 + 4.5 / 13)
    assert guidance_ramp(4.5, 14)[-2:] == (1 + 4.5 * 12 / 13,) * 2


# ------------------------------------------------------------------------------------------------ diffusion head


def test_denoising_follows_the_cosine_schedule():
    steps = denoising_steps()
    assert [step.time for step in steps] == [999, 856, 714, 571, 428, 285, 143, 0] and len(steps) == STEPS
    for step in steps:
        share = 1 / step.clean_x**2  # what is left of the residual at this time
        wanted = math.cos(((step.time + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        if step.time < 999:  # where the schedule is cut off
            assert share == pytest.approx(wanted / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rel=1e-9)
        assert step.clean_noise**2 == pytest.approx(step.clean_x**2 - 1)
        assert step.log_low <= step.log_high <= 0
    assert [step.last for step in steps] == [False] * 7 + [True]
    assert (steps[-1].mean_clean, steps[-1].mean_x) == (1.0, 0.0)


@torch.inference_mode()
def test_the_head_is_guided_per_token_and_per_row():
    torch.manual_seed(1)
    head = DiffusionHead(4, 32, 16, 2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    condition, noise = torch.randn(4, 5, 32), torch.randn(2, STEPS, 5, 4)
    both = head(condition, noise, 1.0)
    assert both.shape == (2, 5, 4)
    assert torch.allclose(both, head(condition[:2], noise, 3.0), atol=1e-5)  # s = 1 is off, and so are B rows
    guided = head(condition, noise, 3.0)
    assert (guided - both).abs().max() > 1e-2
    single = head(condition[[1, 3], 2:3], noise[1:, :, 2:3], 3.0)
    assert torch.allclose(single, guided[1:, 2:3], atol=1e-5)


def test_the_heads_draws_are_its_own_stream():
    noise = PromptNoise(["a", "b"], [1, 1], "cpu")
    at = noise.at(3, ("cond", "uncond"))
    drawn = at.normal("diffusion", (STEPS, 6, 4))
    assert drawn.shape == (2, STEPS, 6, 4) and torch.equal(
        drawn, noise.at(3, ("uncond",)).normal("diffusion", (STEPS, 6, 4))
    )
    assert torch.equal(drawn[1:], noise.rows([1]).at(3, ("cond",)).normal("diffusion", (STEPS, 6, 4)))
    assert not torch.equal(drawn, noise.at(2, ("cond",)).normal("diffusion", (STEPS, 6, 4)))
    assert not torch.equal(drawn[0, 0], drawn[0, 1]) and not torch.equal(drawn[0], drawn[1])
    assert abs(float(drawn.mean())) < 0.15 and abs(float(drawn.std()) - 1) < 0.15


# ------------------------------------------------------------------------------------------------ files and text


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository's layout with small weights."""
    return hart_weights(tmp_path_factory.mktemp("hart-tiny"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_published_layout_loads_from_its_root_and_from_the_transformers_folder(copy):
    whole = load_model("hart-tiny", weights=copy, device="cpu")
    wanted = load_model("hart-tiny", weights="random", device="cpu", seed=1)
    for part in ("transformer", "tokenizer"):
        own, other = getattr(whole, part).state_dict(), getattr(wanted, part).state_dict()
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    inner = load_model("hart-tiny", weights=copy / "llm", device="cpu")
    assert inner.provenance["weights"] == whole.provenance["weights"]
    assert isinstance(inner.text, QwenText) and isinstance(whole.text, QwenText)
    assert {path.name for path in locate(resolve("hart-tiny", weights=copy))[:2]} == {"ema_model.bin", "tokenizer"}


def test_settings_follow_from_the_names_of_the_weights(copy, tmp_path):
    (tmp_path / "llm").mkdir()
    settings = {**find("hart-tiny").settings["transformer"], **find("hart-tiny").settings["codebook"]}
    sides = find("hart-tiny").settings["sides"]
    other = HART(HARTConfig(sides=sides, **settings, context_norm=False, level_table=True, cosine=True))
    torch.save({"module." + key: value for key, value in other.state_dict().items()}, tmp_path / "llm/ema_model.bin")
    loaded = load_model(
        "hart-tiny", weights=tmp_path, tokenizer=copy / "tokenizer", text=copy / "Qwen2-VL-1.5B-Instruct"
    )
    config = loaded.transformer.config
    assert not config.context_norm and config.level_table and config.cosine
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in loaded.transformer.state_dict().items())


def test_files_that_do_not_fit_are_one_line(copy, tmp_path):
    state = torch.load(copy / "llm" / "ema_model.bin")
    torch.save({**state, "spare.weight": torch.zeros(3)}, tmp_path / "ema_model.bin")
    with pytest.raises(WeightsError, match=r"1 unknown \(spare\.weight\)"):
        load_model("hart-tiny", weights=tmp_path, tokenizer=copy / "tokenizer", text=copy / "Qwen2-VL-1.5B-Instruct")
    with pytest.raises(WeightsError, match="no weights at"):
        load_model("hart-tiny", weights=tmp_path / "missing")
    with pytest.raises(UsageError, match=r"square images only; aspect ratio 1\.5 must be 1"):
        load_model("hart-tiny", weights="random", ratio=1.5)


@pytest.mark.parametrize("name", ["hart-0.7b", "hart-0.7b-512"])
def test_public_files_are_named_when_they_cannot_be_had(name, monkeypatch):
    monkeypatch.setattr("stagevar.models.memory.available_bytes", lambda device: None)
    with pytest.raises((WeightsError, UsageError)) as error:
        load_model(name, device="cpu")
    wanted = {"hart-0.7b": "mit-han-lab/hart-0.7b-1024px/llm/ema_model.bin", "hart-0.7b-512": "no public weights"}
    assert wanted[name] in str(error.value) and "--weights" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "pixels", "tokens"), [("hart-0.7b", 1024, 9451), ("hart-0.7b-512", 512, 2240)])
def test_released_sizes(name, pixels, tokens):
    parts = model_parts(resolve(name, device="cpu", weights="random"))
    transformer = parts.transformer.module
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(0.7324, abs=1e-4)
    assert sum(p.numel() for p in transformer.diffloss.parameters()) / 1e6 == pytest.approx(36.6, abs=0.1)
    assert parts.pixels == (pixels, pixels) and sum(h * w for h, w in parts.grids) == tokens
    assert (transformer.depth, transformer.width, transformer.head_dim, transformer.config.hidden) == (
        24,
        1536,
        64,
        4096,
    )
    assert parts.transformer.precision("blocks.0.ffn.up_proj.weight") == torch.float32
    half = model_parts(resolve(name, device="cpu", weights="random", dtype="bfloat16"))
    assert half.transformer.precision("blocks.0.ffn.up_proj.weight") == torch.bfloat16
    assert half.transformer.precision("diffloss.net.input_proj.weight") == torch.float32


def test_a_longer_text_costs_cache(monkeypatch):
    """24 layers, 2 rows, keys and values of 1536 numbers of 4 bytes: per token of the prefix."""
    request = resolve("hart-0.7b", device="cpu", weights="random")
    parts = model_parts(request)
    long = memory.estimate(parts, request).kv_cache
    parts.transformer.module.prefix_tokens = 0
    assert long - memory.estimate(parts, request).kv_cache == 299 * 24 * 2 * 2 * 1536 * 4


def test_the_language_model_reads_the_instruction_and_gives_rows_of_the_prompt_alone(copy):
    from transformers import AutoModel, AutoTokenizer

    folder = copy / "Qwen2-VL-1.5B-Instruct"
    encoder = QwenText(folder, length=24)
    prompts = ["a photo of a red dog", "two cats"]
    found = encoder.encode(prompts)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    asked = tokenizer(instruction(), max_length=24, truncation=True, return_tensors="pt")["input_ids"]
    for prompt, text in zip(prompts, found, strict=True):
        own = tokenizer(prompt, max_length=24, padding="max_length", return_tensors="pt")
        real = own["attention_mask"]
        assert text.features_TD.shape == (24, 64) and text.place_T.tolist() == (real.cumsum(1) - 1)[0].tolist()
        with torch.inference_mode():
            ids, mask = torch.cat([asked, own["input_ids"]], 1), torch.cat([torch.ones_like(asked), real], 1)
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[0, 24:]
        assert (text.features_TD - hidden).abs().max() < 1e-4
    assert found[0].place_T[-1] > found[1].place_T[-1] > 0


def test_features_are_cached_and_the_language_model_is_let_go(copy, monkeypatch):
    encoder = QwenText(copy / "Qwen2-VL-1.5B-Instruct", length=24)
    encoder.prepare(["a dog", "a cat"])
    assert not encoder.loaded
    again = QwenText(copy / "Qwen2-VL-1.5B-Instruct", length=24)
    monkeypatch.setattr(again, "_load", lambda: pytest.fail("the cache should have held it"))
    first, repeated = again.encode(["a cat", "a dog"]), encoder.encode(["a cat", "a dog"])
    assert all(torch.equal(a.features_TD, b.features_TD) for a, b in zip(first, repeated, strict=True))
    with pytest.warns(UserWarning, match="is cut to 4: 'a photo of a"):
        QwenText(copy / "Qwen2-VL-1.5B-Instruct", length=4).encode(["a photo of a red dog and a blue cat"])
    with pytest.raises(WeightsError, match="no text encoder at"):
        QwenText(copy / "llm")


@pytest.mark.parametrize("kv_cache", ["model", "int8"])
def test_eight_bits_and_half_precision_run(kv_cache):
    """All five products of a block are exchanged; the image stays finite in bfloat16 and with 8-bit entries."""
    model = load_model("hart-tiny", weights="random", device="cpu", dtype="bfloat16", kv_cache=kv_cache)
    sampler = Sampler(model)
    last = len(model.grids) - 1
    steps = StageSchedule(last, precision="int8").expand(model.grids, sampler.chunks)
    generation = sampler.begin(["a dog"], [1], steps=steps)
    for step in steps:
        sampler.advance(generation, step)
    assert generation.code_sum_BdHW.isfinite().all()
    exchanged = [part for part in sampler._transformers["int8"].modules() if isinstance(part, LowPrecisionLinear)]
    assert len(exchanged) == 5 * model.transformer.depth


# ------------------------------------------------------------------------------------------------ published settings


def test_the_papers_setting_is_by_block_and_fastvars_has_its_own_ratios():
    grids = scale_grids("hart-0.7b")
    row = published("hart-0.7b")
    steps = preset("stagevar-paper", grids, row).expand(grids, 24)
    assert [step.branches for step in steps[11:]] == [BOTH, ("uncond",), ("uncond",)]
    assert all(step.reduction is None for step in steps[:13])
    reduction = steps[13].reduction
    assert (reduction.ranks[0], max(reduction.ranks), reduction.ranks[-1]) == (29, 656, 477)
    assert len(reduction.ranks) == 24 and (reduction.rope, reduction.site) == ("index", "chunk")
    assert sum(reduction.ranks) / 24 / 4096 == pytest.approx(row.rank_ratio, abs=1e-3)
    assert not any(step.skipped for step in steps) and row.released == row.paper
    pruned = preset("fastvar", grids, row).expand(grids, 24)
    assert [step.reduction and step.reduction.kept for step in pruned[11:]] == [None, 1152, 1024]
    assert {step.reduction.cache_scale for step in pruned[12:]} == {11} and pruned[12].reduction.layers == (0, 24)
    assert all(step.branches == BOTH for step in pruned)
    carried = scale_grids("hart-0.7b-512")
    assert preset("fastvar", carried, row) == preset("fastvar", carried)
