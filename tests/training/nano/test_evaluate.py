"""The evaluation: scores from verdicts, the trained stream drawn again, and a whole run on a few prompts."""

import json

import numpy as np
import pytest
from PIL import Image

from stagevar.models.nano import drawing, scenes
from stagevar.models.nano.load import read_preset, shipped_folder
from training.nano import evaluate
from training.nano.jobs import TransformerJob
from training.nano.train import Recipe


def test_scores_average_the_six_tasks_and_leave_texture_out():
    prompts = scenes.prompts("heldout", 14)
    right = np.array([m["tag"] in ("single_object", "texture") for m in prompts])
    found = evaluate.scores(right, prompts)
    assert found["geneval_mean"] == pytest.approx(1 / 6)
    assert (found["texture"], found["single_object"], found["counting"], found["images"]) == (1, 1, 0, 14)


def test_ground_truth_scores_one_and_another_prompts_image_does_not():
    prompts = scenes.prompts("heldout", 28)
    world = scenes.arrange(prompts, np.random.default_rng(0))
    images = (drawing.draw(world) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert evaluate.scores(evaluate.judged(images, prompts), prompts)["geneval_mean"] == 1
    assert evaluate.scores(evaluate.judged(images[::-1], prompts), prompts)["geneval_mean"] < 0.5


def test_trained_scenes_are_the_training_stream():
    recipe = Recipe(steps=4, batch=12, muon_rate=0.0, adam_rate=0.0, seed=3)
    images, captions = evaluate.trained_scenes(shipped_folder(), 16, recipe, first=0)
    config = read_preset(shipped_folder())
    for step in range(4):
        world, _ = TransformerJob.world(config, np.random.default_rng([3, step]), 12, step / 4)
        mine = slice(4 * step, 4 * step + 4)
        assert captions[mine] == world.captions[:4]
        drawn = (drawing.draw(world, config.image_size)[:4] * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        assert np.array_equal(images[mine], drawn)


def test_command_line_measures_the_shipped_model(tmp_path, capsys):
    arguments = ["--prompts", "7", "--unseen", "7", "--clip-images", "5", "--training-images", "32", "--samples", "8"]
    arguments += ["--checker-scenes", "60"]
    code = evaluate.main([*arguments, "--pictures", str(tmp_path), "--json", str(tmp_path / "figures.json")])
    assert code == 0
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["full"]["images"] == 7 and report["unseen_pairs"]["images"] == 7
    for name in ("skip_last_scale", "skip_last_two_scales"):
        assert report[name]["psnr_db_to_full"] < 40 and report[name]["ssim_to_full"] < 0.999
    assert report["checker"]["drawn"] >= 0.95 and report["checker"]["another_prompt"] <= 0.2
    assert report["neighbors"]["training_images"] == 32
    for name in ("nano_samples", "nano_scales", "nano_nearest"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 500
    assert "geneval_mean" in capsys.readouterr().out
    assert evaluate.main(["--prompts", "3"]) == 2
