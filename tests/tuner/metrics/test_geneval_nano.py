"""On nano's scenes: the official-rule code with nano's checker as detector says what the checker says; nano's CLIP."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stagevar.models.nano import checker, drawing, scenes
from tuner.evalkit.command import main
from tuner.metrics import create
from tuner.metrics.geneval import Found

COUNT = 500


@pytest.fixture(scope="module")
def world():
    """Images (500, 64, 64, 3) uint8 and prompts; every other prompt belongs to another image."""
    drawn = scenes.sample(COUNT, np.random.default_rng(11))
    images = (np.asarray(drawing.draw(drawn, 64)).transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    prompts = [drawn.metadata[(index + 7) % COUNT] if index % 2 else drawn.metadata[index] for index in range(COUNT)]
    return images, prompts


@pytest.fixture(scope="module")
def verdicts(world):
    images, prompts = world
    return checker.check_batch(images.transpose(0, 3, 1, 2).astype(np.float32) / 255.0, prompts)


class NanoDetector:
    """nano's checker behind the interface of the COCO detectors."""

    def __call__(self, images, floor):
        return [
            [
                Found(item.class_name, item.score, item.box_xyxy, color=item.color, texture=item.texture)
                for item in checker.detect(np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255.0)
                if item.score > floor
            ]
            for image in images
        ]

    def describe(self):
        return {"kind": "nano"}


def test_the_set_holds_both_verdicts_in_every_task(world, verdicts):
    _, prompts = world
    tags = np.array([prompt["tag"] for prompt in prompts])
    for tag in scenes.TASKS:
        assert 0.2 < verdicts[tags == tag].mean() < 0.9, tag
    assert verdicts[::2].mean() > 0.95  # images of their own prompt


def test_genevals_metric_with_nanos_checker_as_detector_agrees_on_every_image(world, verdicts):
    images, prompts = world
    metric = create("geneval", detector=NanoDetector(), color_classifier=lambda *arguments: pytest.fail("not asked"))
    assert np.array_equal(metric.score(images, prompts) > 0.5, verdicts)


def test_the_proxy_agrees_on_every_image(world, verdicts):
    images, prompts = world
    metric = create("geneval_nano")
    rows = metric.rows(images, prompts)
    assert np.array_equal([row["value"] for row in rows], verdicts.astype(float))
    summary = metric.summary(rows, prompts)
    means = {
        tag: np.mean([ok for ok, prompt in zip(verdicts, prompts, strict=True) if prompt["tag"] == tag])
        for tag in scenes.TASKS
    }
    assert summary["tags"] == pytest.approx(means)
    assert summary["overall"] == pytest.approx(np.mean(list(means.values())))


def test_the_command_line_agrees_on_every_image(world, verdicts, tmp_path, capsys):
    images, prompts = world
    entries = [
        {
            "name": str(index),
            "metadata": prompt,
            "detections": [
                {
                    "class": item.class_name,
                    "score": float(item.score),
                    "box": [float(value) for value in item.box_xyxy],
                    "color": item.color,
                    "texture": item.texture,
                }
                for item in checker.detect(image.transpose(2, 0, 1).astype(np.float32) / 255.0)
            ],
        }
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True))
    ]
    (tmp_path / "found.json").write_text(json.dumps(entries))
    assert main(["geneval", "--detections", str(tmp_path / "found.json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["results"]["verdicts"]
    assert [verdict["correct"] for verdict in said] == verdicts.tolist()


def test_nanos_clip_prefers_the_caption_that_was_drawn(world):
    images, prompts = world
    own, other = images[::2][:100], images[1::2][:100]
    metric = create("clip_score", model="nano")
    captions = prompts[::2][:100]
    assert metric.score(own, captions).mean() > metric.score(other, captions).mean() + 10
    assert create("clip_image_similarity", model="nano").score(own, captions, own).min() == pytest.approx(1, abs=1e-5)


def test_nanos_clip_through_open_clip_is_the_one_that_was_trained(world):
    import torch
    from safetensors.torch import load_file

    from training.nano.clip import NanoClip, compacted, tokenize
    from tuner.metrics.clip import ClipModel

    images, prompts = world
    ours = ClipModel("nano")
    trained = NanoClip().eval()
    folder = checker.__file__.removesuffix("checker.py") + "weights"
    trained.load_state_dict(compacted(load_file(f"{folder}/open_clip_model.safetensors")))
    texts = [prompt["prompt"] for prompt in prompts[:16]]
    with torch.no_grad():
        text_BD = trained.encode_text(tokenize(texts))
        image_BD = trained.encode_image(torch.from_numpy(images[:16]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.allclose(ours.text_features(texts), text_BD, atol=1e-4)
    assert torch.allclose(ours.image_features(images[:16]), image_BD, atol=1e-4)


def test_kid_over_nanos_clip_tells_noise_from_scenes(world):
    images, _ = world
    kid = create("kid", extractor="clip", model="nano", subsets=5, subset_size=50)
    noisy = np.clip(images[:100] + np.random.default_rng(0).normal(0, 40, images[:100].shape), 0, 255).astype(np.uint8)
    assert kid.score_set([images[200:300]], [images[300:400]]) < kid.score_set([noisy], [images[300:400]])
