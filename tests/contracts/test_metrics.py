"""Every metric of the package against the published contract (tuner.testing.metrics), and what registry and options refuse.

The models are tiny and random: these tests are about the code around them, and no figure here means anything.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stagevar.errors import UsageError
from tests.fakes import metric_models
from tuner.metrics import METRIC_NAMES, SetMetric, create
from tuner.metrics.base import BenchmarkMetric
from tuner.metrics.declarations import DECLARATIONS
from tuner.metrics.quality_spec import QualitySpec
from tuner.metrics.registry import create_composite
from tuner.testing.metrics import MetricContract

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
    prompts = folder("geneval2") / "geneval2_data.jsonl"
    prompts.write_text(metric_models.GENEVAL2)
    sets = {"extractor": FlatFeatures()}
    return {
        "clip_score": clip,
        "clip_image_similarity": clip,
        "hpsv2": clip | {"weights": "unused"},
        "image_reward": metric_models.image_reward_options(folder("image_reward")),
        "pickscore": {"model": metric_models.pickscore_folder(folder("pickscore"))},
        "hpsv3": metric_models.hpsv3_options(folder("hpsv3")),
        "geneval": {
            "detector": "rtdetr",
            "detector_model": metric_models.rtdetr_folder(folder("rtdetr")),
            "color_classifier": metric_models.FixedColor(),
            "threshold": 0.01,
            "counting_threshold": 0.01,
        },
        "geneval_nano": {},
        "geneval2": {"questions": str(prompts), "judge": metric_models.Brightness()},
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


@pytest.mark.parametrize("metric", METRIC_NAMES, indirect=True)
class TestEveryMetric(MetricContract):
    size, prompt = SIZE, PROMPT

    @pytest.fixture
    def metric(self, built, request):
        return built[request.param]

    def test_its_name_is_the_registrys(self, metric, request):
        assert metric.describe()["name"] == request.node.callspec.params["metric"]

    def test_a_set_metric_says_so(self, metric):
        assert isinstance(metric, SetMetric) == (metric.name in SETS)

    def test_the_reference_itself_has_the_best_value(self, metric, images):
        smooth, _ = images
        best = {"psnr": 100.0, "ssim": 1.0, "clip_image_similarity": 1.0, "dino": 1.0, "lpips": 0.0, "dists": 0.0}
        if metric.needs_reference and metric.name not in SETS:
            np.testing.assert_allclose(metric.score(smooth, self.prompts, smooth), best[metric.name], atol=1e-4)

    def test_what_it_compares_with_is_declared_as_its_class_is(self, metric):
        declared, cls = DECLARATIONS[metric.name].compares, type(metric)
        assert declared.startswith("reference") == cls.needs_reference
        assert declared.startswith("prompt") == cls.needs_prompt
        assert not cls.needs_reference or (declared == "reference set") == issubclass(cls, SetMetric)
        assert (declared in ("prompt metadata", "prompt's questions")) == issubclass(cls, BenchmarkMetric)

    def test_it_serves_as_objective_by_name_and_options(self, metric, options, images):
        smooth, noisy = images
        quality = create_composite({metric.name: QualitySpec(0.5, options=options[metric.name]), "psnr": QualitySpec()})
        values = quality.score_parts(noisy, self.prompts, smooth)
        sign = 1 if metric.higher_is_better else -1
        expected = values["psnr"] if metric.name == "psnr" else 0.5 * sign * values[metric.name] + values["psnr"]
        np.testing.assert_allclose(quality.score(noisy, self.prompts, smooth), expected)
        assert set(quality.describe()) == {metric.name, "psnr"}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: create("clip_scor"), "did you mean clip_score"),
        (lambda: create("beauty"), "known: clip_score"),
        (lambda: create("psnr", window=3), "no option 'window'"),
        (lambda: create_composite({}), "no metrics"),
        (lambda: create_composite({"psnr": QualitySpec(0)}), "weight of psnr is 0"),
        (lambda: create_composite({"psnr": QualitySpec(float("nan"))}), "weight of psnr is nan"),
        (lambda: create_composite({"psnr": QualitySpec(float("inf"))}), "weight of psnr is inf"),
        (lambda: create("dpg"), "dpg_bench.csv"),
        (lambda: create("dpg", questions="none.csv"), "cannot be read"),
        (lambda: create("geneval2"), "geneval2_data.jsonl"),
        (lambda: create("geneval2", questions="none.jsonl"), "cannot be read"),
        (lambda: create("geneval", detector="yolo"), "detector 'yolo'"),
        (lambda: create("lpips", net="resnet"), "net 'resnet'"),
        (lambda: create("lpips", batch_size="many"), "batch_size is 'many', expected a whole number"),
        (lambda: create("lpips", batch_size=0), "batch_size is 0, expected at least 1"),
        (lambda: create("lpips", weights=3), "weights is 3, expected text or empty"),
        (lambda: create("lpips", net=" "), "net is ' ', expected a non-empty text"),
        (lambda: create("kid", subsets=True), "subsets is True, expected a whole number"),
        (lambda: create("geneval", threshold=float("nan")), "threshold is nan, expected a finite number"),
        (lambda: create("geneval", detector=[1]), r"detector is \[1\], expected text"),
    ],
)
def test_wrong_names_and_options_are_refused_by_name(make, named):
    with pytest.raises(UsageError, match=named):
        make()
