"""ImageReward and PickScore on tiny random weights in the layouts that are published, against code of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from stagevar.errors import UsageError
from tests.fakes import metric_models
from tuner.metrics import create
from tuner.metrics.model_files import hub_file, pinned

TEXTS = ["a photo of a dog", "two red cats", "x"]
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return metric_models.image_reward_options(tmp_path_factory.mktemp("reward"))


# ImageReward, written out --------------------------------------------------------------------------------------------


def attention(query_TD, key_SD, value_SD, seen_S):
    """One head of 64 channels after the other."""
    heads = []
    for start in range(0, query_TD.shape[1], 64):
        part = slice(start, start + 64)
        weights_TS = query_TD[:, part] @ key_SD[:, part].T / 8
        heads.append(weights_TS.masked_fill(~seen_S, float("-inf")).softmax(1) @ value_SD[:, part])
    return torch.cat(heads, dim=1)


def plain_image_reward(state, image_uint8_HW3, ids):
    """The published computation for one image and the tokens of one prompt, without padding."""

    def linear(name, x):
        return functional.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(name, x, eps):
        return functional.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)

    height, width = image_uint8_HW3.shape[:2]
    size = (int(32 * width / height), 32) if width > height else (32, int(32 * height / width))
    picture = Image.fromarray(image_uint8_HW3).resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - 32) / 2) for length in size)
    values = np.asarray(picture.crop((left, top, left + 32, top + 32))) / 255
    pixels_3HW = torch.tensor((values - MEAN) / DEVIATION, dtype=torch.float32).permute(2, 0, 1)

    eye = "blip.visual_encoder."
    x = functional.conv2d(
        pixels_3HW[None], state[eye + "patch_embed.proj.weight"], state[eye + "patch_embed.proj.bias"], stride=16
    )
    x = torch.cat([state[eye + "cls_token"][0], x[0].flatten(1).T]) + state[eye + "pos_embed"][0]
    everything = torch.ones(len(x), dtype=torch.bool)
    for block in ("blocks.0.", "blocks.1."):
        query, key, value = linear(eye + block + "attn.qkv", norm(eye + block + "norm1", x, 1e-6)).chunk(3, dim=1)
        x = x + linear(eye + block + "attn.proj", attention(query, key, value, everything))
        hidden = functional.gelu(linear(eye + block + "mlp.fc1", norm(eye + block + "norm2", x, 1e-6)))
        x = x + linear(eye + block + "mlp.fc2", hidden)
    seen_ND = norm(eye + "norm", x, 1e-6)

    reader = "blip.text_encoder."
    x = state[reader + "embeddings.word_embeddings.weight"][ids]
    x = x + state[reader + "embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(reader + "embeddings.LayerNorm", x, 1e-12)
    layer = reader + "encoder.layer.0."
    for kind, source in (("attention", None), ("crossattention", seen_ND)):
        source = x if source is None else source
        query, key, value = (
            linear(f"{layer}{kind}.self.{name}", y) for name, y in (("query", x), ("key", source), ("value", source))
        )
        mixed = attention(query, key, value, torch.ones(len(source), dtype=torch.bool))
        x = norm(f"{layer}{kind}.output.LayerNorm", x + linear(f"{layer}{kind}.output.dense", mixed), 1e-12)
    hidden = functional.gelu(linear(layer + "intermediate.dense", x))
    x = norm(layer + "output.LayerNorm", x + linear(layer + "output.dense", hidden), 1e-12)[0]
    for index in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{index}", x)
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_the_published_computation(reward, pixels):
    metric = create("image_reward", **reward)
    state = metric_models.image_reward_state()
    ids = {"a photo of a dog": [2, 5, 6, 7, 5, 8, 3], "two red cats": [2, 10, 11, 9, 12, 3], "x": [2, 13, 3]}
    expected = [plain_image_reward(state, image, ids[text]) for image, text in zip(pixels, TEXTS, strict=True)]
    upright = np.ascontiguousarray(pixels.transpose(0, 2, 1, 3))
    expected_upright = [plain_image_reward(state, image, ids["x"]) for image in upright]
    np.testing.assert_allclose(metric.score(pixels, TEXTS), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metric.score(upright, ["x"] * 3), expected_upright, rtol=1e-4, atol=1e-5)
    assert len({round(value, 3) for value in expected + expected_upright}) == 6


def test_image_reward_reads_safetensors_of_a_wrapped_module_too(reward, pixels, tmp_path):
    state = {"module." + key: value.contiguous() for key, value in metric_models.image_reward_state().items()}
    save_file(state, tmp_path / "model.safetensors")
    other = create("image_reward", **reward | {"weights": str(tmp_path / "model.safetensors")})
    assert np.array_equal(other.score(pixels, TEXTS), create("image_reward", **reward).score(pixels, TEXTS))


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("blip.visual_encoder.pos_embed", "is not a checkpoint of ImageReward: it lacks blip.visual_encoder.pos_embed"),
        ("blip.visual_encoder.blocks.1.norm1.bias", "does not fit ImageReward's BlipVisionModel"),
        ("blip.text_encoder.encoder.layer.0.crossattention.self.key.bias", "does not fit ImageReward's BlipTextModel"),
        ("mlp.layers.7.bias", "does not fit ImageReward's Sequential"),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(reward, tmp_path, lost, says):
    torch.save({k: v for k, v in metric_models.image_reward_state().items() if k != lost}, tmp_path / "less.pt")
    with pytest.raises(UsageError, match=says) as caught:
        create("image_reward", **reward | {"weights": str(tmp_path / "less.pt")})
    assert "\n" not in str(caught.value)


# PickScore ------------------------------------------------------------------------------------------------------------


def test_pickscore_is_the_scaled_cosine_that_transformers_gives(tmp_path, pixels):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = metric_models.pickscore_folder(tmp_path)
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    images = CLIPImageProcessor.from_pretrained(folder)(images=list(pixels), return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(folder).eval()(**tokens, **images).logits_per_image.diagonal()
    metric = create("pickscore", model=folder, batch_size=2)
    np.testing.assert_allclose(metric.score(pixels, TEXTS), expected, rtol=1e-4, atol=1e-4)
    assert metric.scale == pytest.approx(np.exp(4.6)) and np.ptp(expected.numpy()) > 0.1


def test_the_processor_may_lie_elsewhere(tmp_path, pixels):
    (tmp_path / "model").mkdir()
    (tmp_path / "processor").mkdir()
    folder = metric_models.pickscore_folder(tmp_path / "model")
    values = create("pickscore", model=folder).score(pixels, TEXTS)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).rename(tmp_path / "processor" / name)
    other = create("pickscore", model=folder, processor=str(tmp_path / "processor"))
    assert np.array_equal(other.score(pixels, TEXTS), values)


# Both -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "length"), [("image_reward", 35), ("pickscore", 40)])
def test_prompts_that_are_cut_are_counted(name, length, reward, tmp_path):
    options = reward if name == "image_reward" else {"model": metric_models.pickscore_folder(tmp_path)}
    metric = create(name, **options)
    fits, beyond = "a " * (length - 2), "a " * (length - 1)
    assert metric.remarks([fits, "x"]) == []
    (said,) = metric.remarks([fits, beyond, {"prompt": beyond}])
    assert said.startswith(f"1 of 2 prompts are longer than the {length} tokens")


def test_hub_names_carry_their_revision(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *words, **options: asked.append((words, options)) or "x"
    )
    assert hub_file("hub:org/repo/folder/file.pt@abc", "thing") == "x" == hub_file("hub:org/repo/file.pt", "thing")
    assert asked == [
        (("org/repo", "folder/file.pt"), {"revision": "abc"}),
        (("org/repo", "file.pt"), {"revision": None}),
    ]
    assert hub_file("here@2x.pt", "thing") == "here@2x.pt"
    (tmp_path / "model@2").mkdir()
    assert pinned(str(tmp_path / "model@2")) == (str(tmp_path / "model@2"), {})
    assert pinned("org/repo@abc") == ("org/repo", {"revision": "abc"}) and pinned("org/repo") == ("org/repo", {})
