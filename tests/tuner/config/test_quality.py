"""Limits per metric: what spaces and command lines may say, and what they come to."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from stagevar.errors import UsageError
from tests.fakes.studies import SPACE
from tuner.config.quality import composite_specs, factors, limited, parse_max_drops, quality_limits
from tuner.config.space_file import load_space, parse_space, space_names
from tuner.metrics import registry
from tuner.metrics.base import Metric
from tuner.metrics.declarations import DECLARATIONS
from tuner.metrics.quality_spec import QualitySpec, read_quality
from tuner.metrics.registry import CLASSES, METRIC_NAMES

TWO = {"geneval": {"weight": 2.0, "max_drop": 0.02}, "clip_score": {"weight": 1.0, "max_drop": 0.3, "model": "x"}}


def space_with(quality):
    return parse_space({**SPACE, "objectives": {"latency": "ms", "quality": quality}})


def _says_lower_is_better(module: str, cls: str) -> bool:
    """Read off the source: importing every metric takes a minute."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
    found = [n.value.value for n in body if isinstance(n, ast.AnnAssign) and n.target.id == "higher_is_better"]
    return found == [False]


def test_every_metric_is_declared_as_its_class_is():
    assert tuple(DECLARATIONS) == METRIC_NAMES
    for name, declared in DECLARATIONS.items():
        assert declared.higher_is_better != _says_lower_is_better(*CLASSES[name]), name
        assert declared.max_drop > 0 and declared.unit
        assert declared.kind == "continuous" or 0 < declared.max_drop < declared.change


def test_listed_metrics_and_the_old_form_read_alike():
    listed = [{"name": name, **options} for name, options in TWO.items()]
    assert space_with({"metrics": listed}).quality == read_quality(TWO) == space_with(TWO).quality
    assert read_quality(TWO)["clip_score"] == QualitySpec(1.0, 0.3, {"model": "x"})
    assert space_with({"geneval_nano": 1.0, "clip_score": 0.5}).quality == {
        "geneval_nano": QualitySpec(),
        "clip_score": QualitySpec(0.5),
    }


@pytest.mark.parametrize(
    ("quality", "says"),
    [
        ({"metrics": []}, "must be a list"),
        ({"metrics": [{"weight": 1}]}, "must have a name"),
        ({"metrics": ["geneval"]}, "must have a name"),
        ({"metrics": [{"name": "geneval"}, {"name": "geneval"}]}, "lists geneval twice"),
        ({"metrics": [{"name": "genevel"}]}, "unknown metric 'genevel'"),
        ({"metrics": [{"name": "geneval", "max_drop": 0}]}, "max_drop 0 of geneval must be a number above 0"),
        ({"metrics": [{"name": "geneval", "max_drop": "2%"}]}, "max_drop '2%' of geneval"),
        ({"metrics": [{"name": "geneval", "max_drop": 2}]}, "fall by more than it can"),
        ({"metrics": [{"name": "geneval", "weight": 0}]}, "above 0"),
        ({"metrics": [{"name": "geneval"}, {"name": "ssim", "weight": -1}]}, "at least 0"),
        ({"metrics": [{"name": "geneval"}], "ssim": 1.0}, "unknown key 'ssim' in quality"),
    ],
)
def test_a_wrong_quality_is_one_line(quality, says):
    with pytest.raises(UsageError) as caught:
        space_with(quality)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_limits_come_from_the_command_line_then_the_space_then_the_metric():
    assert [m.max_drop for m in quality_limits(read_quality(TWO))] == [0.02, 0.3]
    assert [m.max_drop for m in quality_limits(read_quality(TWO), {"clip_score": 0.5})] == [0.02, 0.5]
    assert [m.max_drop for m in quality_limits(read_quality(TWO), 0.01)] == [0.01, 0.3]
    old = quality_limits(read_quality({"geneval_nano": 1.0, "clip_score": 0.0005}))
    assert [m.max_drop for m in old] == [DECLARATIONS["geneval_nano"].max_drop, None]
    assert [m.metric for m in limited(old)] == ["geneval_nano"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"genevil": 0.1}, "no metric 'genevil', did you mean geneval?"),
        (0.0, "above 0"),
        ({"clip_score": float("nan")}, "above 0"),
    ],
)
def test_limits_given_from_python_are_checked_too(asked, says):
    with pytest.raises(UsageError) as caught:
        quality_limits(read_quality(TWO), asked)
    assert says in str(caught.value)


def test_the_composite_counts_allowances():
    assert factors(quality_limits(read_quality(TWO))) == pytest.approx({"geneval": 100.0, "clip_score": 1 / 0.3})
    tie_breaker = factors(quality_limits(read_quality({"geneval_nano": 1.0, "clip_score": 0.0005}), 0.04))
    assert tie_breaker == pytest.approx({"geneval_nano": 25.0, "clip_score": 0.0125})
    options = composite_specs(read_quality(TWO), quality_limits(read_quality(TWO)))
    assert options == {"geneval": QualitySpec(100.0), "clip_score": QualitySpec(1.0 / 0.3, options={"model": "x"})}


class _Seven(Metric):
    name = "seven"

    def _score(self, images, prompts, references):
        return np.full(len(images), 7.0)


def test_a_metric_of_weight_nothing_is_computed_and_not_added(monkeypatch):
    monkeypatch.setattr(registry, "create", lambda name, device: _Seven())
    space = {"ssim": QualitySpec(), "psnr": QualitySpec(0.0)}
    composite = registry.create_composite(composite_specs(space, quality_limits(space)))
    parts = composite.score_parts(np.zeros((2, 16, 16, 3), np.uint8), ["a", "b"])
    assert parts.keys() == {"ssim", "psnr"} and composite.combine(parts) == pytest.approx([140.0, 140.0])


@pytest.mark.parametrize(
    ("texts", "limits"),
    [
        (["2%"], {"geneval": 0.02}),
        (["0.02"], {"geneval": 0.02}),
        (["2e-2"], {"geneval": 0.02}),
        (["clip_score=0.3"], {"clip_score": 0.3}),
        (["3%", "clip_score=.5"], {"geneval": 0.03, "clip_score": 0.5}),
        (["geneval = 3 %,clip_score=2"], {"geneval": 0.03, "clip_score": 2.0}),
        ([], {}),
    ],
)
def test_max_drops_as_typed(texts, limits):
    assert parse_max_drops(texts, TWO) == pytest.approx(limits)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["clip=0.3"], "no metric 'clip', did you mean clip_score?"),
        (["clip_score=3%"], "is in CLIP points, not a percentage; write clip_score=0.3"),
        (["2%", "geneval=3%"], "already has a limit"),
        (["150%"], "fall by more than it can"),
        (["0"], "above 0"),
        (["clip_score=1e999"], "above 0"),
        (["-0.1"], "write 2% or 0.02"),
        ([""], "write 2% or 0.02"),
        (["nan"], "write 2% or 0.02"),
        (["clip_score="], "write clip_score=0.3"),
        (["2%,"], "write 2% or 0.02"),
        (["=2%"], "no metric ''"),
        (["٢%"], "write 2% or 0.02"),
        (["x" * 500], "..."),
    ],
)
def test_a_wrong_max_drop_is_one_line(texts, says):
    with pytest.raises(UsageError) as caught:
        parse_max_drops(texts, TWO)
    message = str(caught.value)
    assert says in message and "max-drop" in message and "\n" not in message and len(message) < 250


@pytest.mark.parametrize("name", space_names())
def test_shipped_spaces_have_limits(name):
    limits = quality_limits(load_space(name).quality)
    assert limits[0].max_drop and limits[0].weight > 0


@pytest.mark.parametrize(
    ("quality", "digest", "written"),
    [
        (
            {"geneval_nano": 1, "clip_score": 0.5},
            "abb398620e0368ec",
            [{"name": "geneval_nano", "weight": 1}, {"name": "clip_score", "weight": 0.5}],
        ),
        (
            {"metrics": [{"name": "geneval", "max_drop": 0.02}, {"name": "clip_score", "model": "x", "weight": 2}]},
            "16a4d3ada798f4c0",
            [{"name": "geneval", "max_drop": 0.02}, {"name": "clip_score", "model": "x", "weight": 2}],
        ),
    ],
)
def test_a_space_keeps_its_digest_and_is_written_as_its_file_says_it(quality, digest, written):
    """Studies that began before know their space by its digest; it tells 1 from 1.0 and a weight from options."""
    space = space_with(quality)
    assert space.digest.startswith(digest)
    assert repr(space.to_data()["objectives"]) == repr({"latency": "ms", "quality": {"metrics": written}})
