"""What a study takes, as a dry run says it: settings, images, files with sizes, memory."""

import json
from pathlib import Path

import pytest

import tuner.evaluation.model_evaluator
from stagevar.errors import UsageError
from stagevar.models.downloads import model_downloads
from stagevar.models.registry import resolve
from stagevar.models.request import ModelRequest
from tuner.cli import main
from tuner.config.costs import images_at_most, memory_plan
from tuner.config.space_file import load_space
from tuner.metrics.downloads import metric_downloads
from tuner.metrics.quality_spec import read_quality


def files(quality):
    return {download.source: download for download in metric_downloads(quality)}


def test_images_count_every_schedule_and_finalist_once():
    assert images_at_most(30, 64, 512) == 31 * 64 + 7 * 512


def test_the_default_metrics_name_detector_and_clip_once():
    found = files(load_space("infinity-8b").quality)
    assert set(found) == {"facebook/mask2former-swin-small-coco-instance", "open_clip ViT-L-14 openai"}
    assert set(files(load_space("var-d16").quality)) == {"torchvision alexnet", "open_clip ViT-L-14 openai"}
    assert all(download.about_bytes > 1e8 for download in found.values())


def test_local_metrics_fetch_nothing():
    local = {
        "geneval": {"detector_model": "/models/detector", "clip_model": "local-dir:/models/clip"},
        "clip_score": {"model": "ViT-L-14", "pretrained": "/models/clip.safetensors"},
        "lpips": {"weights": "/models/alex.pth"},
        "psnr": 1.0,
    }
    assert metric_downloads(read_quality(local)) == []


def test_a_models_files_have_the_size_of_their_parameters(tmp_path):
    found = {d.part: d for d in model_downloads(resolve("infinity-2b", device="cpu"))}
    assert list(found) == ["transformer", "tokenizer", "text encoder"]
    assert 8.5e9 < found["transformer"].about_bytes < 9.5e9  # 2.2 B parameters
    assert "infinity_2b_reg.pth" in found["transformer"].line and "about 11.4 GB" in found["text encoder"].line
    assert model_downloads(resolve("infinity-2b", weights="random", device="cpu")) == []
    for name in ("infinity_2b_reg.pth", "infinity_vae_d32reg.pth"):
        (tmp_path / name).touch()
    assert [d.part for d in model_downloads(resolve("infinity-2b", weights=tmp_path, device="cpu"))] == ["text encoder"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("{}")
    assert model_downloads(resolve("infinity-2b", weights=tmp_path, device="cpu")) == []


def test_memory_says_whether_it_fits(monkeypatch):
    from stagevar.models import memory

    model = ModelRequest("infinity-tiny", weights="random", device="cpu")
    for free, fits in ((1 << 40, True), (1 << 20, False), (None, None)):
        monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: free)
        plan = memory_plan(model, 16)
        assert plan.fits is fits and plan.micro_batch_bytes > plan.one_image_bytes
        assert ("does not fit" in plan.line) == (fits is False)


@pytest.mark.parametrize("weights", [[], ["--weights", "random"]])
def test_a_dry_run_says_it(weights, capsys):
    words = ["--model", "infinity-tiny", "--budget", "80%", "--dry-run", "--device", "cpu", *weights]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"] > 10_000 and plan["memory"]["device"] == "cpu"
    assert (plan["images_at_most"], plan["downloads"] == []) == ((0, True) if weights else (31 * 64 + 7 * 1536, False))
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "images at most" in shown and "GiB for one image" in shown
    assert ("mask2former" in shown) != bool(weights)


def test_the_walkthrough_of_infinity_8b_states_what_its_dry_run_prints(capsys):
    assert main(["--model", "infinity-8b", "--budget", "2s", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    page = (Path(__file__).parents[3] / "docs" / "infinity_8b.md").read_text(encoding="utf-8")
    geneval, clip = plan["limits"]
    for said in (
        f"{plan['prompts']['search']} GenEval-style captions",
        f"up to {plan['prompts']['heldout']:,} others",
        f"GenEval {100 * geneval['max_drop']:g} % of the prompts ({100 * geneval['provable_drop']:.3g} % when no image",
        f"{100 * geneval['provable_drop_discordant']:.3g} % four times out of five",
        f"CLIP score {clip['max_drop']:g} points",
        f"{plan['settings']:,} settings are possible; {plan['schedules']} schedules",
        f"up to {plan['schedules_at_most']} if few keep the limits",
        f"| {plan['images_at_most']:,}, if",
        f"{plan['images_at_most']:,} images would be {plan['images_at_most'] * 2.5 / 3600:.1f} hours",
    ):
        assert said in page, said


def test_a_dry_run_counts_no_images_where_none_is_judged_and_the_schedules_that_were_asked_for(capsys):
    words = ["--model", "nano", "--budget", "80%", "--dry-run", "--json", "--prompts", "64", "--heldout", "512"]
    for more, images in ((["--effort", "instant"], 0), (["--trials", "5"], 6 * 64 + 7 * 512), ([], 31 * 64 + 7 * 512)):
        assert main([*words, *more]) == 0
        assert json.loads(capsys.readouterr().out)["images_at_most"] == images


def test_a_dry_run_of_an_instant_study_promises_no_judgment(capsys):
    words = ["--model", "nano", "--budget", "80%", "--dry-run", "--effort", "instant"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "held-out prompts prove" not in shown and "geneval_nano: at most 3 % of prompts; not judged" in shown
    assert "images at most   none, no image is judged" in shown and "\nschedules        3\n" in shown


def test_a_run_names_the_files_to_fetch_before_it_loads_anything(monkeypatch, capsys, tmp_path):
    said = []

    def load(model, **options):
        said.append(capsys.readouterr().err)
        raise UsageError("no network here")

    monkeypatch.setattr(tuner.evaluation.model_evaluator, "load_evaluator", load)
    run = ["--budget", "80%", "--device", "cpu"]
    assert main(["--model", "infinity-125m", *run, "--out", str(tmp_path / "a")]) == 2
    assert main(["--model", "infinity-125m", *run, "--out", str(tmp_path / "b"), "--weights", "random"]) == 2
    assert "file: transformer: FoundationVision/Infinity/infinity_125M_256x256.pth" in said[0] and " GB, " in said[0]
    assert "file: detector of geneval: facebook/mask2former" in said[0] and "file: CLIP model" in said[0]
    assert "file: " not in said[1]
