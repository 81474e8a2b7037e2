"""Dress rehearsal: the commands that a user types for a large model, offline, on stand-ins in the official formats.

Timings are made up from the tokens that a schedule processes, and two images are drawn for all: acceleration changes no
image, or ruins every one. The rest is real: files, text encoder, detector, CLIP, statistics, profile, and the commands.
"""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

import stagevar.sampling.scale_latency
import stagevar.timing
import tuner.evaluation.model_evaluator
import tuner.study.options
from stagevar.cli.command import main as stagevar_main
from stagevar.profile import Profile
from stagevar.sampling.scale_latency import time_scales
from stagevar.schedule import exact
from tests.fakes import weights as stand_ins
from tuner.cli import main as tune_main
from tuner.evaluation.model_evaluator import ModelEvaluator
from tuner.evaluation.prefix_tree import walk
from tuner.results.result import StudyResult
from tuner.study.options import SearchShortcuts
from tuner.testing.formulas import Samples

#: Model -> its weights, its quality, a prompt, and limits as far as 64 prompts can prove; the default ones take 512.
FAMILIES = {
    "infinity-tiny": (
        stand_ins.infinity_weights, stand_ins.text_metrics, "a photo of a dog", "10%,clip_score=1,psnr=10",
    ),
    "star-tiny": (stand_ins.star_weights, stand_ins.text_metrics, "a photo of a dog", "10%,clip_score=1,psnr=10"),
    "hart-tiny": (stand_ins.hart_weights, stand_ins.text_metrics, "a photo of a dog", "10%,clip_score=1,psnr=10"),
    "var-tiny": (stand_ins.var_weights, stand_ins.image_metrics, "207", "psnr=10"),
}  # fmt: skip


class TokenTiming(Samples):
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


def scales_once(sampler, schedules, prompt, seed, rounds):
    """Each scale timed once: how long it took is only shown."""
    return time_scales(sampler, schedules, prompt, seed, rounds=1)


class Drawing:
    """In place of `walk`: two images of the full schedule are drawn, all others are these, moved by their seeds.

    Every schedule draws what the full one draws; with `ruins`, all others draw noise.
    """

    def __init__(self, ruins=False):
        self.ruins, self.first = ruins, None

    def __call__(self, sampler, generation, schedules, leaf, advance=None):
        full = exact(len(sampler.model.grids)).expand(sampler.model.grids, sampler.chunks)
        if self.first is None:
            two = sampler.split(generation, range(2))
            walk(sampler, two, [full], lambda _, images: setattr(self, "first", images))
        seeds = [seed for seed, _ in generation.noise.identities]
        images = np.stack([np.roll(self.first[i % len(self.first)], seed, axis=0) for i, seed in enumerate(seeds)])
        kept = [index for index, steps in enumerate(schedules) if steps == full or not self.ruins]
        ruined = [index for index in range(len(schedules)) if index not in kept]
        if kept:
            leaf(kept, images)
        if ruined:
            leaf(ruined, np.random.default_rng(seeds).integers(0, 256, images.shape, dtype=np.uint8))
        return 0


class Rehearsal:
    """A model's files, and the commands that were run on them.

    Attributes: codes: exit code per command, by its first words. said: what the last one printed.
    """

    def __init__(self, model, folder, capture):
        self.model, self.folder, self.capture = model, folder, capture
        make_weights, make_metrics, self.prompt, self.limits = FAMILIES[model]
        for name in ("weights", "metrics"):
            (folder / name).mkdir()
        self.weights = str(make_weights(folder / "weights"))
        quality = make_metrics(folder / "metrics")
        # Likeness in decibels notices any change, which random detectors and trunks need not.
        quality.append({"name": "psnr", "weight": 0.1, "max_drop": 3.0})
        space = {"model": model, "objectives": {"latency": "ms", "quality": {"metrics": quality}}}
        (folder / "metrics.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
        self.codes, self.said = {}, ""

    def tuning(self, run):
        return [
            "--model", self.model, "--weights", self.weights, "--budget", "80%", "--max-drop", self.limits,
            "--space", str(self.folder / "metrics.yaml"), "--prompts", "8", "--heldout", "64", "--trials", "4",
            "--exhaustive", "--out", str(self.folder / run),
        ]  # fmt: skip

    def __call__(self, name, main, *words):
        """Runs a command, keeps its exit code under `name`."""
        self.capture.readouterr()
        self.codes[name] = main([str(word) for word in words])
        self.said = self.capture.readouterr().out
        return self.codes[name]


@pytest.fixture
def rehearsal(request, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelEvaluator, "latency", timed_by_tokens)
    # The process that proposes ahead has tests of its own; with four schedules there is nothing to gain from it.
    monkeypatch.setattr(tuner.study.options, "EXHAUSTIVE", SearchShortcuts(table=False, rungs=False, overlap=False))
    monkeypatch.setattr(stagevar.timing, "warm_up", lambda run, device, at_most: (1, True))
    monkeypatch.setattr(stagevar.sampling.scale_latency, "time_scales", scales_once)
    return Rehearsal(request.param, tmp_path, capsys)


@pytest.mark.parametrize("rehearsal", FAMILIES, indirect=True)
def test_from_doctor_to_deployment(rehearsal, monkeypatch):
    """With an acceleration that changes nothing; then with one that ruins every image, on the same files."""
    folder, weights = rehearsal.folder, rehearsal.weights
    run, profile = folder / "run", folder / "run" / "profile.yaml"
    monkeypatch.setattr(tuner.evaluation.model_evaluator, "walk", Drawing())

    rehearsal("doctor", tune_main, "doctor", "--model", rehearsal.model, "--weights", weights, "--out", folder)
    rehearsal("dry run", tune_main, *rehearsal.tuning("run"), "--dry-run")
    assert "prove" in rehearsal.said and not run.exists()
    rehearsal("tune", tune_main, *rehearsal.tuning("run"), "--quiet")
    assert rehearsal.said.startswith("verified: ")
    result = StudyResult.load(run)
    assert result.verdict == "verified" and not result.random_weights
    primary = {"lpips"} if rehearsal.model == "var-tiny" else {"geneval", "clip_score"}
    assert {limit.metric for limit in result.limits} >= primary | {"clip_image_similarity", "psnr"}
    assert Profile.load(profile).model.name == rehearsal.model

    at = ("--profile", profile, "--weights", weights)
    rehearsal("generate", stagevar_main, "generate", *at, rehearsal.prompt, "-o", folder / "image.png")
    assert Image.open(folder / "image.png").size == (256, 256)
    rehearsal("bench", stagevar_main, "bench", *at, "--compare", "exact", "--rounds", "1", "--prompts", "1", "--json")
    assert [row["name"] for row in json.loads(rehearsal.said)] == ["exact", f"profile {profile}"]
    rehearsal("verify", tune_main, "verify", profile, "--quiet", "--json")
    states = {verdict["name"]: verdict["status"] for verdict in json.loads(rehearsal.said)["verdicts"]}
    assert set(states.values()) == {"met"} and len(states) >= 4
    (run / "report.html").unlink()
    rehearsal("resume", tune_main, "resume", run, "--quiet")
    (run / "report.html").unlink()
    rehearsal("report", tune_main, "report", run, "--quiet")
    assert (run / "report.html").exists()
    assert set(rehearsal.codes.values()) == {0} and len(rehearsal.codes) == 8, rehearsal.codes

    monkeypatch.setattr(tuner.evaluation.model_evaluator, "walk", Drawing(ruins=True))
    assert rehearsal("tune, ruined", tune_main, *rehearsal.tuning("ruined"), "--quiet") == 3
    ruined = StudyResult.load(folder / "ruined")
    assert ruined.verdict == "infeasible" and not ruined.picks and len(ruined.candidates) == 4
    assert all(candidate.differences["psnr"].high < -10 for candidate in ruined.candidates)
    assert not (folder / "ruined" / "profile.yaml").exists()
    assert rehearsal("verify, ruined", tune_main, "verify", profile, "--quiet", "--json") == 3
    states = {verdict["name"]: verdict["status"] for verdict in json.loads(rehearsal.said)["verdicts"]}
    assert states["drop:psnr"] == "broken" and states["latency"] == "met"
