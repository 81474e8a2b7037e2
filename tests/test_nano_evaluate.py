"""The evaluation: scores from verdicts, the trained stream drawn again, and a whole run on a few prompts."""

import json

import numpy as np
import pytest
from PIL import Image

from stagevar.nano import scenes
from stagevar.nano.load import shipped_folder
from training.nano import evaluate


def test_scores_average_the_six_tasks_and_leave_texture_out():
    prompts = scenes.prompts("heldout", 14)
    right = np.array([m["tag"] in ("single_object", "texture") for m in prompts])
    found = evaluate.scores(right, prompts)
    assert found["geneval_mean"] == pytest.approx(1 / 6)
    assert (found["texture"], found["single_object"], found["counting"], found["images"]) == (1, 1, 0, 14)


def test_ground_truth_scores_one_and_another_prompts_image_does_not():
    prompts = scenes.prompts("heldout", 28)
    world = scenes.arrange(prompts, np.random.default_rng(0))
    images = (scenes.draw(world) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert evaluate.scores(evaluate.judged(images, prompts), prompts)["geneval_mean"] == 1
    assert evaluate.scores(evaluate.judged(images[::-1], prompts), prompts)["geneval_mean"] < 0.5


def test_trained_scenes_are_the_training_stream():
    images, captions = evaluate.trained_scenes(shipped_folder(), 40, steps=range(2))
    recipe = evaluate.RECIPES["transformer"]
    world = scenes.sample(
        recipe.batch, np.random.default_rng([recipe.seed, 0]), task_weights=evaluate.TransformerJob.task_weights
    )
    assert captions[: recipe.batch] == world.captions
    assert np.array_equal(images[0], (scenes.draw(world)[0] * 255).astype(np.uint8).transpose(1, 2, 0))
    assert len(images) == 40


def test_command_line_measures_the_shipped_model(tmp_path, capsys):
    arguments = ["--prompts", "7", "--unseen", "7", "--clip-images", "5", "--training-images", "32", "--samples", "8"]
    arguments += ["--checker-scenes", "60"]
    code = evaluate.main([*arguments, "--pictures", str(tmp_path), "--json", str(tmp_path / "figures.json")])
    assert code == 0
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["full"]["images"] == 7 and report["unseen_pairs"]["images"] == 7
    assert report["skip_last_scale"]["psnr_db_to_full"] < 40
    assert report["checker"]["drawn"] >= 0.95 and report["checker"]["another_prompt"] <= 0.2
    assert report["neighbours"]["training_images"] == 32
    for name in ("nano_samples", "nano_scales", "nano_nearest"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 500
    assert "geneval_mean" in capsys.readouterr().out
    assert evaluate.main(["--prompts", "3"]) == 2
