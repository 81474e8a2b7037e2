"""nano's CLIP is open_clip's, key for key and number for number, and tells scenes apart."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stagevar.models.nano import drawing, scenes
from stagevar.models.nano.load import shipped_folder
from training.nano.clip import CONFIG, NanoClip, compacted, config_json, published, tokenize
from training.nano.evaluate import Evaluation, clip_accuracy

TEXTS = [m["prompt"] for tag in scenes.TASKS for c in (False, True) for m in scenes.all_captions(tag, c)]


def open_clip_model(folder):
    import open_clip

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@pytest.fixture(params=["random", "shipped"])
def folder(request, tmp_path):
    if request.param == "shipped":
        return shipped_folder()
    torch.manual_seed(0)
    save_file(published(NanoClip().state_dict()), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(config_json())
    return tmp_path


def test_open_clip_loads_it_and_agrees(folder):
    ours = NanoClip().eval()
    ours.load_state_dict(compacted(load_file(folder / "open_clip_model.safetensors")))
    theirs, preprocess, tokenizer = open_clip_model(folder)
    pixels = (drawing.draw(scenes.sample(8, np.random.default_rng(4))) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    images = torch.stack([preprocess(Image.fromarray(p)) for p in pixels])
    assert torch.allclose(images, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    texts = [*TEXTS[::41], *(m["prompt"] for m in scenes.all_captions("counting", False))]
    assert {w for text in texts for w in text.split()} == {w for text in TEXTS for w in text.split()}
    with torch.inference_mode():
        assert torch.allclose(ours.encode_image(images), theirs.encode_image(images, normalize=True), atol=1e-5)
        assert torch.allclose(
            ours.encode_text(tokenize(texts)), theirs.encode_text(tokenizer(texts), normalize=True), atol=1e-5
        )


def test_shipped_config_is_the_trained_one():
    assert json.loads((shipped_folder() / "open_clip_config.json").read_text()) == json.loads(config_json())
    assert max(len(row) for row in tokenize(TEXTS)) == CONFIG["text_cfg"]["context_length"]


def test_shipped_clip_finds_the_right_caption_among_64():
    assert clip_accuracy(Evaluation(shipped_folder()), images=100) >= 0.9
