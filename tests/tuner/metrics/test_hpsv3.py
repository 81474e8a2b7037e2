"""HPSv3 on tiny random weights under its published names: the head, the instruction, and where it may be asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stagevar.errors import UsageError
from tests.fakes import metric_models
from tuner.cli import main
from tuner.config.space_file import load_space
from tuner.metrics import create
from tuner.metrics.hpsv3 import HpsV3, _instruction


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return metric_models.hpsv3_options(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def metric(options):
    return create("hpsv3", **options)


def test_the_score_is_the_heads_first_number_at_the_reward_token(metric, options):
    image = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)  # the size that needs no resizing
    content = [
        {"type": "image"},
        {"type": "text", "text": "Judge it.\nTextual prompt - a dog\n\nThe rating: <|Reward|>\n\nEND\n"},
    ]
    text = metric.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = metric.processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt")
    place = inputs["input_ids"][0].tolist().index(metric.reward_id)
    state = load_file(options["weights"])
    with torch.no_grad():
        x = metric.network(**inputs).last_hidden_state[0, place].float()
        for number in (0, 3, 5):
            x = state[f"rm_head.{number}.weight"] @ x + state[f"rm_head.{number}.bias"]
            x = x if number == 5 else x.clamp(min=0)
    assert metric.score(image[None], ["a dog"])[0] == pytest.approx(float(x[0]), abs=1e-5)
    assert len(set(metric.score(np.stack([image, 255 - image]), ["a dog", "a dog"]))) == 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [((448, 448), (448, 448)), ((1024, 1024), (448, 448)), ((100, 50), (644, 336)), ((300, 900), (252, 756))],
)
def test_images_have_whole_patches_and_about_as_many_pixels(metric, size, expected):
    assert metric._resized(Image.new("RGB", size)).size == expected


def test_the_instruction_of_an_installed_package_is_read_and_not_run(tmp_path, monkeypatch):
    (tmp_path / "diffsynth" / "models").mkdir(parents=True)
    (tmp_path / "diffsynth" / "__init__.py").write_text("raise RuntimeError('ran')\n")
    (tmp_path / "diffsynth" / "models" / "hpsv3.py").write_text(
        "import none\nHPSV3_INSTRUCTION = 'Judge {text_prompt}. '\nHPSV3_PROMPT_WITH_SPECIAL_TOKEN = 'So: <|Reward|>'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert _instruction(None) == "Judge {text_prompt}. So: <|Reward|>"


def test_without_instruction_or_weights_the_refusal_is_one_line(options, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps diffsynth, or give a file as option instruction"):
        HpsV3(**options | {"instruction": None})
    (tmp_path / "text.txt").write_text("Judge {text_prompt}.")
    with pytest.raises(UsageError, match=r"must hold \{text_prompt\} and <\|Reward\|> once each"):
        HpsV3(**options | {"instruction": str(tmp_path / "text.txt")})
    state = load_file(options["weights"])
    for lost, says in (("rm_head.5.bias", "no complete rm_head"), ("model.norm.weight", "lacks 1 weights of HPSv3")):
        save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "less.safetensors")
        with pytest.raises(UsageError, match=says) as caught:
            HpsV3(**options | {"weights": str(tmp_path / "less.safetensors")})
        assert "\n" not in str(caught.value)


def test_a_search_refuses_it(tmp_path, capsys):
    data = load_space("infinity-tiny").to_data()
    data["objectives"]["quality"] = {"metrics": [{"name": "geneval"}, {"name": "hpsv3", "weight": 0}]}
    space = tmp_path / "space.yaml"
    space.write_text(json.dumps(data))
    words = ["--model", "infinity-tiny", "--budget", "80%", "--space", str(space), "--dry-run", "--device", "cpu"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "metric hpsv3 is for verification only" in err and "stagevar-eval --metric hpsv3" in err
