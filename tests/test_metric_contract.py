"""What every metric must do, whoever computes it: shapes, determinism, batch independence, directions, refusals.

The models are tiny and random: these tests are about the code around them, and no figure here means anything.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from stagevar.errors import UsageError
from tests import metric_models
from tuner.metrics import METRIC_NAMES, SetMetric, create
from tuner.metrics.base import BenchmarkMetric
from tuner.metrics.declarations import DECLARATIONS
from tuner.metrics.registry import create_composite, metric_class

PROMPT = {
    "tag": "colors",
    "include": [{"class": "dog", "count": 1, "color": "red"}],
    "prompt": "a photo of a dog",
    "item_id": "a",
}
SIZE = 48
SETS = ("fid", "kid", "is", "fid_dinov2", "cmmd")


class FlatFeatures(torch.nn.Module):
    """Mean colors of a 3x3 grid."""

    num_features = 27

    def forward(self, images_uint8_B3HW):
        return torch.nn.functional.adaptive_avg_pool2d(images_uint8_B3HW.float() / 255, 3).flatten(1)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options for every metric that load tiny models from local files."""

    def folder(name):
        return tmp_path_factory.mktemp(name)

    clip = {"model": metric_models.clip_folder(folder("clip"))}
    questions = folder("dpg") / "dpg_bench.csv"
    questions.write_text(metric_models.QUESTIONS)
    sets = {"extractor": FlatFeatures()}
    return {
        "clip_score": clip,
        "clip_image_similarity": clip,
        "hpsv2": clip | {"weights": "unused"},
        "geneval": {
            "detector": "rtdetr",
            "detector_model": metric_models.rtdetr_folder(folder("rtdetr")),
            "color_classifier": metric_models.FixedColor(),
            "threshold": 0.01,
            "counting_threshold": 0.01,
        },
        "geneval_nano": {},
        "dpg": {"questions": str(questions), "vqa": metric_models.AnswersYes()},
        "psnr": {},
        "ssim": {},
        "lpips": {"weights": metric_models.trunk_file(folder("alex"), "alex")},
        "dists": {"weights": metric_models.trunk_file(folder("vgg"), "vgg")},
        "dino": {"model": metric_models.dino_folder(folder("dino"))},
        "fid": sets,
        "kid": sets,
        "is": sets,
        "fid_dinov2": {"model": metric_models.dino_folder(folder("dinov2"))},
        "cmmd": clip,
    }


@pytest.fixture(scope="module")
def built(options):
    return {name: create(name, **options[name]) for name in METRIC_NAMES}


@pytest.fixture(scope="module")
def images():
    """Four images of low frequency and their slightly noisy copies."""
    rng = np.random.default_rng(3)
    coarse = torch.tensor(rng.random((4, 3, 6, 6)))
    smooth = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 1).permute(0, 2, 3, 1).numpy()
    noisy = np.clip(smooth + rng.normal(0, 0.08, smooth.shape), 0, 1)
    return (smooth * 255).astype(np.uint8), (noisy * 255).astype(np.uint8)


every_metric = pytest.mark.parametrize("name", METRIC_NAMES)


@every_metric
def test_one_finite_value_per_image_and_the_same_again(built, images, name):
    metric, (smooth, noisy) = built[name], images
    values = metric.score(noisy, [PROMPT] * 4, smooth)
    assert values.shape == (4,) and values.dtype == np.float64 and np.isfinite(values).all()
    assert np.array_equal(values, metric.score(noisy, [PROMPT] * 4, smooth))
    rows = metric.rows(noisy, [PROMPT] * 4, smooth)
    assert [row["value"] for row in rows] == values.tolist()
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("name", [name for name in METRIC_NAMES if name not in SETS])
def test_the_batch_does_not_matter(built, images, name):
    metric, (smooth, noisy) = built[name], images
    together = metric.score(noisy, [PROMPT] * 4, smooth)
    alone = [metric.score(noisy[i : i + 1], [PROMPT], smooth[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METRIC_NAMES if metric_class(name).needs_reference])
def test_nothing_is_better_than_the_reference_itself(built, images, name):
    metric, (smooth, noisy) = built[name], images
    sign = 1 if metric.higher_is_better else -1
    same, other = (sign * metric.score(batch, [PROMPT] * 4, smooth) for batch in (smooth, noisy))
    assert same.mean() > other.mean()
    best = {"psnr": 100.0, "ssim": 1.0, "clip_image_similarity": 1.0, "dino": 1.0, "lpips": 0.0, "dists": 0.0}
    if name in best:
        np.testing.assert_allclose(sign * same, best[name], atol=1e-4)


@every_metric
def test_inputs_that_do_not_fit_are_refused(built, images, name):
    metric, (smooth, _) = built[name], images
    with pytest.raises(UsageError, match="expected uint8"):
        metric.score(smooth.astype(np.float32), [PROMPT] * 4, smooth)
    with pytest.raises(UsageError, match="expected uint8"):
        metric.score(smooth[0], [PROMPT], smooth)
    with pytest.raises(UsageError, match="4 images but 1 prompts"):
        metric.score(smooth, [PROMPT], smooth)
    if metric.needs_reference:
        with pytest.raises(UsageError, match="reference"):
            metric.score(smooth, [PROMPT] * 4)
        with pytest.raises(UsageError, match="sizes must agree"):
            metric.score(smooth, [PROMPT] * 4, smooth[:, :-1])


@every_metric
def test_no_images_are_no_values(built, name):
    empty = np.zeros((0, SIZE, SIZE, 3), dtype=np.uint8)
    assert built[name].score(empty, [], empty).shape == (0,)


@every_metric
def test_a_metric_describes_itself_in_json(built, name):
    described = built[name].describe()
    assert described["name"] == name == built[name].name
    assert json.loads(json.dumps(described)) == described


@every_metric
def test_what_a_metric_compares_with_is_declared_as_its_class_is(name):
    declared, cls = DECLARATIONS[name].compares, metric_class(name)
    assert declared.startswith("reference") == cls.needs_reference
    assert declared.startswith("prompt") == cls.needs_prompt
    assert not cls.needs_reference or (declared == "reference set") == issubclass(cls, SetMetric)
    assert (declared in ("prompt metadata", "prompt's questions")) == issubclass(cls, BenchmarkMetric)


@every_metric
def test_every_metric_serves_as_objective_by_name(options, images, name):
    smooth, noisy = images
    quality = create_composite({name: {"weight": 0.5, **options[name]}, "psnr": 1.0})
    values = quality.score_parts(noisy, [PROMPT] * 4, smooth)
    sign = 1 if quality.parts[name][1].higher_is_better else -1
    expected = 0.5 * sign * values[name] + (values["psnr"] if name != "psnr" else 0)
    np.testing.assert_allclose(quality.score(noisy, [PROMPT] * 4, smooth), expected if name != "psnr" else values[name])
    assert set(quality.describe()) == {name, "psnr"}


@every_metric
def test_the_summary_is_json(built, images, name):
    metric, (smooth, noisy) = built[name], images
    rows = metric.rows(noisy, [PROMPT] * 4, smooth)
    summary = metric.summary(rows, [PROMPT] * 4)
    assert summary and json.loads(json.dumps(summary)) == summary
    if name in SETS:
        assert isinstance(metric, SetMetric)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: create("clip_scor"), "did you mean clip_score"),
        (lambda: create("beauty"), "known: clip_score"),
        (lambda: create("psnr", window=3), "no option 'window'"),
        (lambda: create_composite({}), "no metrics"),
        (lambda: create_composite(["psnr"]), "expected metrics and weights"),
        (lambda: create_composite({"psnr": 0}), "weight of psnr is 0"),
        (lambda: create_composite({"psnr": "much"}), "weight of psnr is 'much'"),
        (lambda: create_composite({"psnr": {"weight": float("nan")}}), "weight of psnr is nan"),
        (lambda: create("dpg"), "dpg_bench.csv"),
        (lambda: create("dpg", questions="none.csv"), "cannot be read"),
        (lambda: create("geneval", detector="yolo"), "detector 'yolo'"),
        (lambda: create("lpips", net="resnet"), "net 'resnet'"),
        (lambda: create("lpips", batch_size="many"), "batch_size is 'many', expected a whole number"),
        (lambda: create("lpips", batch_size=0), "batch_size is 0, expected at least 1"),
        (lambda: create("lpips", weights=3), "weights is 3, expected text or empty"),
        (lambda: create("lpips", net=" "), "net is ' ', expected text that is not empty"),
        (lambda: create("kid", subsets=True), "subsets is True, expected a whole number"),
        (lambda: create("geneval", threshold=float("nan")), "threshold is nan, expected a finite number"),
        (lambda: create("geneval", detector=[1]), r"detector is \[1\], expected text"),
    ],
)
def test_wrong_names_and_options_are_refused_by_name(make, named):
    with pytest.raises(UsageError, match=named):
        make()
