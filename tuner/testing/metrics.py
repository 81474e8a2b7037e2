"""The contract that every metric passes, as a class to inherit.

class TestMine(MetricContract):
    def build(self):
        return Mine()

The test images are smooth random colors, with and without a little noise; their scores mean nothing. For a metric that
loads a large model, override the fixture `metric` with a wider scope, so that it is built once.
"""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest

from stagevar.errors import UsageError
from tuner.metrics.base import Metric, Prompt, SetMetric
from tuner.metrics.declarations import Declaration
from tuner.metrics.registry import CompositeQuality, declaration_of

Images = tuple[np.ndarray, np.ndarray]


class MetricContract:
    """Tests for a metric. Subclasses build it.

    Attributes:
        size: side of the test images in pixels.
        prompt: the prompt of each test image.
    """

    size = 48
    prompt: Prompt = "a photo of a dog"

    def build(self) -> Metric:
        raise NotImplementedError

    def draw(self) -> Images:
        """Two batches (4, size, size, 3) uint8: smooth colors, and the same with noise."""
        rng = np.random.default_rng(3)
        y_HW, x_HW = np.mgrid[0 : self.size, 0 : self.size] / self.size
        turns_B32, phase_B3 = rng.random((4, 3, 2)) * 2, rng.random((4, 3))
        waves_B3HW = turns_B32[..., :1, None] * y_HW + turns_B32[..., 1:, None] * x_HW + phase_B3[..., None, None]
        smooth_BHW3 = (0.5 + 0.5 * np.sin(2 * np.pi * waves_B3HW)).transpose(0, 2, 3, 1)
        noisy_BHW3 = smooth_BHW3 + rng.normal(0, 0.08, smooth_BHW3.shape)
        smooth_BHW3, noisy_BHW3 = (
            (np.clip(x_BHW3, 0, 1) * 255).astype(np.uint8) for x_BHW3 in (smooth_BHW3, noisy_BHW3)
        )
        return smooth_BHW3, noisy_BHW3

    @pytest.fixture
    def metric(self) -> Metric:
        return self.build()

    @pytest.fixture
    def images(self) -> Images:
        return self.draw()

    @property
    def prompts(self) -> list[Prompt]:
        return [self.prompt] * 4

    # ------------------------------------------------------------------ the contract

    def test_one_finite_value_per_image_and_the_same_again(self, metric: Metric, images: Images) -> None:
        smooth, noisy = images
        values_B = metric.score(noisy, self.prompts, smooth)
        assert values_B.shape == (4,) and values_B.dtype == np.float64 and np.isfinite(values_B).all()
        assert np.array_equal(values_B, metric.score(noisy, self.prompts, smooth))
        rows = metric.rows(noisy, self.prompts, smooth)
        assert [row["value"] for row in rows] == values_B.tolist()
        assert json.loads(json.dumps(rows)) == rows

    def test_images_are_left_as_they_were(self, metric: Metric, images: Images) -> None:
        smooth, noisy = (batch.copy() for batch in images)
        metric.score(noisy, self.prompts, smooth)
        assert np.array_equal(smooth, images[0]) and np.array_equal(noisy, images[1])

    def test_the_batch_does_not_matter(self, metric: Metric, images: Images) -> None:
        """Values do not depend on how a study cuts its prompts into micro-batches."""
        smooth, noisy = images
        if isinstance(metric, SetMetric):
            noisy, smooth = (np.concatenate([batch] * 4) for batch in images)  # some sets need ten
            cut = metric.score_set([noisy[:1], noisy[1:]], [smooth[:3], smooth[3:]])
            np.testing.assert_allclose(cut, metric.score_set([noisy], [smooth]), rtol=1e-4, atol=1e-5)
            return
        together = metric.score(noisy, self.prompts, smooth)
        alone = [metric.score(noisy[i : i + 1], [self.prompt], smooth[i : i + 1])[0] for i in range(4)]
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)

    def test_a_reference_counts_where_it_is_needed_and_nothing_is_better_than_it(
        self, metric: Metric, images: Images
    ) -> None:
        smooth, noisy = images
        if not metric.needs_reference:
            alone = metric.score(noisy, self.prompts)
            assert np.array_equal(metric.score(noisy, self.prompts, smooth), alone)
            return
        sign = 1 if metric.higher_is_better else -1
        same, other = (sign * metric.score(batch, self.prompts, smooth) for batch in (smooth, noisy))
        assert same.mean() > other.mean()

    def test_values_are_what_the_declaration_says(self, metric: Metric, images: Images) -> None:
        """Limits are proved by the declared kind and range, so a value outside would make a proof worthless."""
        smooth, noisy = images
        declaration = metric.declaration or declaration_of(metric.name)
        assert isinstance(declaration, Declaration)
        assert declaration.higher_is_better == metric.higher_is_better
        values_B = metric.score(noisy, self.prompts, smooth)
        if declaration.kind == "binary":
            assert set(values_B) <= {0.0, 1.0}
        elif declaration.kind == "bounded":
            assert (values_B >= 0).all() and (values_B <= declaration.change).all()

    def test_inputs_that_do_not_fit_are_refused(self, metric: Metric, images: Images) -> None:
        smooth, _ = images
        with pytest.raises(UsageError, match="expected uint8"):
            metric.score(smooth.astype(np.float32), self.prompts, smooth)
        with pytest.raises(UsageError, match="expected uint8"):
            metric.score(smooth[0], [self.prompt], smooth)
        with pytest.raises(UsageError, match="4 images but 1 prompts"):
            metric.score(smooth, [self.prompt], smooth)
        if metric.needs_reference:
            with pytest.raises(UsageError, match="reference"):
                metric.score(smooth, self.prompts)
            with pytest.raises(UsageError, match="sizes must agree"):
                metric.score(smooth, self.prompts, smooth[:, :-1])

    def test_no_images_are_no_values(self, metric: Metric) -> None:
        empty = np.zeros((0, self.size, self.size, 3), dtype=np.uint8)
        assert metric.score(empty, [], empty).shape == (0,)

    def test_it_describes_itself_in_json(self, metric: Metric) -> None:
        described = metric.describe()
        assert described["name"] == metric.name
        assert json.loads(json.dumps(described)) == described

    def test_the_summary_is_json(self, metric: Metric, images: Images) -> None:
        smooth, noisy = images
        summary = metric.summary(metric.rows(noisy, self.prompts, smooth), self.prompts)
        assert summary and json.loads(json.dumps(summary)) == summary

    def test_it_serves_as_objective(self, metric: Metric, images: Images) -> None:
        """Weighted, and with a minus sign where lower is better."""
        smooth, noisy = images
        quality = CompositeQuality({metric.name: (0.5, metric)})
        values_B = metric.score(noisy, self.prompts, smooth)
        sign = 1 if metric.higher_is_better else -1
        np.testing.assert_allclose(quality.score(noisy, self.prompts, smooth), 0.5 * sign * values_B)

    def test_it_takes_the_device(self, metric: Metric) -> None:
        assert "device" in inspect.signature(type(metric)).parameters
