"""A metric whose weights cannot be had is named, and so are those that would remain; nothing is dropped in silence."""

import pytest

from stagevar.errors import UsageError
from tuner.metrics.registry import create_composite


def test_a_missing_metric_names_what_would_remain(tmp_path):
    quality = {"psnr": 1.0, "clip_score": {"weight": 1, "model": f"local-dir:{tmp_path / 'nowhere'}"}, "ssim": 1.0}
    with pytest.raises(UsageError) as caught:
        create_composite(quality)
    said = str(caught.value)
    assert said.startswith("metric clip_score: ") and "without it psnr, ssim would remain" in said and "\n" not in said


def test_the_only_metric_leaves_nothing(tmp_path):
    with pytest.raises(UsageError) as caught:
        create_composite({"clip_score": {"weight": 1, "model": f"local-dir:{tmp_path / 'nowhere'}"}})
    assert "remain" not in str(caught.value)
