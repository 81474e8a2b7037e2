"""STAR: parity with the reference, its shared cross-attention, its text features, and the model contract."""

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from stagevar.errors import UsageError, WeightsError
from stagevar.models.base import LoadedModel, around_nothing
from stagevar.models.hub import HubFile
from stagevar.models.layers import Rotation, turns
from stagevar.models.registry import find, load_model, model_parts, published, resolve
from stagevar.models.star import text as star_text
from stagevar.models.star.text import ClipText, PromptText, RandomClipText
from stagevar.models.star.transformer import STAR, STARConfig, rope_table, shared_by_position
from stagevar.models.var.transformer import guidance_ramp
from stagevar.models.vq import loader as vq_loader
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact, paper, preset, released
from stagevar.schedule.grids import STAR_SIDES, square
from stagevar.schedule.published import STAR_SETTINGS
from stagevar.testing.models import masked_attend
from stagevar.testing.recorder import SEEDS, Recorder, largest_difference
from tests import DATA
from tests.contracts.models import ModelContract
from tests.fakes.weights import tiny_vq_model
from tests.golden.star_cases import run_case
from tuner.config.prompts import load_prompts
from tuner.config.space import PromptSource
from tuner.config.space_file import load_space

SIDES = (1, 2, 3, 4)
GRIDS = square(SIDES)
FULL = exact(4).expand(GRIDS, 3)
PROMPTS = ("a red ring", "two blue stars on a wall", "x")


def tiny_star(**changes) -> LoadedModel:
    """Random weights large enough that every branch, position and layer shows in the logits."""
    torch.manual_seed(0)
    settings = {"depth": 3, "width": 32, "heads": 2, "text_dim": 12, "vocabulary": 24, "code_dim": 4, **changes}
    transformer = STAR(STARConfig(sides=SIDES, **settings))
    return tiny_vq_model(transformer, RandomClipText(12, 9), GRIDS)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_star()


class TestContract(ModelContract):
    prompts = PROMPTS

    @pytest.fixture(scope="class")
    def model(self):
        return tiny_star()

    def uncached_logits(self, model, x_RLC, conditioning):
        attend = masked_attend([h * w for h, w in model.grids])
        rotation = Rotation(model.transformer._rope, turns)
        for layer, block in enumerate(model.transformer.blocks):
            x_RLC = block(x_RLC, layer, rotation, None, conditioning, attend, around_nothing)
        return model.transformer.logits(x_RLC, conditioning)


def test_the_reference_is_met_literally_and_by_default():
    """One prompt meets it in both modes; of two, the official code gives both the first one's cross-attention."""
    for case, literal, default in (("star_b1", 18, 18), ("star_b2", 18, 0)):
        checks = run_case(DATA / f"golden/{case}.json")
        assert len(checks) == 2 + literal + default
        assert sum(check.name.startswith("literal") for check in checks) == literal
        assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize(
    ("name", "pixels", "scales", "tokens"),
    [("star-1.7b-256", 256, 10, 680), ("star-1.7b-512", 512, 10, 2240), ("star-1.7b", 1024, 14, 9451)],
)
def test_released_sizes(name, pixels, scales, tokens):
    request = resolve(name, device="cpu")
    assert request.spec.weights.path.startswith(f"star_rope_d30_{pixels}")
    parts = model_parts(request)
    transformer = parts.transformer.module
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(1.6787, abs=1e-4)
    assert parts.pixels == (pixels, pixels) and len(parts.grids) == scales
    assert (transformer.depth, transformer.width, transformer.heads, transformer.head_dim) == (30, 1920, 30, 64)
    assert sum(h * w for h, w in parts.grids) == tokens
    transformer.set_grids(parts.grids)
    assert transformer._rope.shape == (2, tokens, 32)


def test_every_scale_spans_the_same_angles():
    table = rope_table(square((1, 2, 5)), 8, 10000.0, 64.0)
    frequency = 10000.0 ** (-np.arange(2) * 4 / 8)
    angles = [(0.0, 0.0)]
    for side in (2, 5):
        angles += [(x * 64 / (side - 1), y * 64 / (side - 1)) for y in range(side) for x in range(side)]
    wanted = np.array([np.concatenate([x * frequency, y * frequency]) for x, y in angles])
    assert np.abs(table[0].numpy() - np.cos(wanted)).max() < 1e-4
    assert np.abs(table[1].numpy() - np.sin(wanted)).max() < 1e-4


# ------------------------------------------------------------------------------------------------ cross-attention


def run(model, prompts, seeds, steps=FULL, forced=None, **options) -> Recorder:
    recorder = Recorder(model, forced=forced)
    recorder.run(steps, prompts, seeds, **options)
    return recorder


def rows_of(tensors, row):
    return {scale: tensor[row : row + 1] for scale, tensor in tensors.items()}


def test_by_default_every_prompt_runs_as_the_reference_runs_it_alone(model):
    literal = tiny_star(literal_cross_rows=True)
    batch = run(model, PROMPTS, SEEDS)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = run(literal, [prompt], [seed], forced=rows_of(batch.tokens, row))
        assert largest_difference(alone.logits, rows_of(batch.logits, row)) < 1e-4


def test_literal_rows_leak_the_first_prompts_text(model):
    literal = tiny_star(literal_cross_rows=True)

    def second_row(made, first, forced):
        return rows_of(run(made, [first, "two stars"], [3, 4], forced=forced).logits, 1)

    forced = run(model, ["a red ring", "two stars"], [3, 4]).tokens
    leak = largest_difference(second_row(literal, "a red ring", forced), second_row(literal, "a wall", forced))
    none = largest_difference(second_row(model, "a red ring", forced), second_row(model, "a wall", forced))
    assert leak > 1e-2 and none < 1e-5


@torch.inference_mode()
def test_the_unconditional_row_receives_its_own_conditional_rows_output(model):
    """Both branches start different; what cross-attention adds to them is the same, per prompt."""
    transformer = model.transformer
    conditioning = transformer.condition(model.text.encode(PROMPTS))
    added = {}

    def around(site, x, positions, run):
        y = run(x, positions)
        if site.kind == "cross":
            added[site.index] = y
        return y

    x = transformer.embed(None, 0, conditioning)
    assert (x[:3] - x[3:]).abs().max() > 0.1
    transformer.trunk(x, 0, conditioning, masked_attend([1]), around)
    for y in added.values():
        assert torch.equal(y[:3], y[3:]) and (y[0] - y[1]).abs().max() > 1e-3
    assert set(added) == {0, 1, 2}


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_after_the_cutoff_the_branch_that_stays_reads_its_prompts_text(model, branch):
    steps = StageSchedule(0, cfg_delay=0, branch=branch).expand(GRIDS, 3)
    texts = model.text.encode(PROMPTS)
    other = model.text.encode(["something else", *PROMPTS[1:]])
    base = run(model, PROMPTS, SEEDS, steps, encoded=texts)
    # Same pooled row, other text rows: only cross-attention can tell.
    changed = [dataclasses.replace(texts[0], features_TD=other[0].features_TD), *texts[1:]]
    found = run(model, PROMPTS, SEEDS, steps, forced=base.tokens, encoded=changed)
    assert largest_difference(rows_of(found.logits, 0), rows_of(base.logits, 0)) > 1e-2
    assert largest_difference(rows_of(found.logits, 1), rows_of(base.logits, 1)) < 1e-5
    # Same text rows, other pooled row: the first token of the conditional branch only.
    changed = [dataclasses.replace(texts[0], pooled_D=other[0].pooled_D), *texts[1:]]
    found = run(model, PROMPTS, SEEDS, steps, forced=base.tokens, encoded=changed)
    assert (largest_difference(found.logits, base.logits) > 1e-2) == (branch == "cond")


def test_a_negative_prompt_acts_through_its_pooled_row_alone(model):
    base = run(model, PROMPTS, SEEDS)
    negative = model.text.encode(["blurry"] * 3)
    first = run(model, PROMPTS, SEEDS, forced=base.tokens, encoded_negative=negative)
    assert largest_difference(first.logits, base.logits) > 1e-2
    other = [dataclasses.replace(text, features_TD=text.features_TD + 1) for text in negative]
    second = run(model, PROMPTS, SEEDS, forced=base.tokens, encoded_negative=other)
    assert largest_difference(first.logits, second.logits) == 0


def test_padded_text_rows_are_not_read(model):
    texts = model.text.encode(PROMPTS)
    assert not all(text.mask_T.all() for text in texts)
    noisy = [
        dataclasses.replace(text, features_TD=torch.where(text.mask_T[:, None] == 1, text.features_TD, 9.0))
        for text in texts
    ]
    base = run(model, PROMPTS, SEEDS, encoded=texts)
    found = run(model, PROMPTS, SEEDS, forced=base.tokens, encoded=noisy)
    assert largest_difference(found.logits, base.logits) < 1e-5


def test_rows_are_matched_by_position():
    generator = torch.Generator().manual_seed(0)
    cond, own = torch.randn(2, 4, 3, generator=generator), torch.randn(2, 4, 3, generator=generator)
    cond_positions = torch.tensor([[5, 0, 2, 7], [1, 2, 3, 4]])
    positions = torch.tensor([[7, 6, 5, 1], [4, 3, 2, 1]])
    found = shared_by_position(cond, own, cond_positions, positions, 8)
    for b in range(2):
        for j in range(4):
            held = cond_positions[b].tolist()
            at = int(positions[b, j])
            wanted = cond[b, held.index(at)] if at in held else own[b, j]
            assert torch.equal(found[b, j], wanted)


def test_selected_rows_keep_prompts_and_text_together(model):
    conditioning = model.transformer.condition(model.text.encode(PROMPTS))
    assert (conditioning.rows, conditioning.prompts) == (6, 3)
    keys = conditioning.text_kv[0][0]
    cases = [
        (slice(0, 3), 3, [0, 1, 2]),
        (slice(3, 6), 3, [0, 1, 2]),
        ([2, 0, 5, 3], 2, [2, 0]),
        ([1, 4], 1, [1]),
        (slice(4, 5), 1, [1]),
    ]
    for rows, prompts, texts in cases:
        part = conditioning.select(rows)
        assert part.prompts == prompts and torch.equal(part.text_kv[0][0], keys[texts])
        assert torch.equal(part.first_RC, conditioning.first_RC[rows])
        assert torch.equal(part.mask_B11T, conditioning.mask_B11T[texts])
    assert conditioning.select(slice(0, 6)) is conditioning


def test_other_scales_are_refused(model):
    with pytest.raises(UsageError, match="has scales of sides 1, 2, 3, 4"):
        tiny_star().transformer.set_grids(square((1, 2, 3)))


# ------------------------------------------------------------------------------------------------ text


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A random two-layer CLIP text model with a word-piece tokenizer, laid out as in Stable Diffusion."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", "!</w>"]
    words += list("abcdefghijklmnopqrstuvwxyz") + [f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"]
    made = folder / "made"
    made.mkdir()
    (made / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (made / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(made / "vocab.json"), str(made / "merges.txt"), pad_token="!</w>", model_max_length=77
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))


def test_features_are_the_text_models_own(clip_folder):
    from transformers import CLIPTextModel, CLIPTokenizer

    prompts = ["a cat", "two dogs and a bird"]
    found = ClipText(clip_folder).encode(prompts)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(clip_folder / "text_encoder").eval()
    batch = tokenizer([*prompts, ""], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        wanted = encoder(**batch)
    for i, text in enumerate(found):
        real = text.mask_T.bool()
        assert text.features_TD.shape == (77, 16) and torch.equal(text.mask_T, batch["attention_mask"][i])
        assert real.sum() == len(prompts[i].replace(" ", "")) + 2
        torch.testing.assert_close(text.features_TD[real], wanted.last_hidden_state[i][real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text.pooled_D, wanted.pooler_output[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text.null_pooled_D, wanted.pooler_output[2], atol=1e-5, rtol=1e-5)


def test_cached_prompts_load_no_encoder(clip_folder, monkeypatch):
    first = ClipText(clip_folder)
    first.prepare(["a cat"])
    assert not first.loaded
    monkeypatch.setattr(ClipText, "_load", lambda self: pytest.fail("CLIP was loaded although the prompt is cached"))
    [again] = ClipText(clip_folder).encode(["a cat"])
    assert again.features_TD.shape == (77, 16)


def test_long_prompts_are_cut_with_a_warning(clip_folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        [text] = ClipText(clip_folder).encode(["a " * 100])
    assert any("prompt of 102 tokens is cut to 77" in str(w.message) for w in caught)
    assert text.mask_T.sum() == 77


def test_an_encoder_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="the folder needs tokenizer/ as in Stable Diffusion"):
        ClipText(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "text_encoder").mkdir()
    with pytest.raises(WeightsError, match="cannot load the text encoder"):
        ClipText(tmp_path).encode(["a cat"])

    def offline(file):
        raise WeightsError(f"cannot fetch {file} from the hub")

    monkeypatch.setattr(star_text, "fetch", offline)
    with pytest.raises(WeightsError, match="cannot fetch taocrayon/STAR/CLIP/@23fab671cb22"):
        ClipText(find("star-1.7b").text).encode(["a cat"])


def test_random_text_is_a_function_of_the_prompt():
    a, b, c = RandomClipText(12).encode(["a red ring", "a red ring", "x"])
    assert torch.equal(a.features_TD, b.features_TD) and not torch.equal(a.pooled_D, c.pooled_D)
    assert a.features_TD.shape == (77, 12) and int(a.mask_T.sum()) == 6 and int(c.mask_T.sum()) == 3
    assert torch.equal(a.null_pooled_D, c.null_pooled_D)
    assert RandomClipText(4).encode(["w " * 200])[0].mask_T.all()


# ------------------------------------------------------------------------------------------------ loading


def test_a_training_checkpoint_loads_strictly(tmp_path, clip_folder):
    made = load_model("star-tiny", weights="random", seed=3, device="cpu")
    assert made.random_weights and isinstance(made.text, RandomClipText)
    assert made.sampling.guidance == guidance_ramp(4.0, 10) and (made.sampling.top_k, made.sampling.top_p) == (600, 0.8)
    state = made.transformer.state_dict()
    torch.save({"trainer": {"var_wo_ddp": state}, "epoch": 3}, tmp_path / "star.pth")
    torch.save(made.tokenizer.state_dict(), tmp_path / "vae.pth")
    options = {"tokenizer": tmp_path / "vae.pth", "device": "cpu"}
    model = load_model("star-tiny", weights=tmp_path / "star.pth", **options)
    steps = exact(10).expand(model.grids, 4)
    encoded = made.text.encode(["a cat"])
    images = [Sampler(m).generate(["a cat"], [1], steps, encoded=encoded) for m in (made, model)]
    assert images[0].shape == (1, 256, 256, 3) and np.array_equal(*images)
    assert isinstance(
        load_model("star-tiny", weights=tmp_path / "star.pth", text=clip_folder, **options).text, ClipText
    )
    torch.save({"trainer": {"var_wo_ddp": {**state, "head_logits2.bias": torch.zeros(1)}}}, tmp_path / "star.pth")
    with pytest.raises(WeightsError, match=r"1 unknown \(head_logits2.bias\)"):
        load_model("star-tiny", weights=tmp_path / "star.pth", **options)


def test_the_public_text_encoder_is_the_one_beside_the_weights(clip_folder):
    request = resolve("star-1.7b", device="cpu")
    parts = model_parts(request)
    assert vq_loader.text_encoder(request, parts).source == HubFile(
        "taocrayon/STAR", "CLIP/", request.spec.weights.revision
    )
    assert parts.text_bytes > 1e9
    near = resolve("star-1.7b", device="cpu", weights=clip_folder)
    (clip_folder / "text").mkdir(exist_ok=True)
    for part in ("tokenizer", "text_encoder"):
        (clip_folder / "text" / part).mkdir(exist_ok=True)
    assert vq_loader.text_encoder(near, parts).source == clip_folder / "text"
    assert STAR_SIDES[1024] == parts.transformer.module.config.sides


def test_prompt_text_is_plain_data():
    text = RandomClipText(4).encode(["a"])[0]
    assert [f.name for f in dataclasses.fields(PromptText)] == ["features_TD", "mask_T", "pooled_D", "null_pooled_D"]
    assert text.pooled_D.shape == text.null_pooled_D.shape == (4,)


# ------------------------------------------------------------------------------------------------ schedules


def test_the_papers_setting_on_star_is_what_its_code_runs():
    """Null branch at sides 48 and 64, reduction at 64 alone, positions of the drawn tokens, nothing skipped."""
    grids = square(STAR_SIDES[1024])
    steps = paper(grids, STAR_SETTINGS).expand(grids, 30)
    assert [s.grid[0] for s in steps if s.branches == ("uncond",)] == [48, 64]
    assert [s.grid[0] for s in steps if s.reduction] == [64]
    reduction = steps[-1].reduction
    assert set(reduction.ranks) == {218} and (reduction.site, reduction.rope) == ("chunk", "index")
    assert released(grids, STAR_SETTINGS) == paper(grids, STAR_SETTINGS) and not any(s.skipped for s in steps)


@pytest.mark.parametrize("name", ["star-1.7b", "star-tiny", "var-d30", "var-tiny"])
def test_shipped_search_spaces_fit_their_models(name):
    parts = model_parts(resolve(name, device="cpu"))
    space = load_space(name)
    space.fit(parts.grids)
    chunks = len(parts.transformer.module.chunk_layers)
    presets = [preset(each, parts.grids, published(name)).expand(parts.grids, chunks) for each in space.enqueue]
    assert len(set(presets)) == len(presets) >= 4
    start = paper(parts.grids, published(name))
    values = space.nearest_values(start, parts.grids)
    assert values["structure_end"] == start.structure_end and values["rank_ratio"] == start.rank_ratios[0]
    assert values["cfg_delay"] == 0 and values["branch"] == "uncond" and values["rank_delay"] == start.rank_delay
    assert ("rope" in values) == name.startswith("star")
    assert space.prompts.source == ("geneval" if name.startswith("star") else "imagenet")


def test_class_indices_are_a_prompt_source():
    sets = load_prompts(PromptSource("imagenet", 8, 16, 4), seed=3)
    search, heldout = sets["search"].texts, sets["heldout"].texts
    assert len(search) == 8 and len(heldout) == 16 and not set(search) & set(heldout)
    assert set(search) | set(heldout) <= {str(i) for i in range(1000)}
    assert load_prompts(PromptSource("imagenet", 8, 16, 4), seed=3)["search"].texts == search
