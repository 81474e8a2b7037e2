"""Dress rehearsal: the commands that a user types for a large model, offline, on stand-ins in the official formats.

Timings are made up from the tokens that a schedule processes, and one batch is drawn for all: acceleration changes no
image. The rest is real: files, text encoder, detector, CLIP, statistics, profile, and the commands that take it.
"""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

import tuner.evaluate
from stagevar.cli import main as stagevar
from stagevar.profile import Profile
from stagevar.schedule import exact
from tests import stand_ins
from tests.fakes import FakeTiming
from tuner.cli import main as tune
from tuner.evaluate import ModelEvaluator, walk
from tuner.result import StudyResult

FAMILIES = {
    "infinity-tiny": (stand_ins.infinity_weights, stand_ins.text_metrics, "a photo of a dog"),
    "var-tiny": (stand_ins.var_weights, stand_ins.image_metrics, "207"),
}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """model -> (folder of weights, space file that names local metrics), each made once."""
    made = {}

    def downloaded(model):
        if model not in made:
            weights, metrics, _ = FAMILIES[model]
            folder = tmp_path_factory.mktemp(model)
            quality = metrics(tmp_path_factory.mktemp("metrics"))
            # Likeness in decibels notices any change, which random detectors and trunks need not.
            quality.append({"name": "psnr", "weight": 0.1, "max_drop": 3.0})
            space = {"model": model, "objectives": {"latency": "ms", "quality": {"metrics": quality}}}
            file = folder / "metrics.yaml"
            file.write_text(yaml.safe_dump(space, sort_keys=False))
            made[model] = (weights(folder), file)
        return made[model]

    return downloaded


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelEvaluator, "latency", timed_by_tokens)


class TokenTiming(FakeTiming):
    """With the figure that `verify` reads besides."""

    @property
    def median_ms(self):
        return float(np.median(self.samples_ms))


def timed_by_tokens(self, schedules, rounds, warm_up_at_most=12):
    """Whole images at 100 ms for the full schedule's tokens, with a drift that all of a round share."""
    chunks = self.sampler.chunks
    full = sum(step.processed_tokens(chunks) for step in self.full)
    drift = 1 + 0.02 * np.abs(np.random.default_rng(rounds).standard_normal(rounds))
    return {
        name: TokenTiming(100 * drift * sum(step.processed_tokens(chunks) for step in steps) / full)
        for name, steps in schedules.items()
    }


class Drawing:
    """In place of `walk`: the full schedule's images of the first batch are drawn, all others are these, moved by their seeds.

    Every schedule draws what the full one draws.
    """

    def __init__(self):
        self.first = None

    def __call__(self, sampler, generation, schedules, leaf, advance=None):
        full = exact(len(sampler.model.grids)).expand(sampler.model.grids, sampler.chunks)
        if self.first is None:
            walk(sampler, generation, [full], lambda _, images: setattr(self, "first", images))
        seeds = [seed for seed, _ in generation.noise.identities]
        images = np.stack([np.roll(self.first[i % len(self.first)], seed, axis=0) for i, seed in enumerate(seeds)])
        for index in range(len(schedules)):
            leaf([index], images)
        return 0


def words(model, downloads, out):
    weights, space = downloads(model)
    # As far as 64 prompts can prove anything; the default limits take the default 512.
    limits = ["--max-drop", "psnr=10", *([] if model == "var-tiny" else ["--max-drop", "10%,clip_score=1"])]
    return [
        "--model", model, "--weights", str(weights), "--budget", "80%", "--space", str(space), "--prompts", "8",
        "--heldout", "64", "--trials", "4", "--exhaustive", "--out", str(out), *limits,
    ]  # fmt: skip


@pytest.mark.parametrize("model", FAMILIES)
def test_from_doctor_to_deployment_with_an_acceleration_that_changes_nothing(
    model, downloads, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tuner.evaluate, "walk", Drawing())
    weights, _ = downloads(model)
    run, profile = tmp_path / "run", str(tmp_path / "run" / "profile.yaml")
    tuning = words(model, downloads, run)

    assert tune(["doctor", "--model", model, "--weights", str(weights), "--out", str(tmp_path)]) == 0
    assert tune([*tuning, "--dry-run"]) == 0
    assert "prove" in capsys.readouterr().out
    assert tune([*tuning, "--quiet"]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "verified" in said

    result = StudyResult.load(run)
    assert result.verdict == "verified" and not result.random_weights
    assert {limit.metric for limit in result.limits} >= (
        {"lpips"} if model == "var-tiny" else {"geneval", "clip_score"}
    )
    assert Profile.load(run / "profile.yaml").model.name == model

    prompt = FAMILIES[model][2]
    at = ["--profile", profile, "--weights", str(weights)]
    assert stagevar(["generate", *at, prompt, "-o", str(tmp_path / "image.png")]) == 0
    assert Image.open(tmp_path / "image.png").size == (256, 256)
    assert stagevar(["bench", *at, "--compare", "exact", "--rounds", "2", "--prompts", "2", "--json"]) == 0
    capsys.readouterr()
    assert tune(["verify", profile, "--quiet", "--json"]) == 0, capsys.readouterr()
    states = {v["name"]: v["status"] for v in json.loads(capsys.readouterr().out)["verdicts"]}
    assert set(states.values()) == {"met"} and len(states) >= 4
    assert tune(["resume", str(run), "--quiet"]) == 0
    (run / "report.html").unlink()
    assert tune(["report", str(run), "--quiet"]) == 0 and (run / "report.html").exists()
