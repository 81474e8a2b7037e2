"""A metric whose weights cannot be had is named, and so are those that would remain; nothing is dropped in silence."""

import ast
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest

from stagevar.errors import UsageError
from tuner.cli import doctor, main
from tuner.metrics import registry
from tuner.metrics.downloads import missing_files
from tuner.metrics.quality_spec import QualitySpec, read_quality
from tuner.metrics.registry import create_composite


def test_a_missing_metric_names_what_would_remain(tmp_path):
    quality = {"psnr": 1.0, "clip_score": {"weight": 1, "model": f"local-dir:{tmp_path / 'nowhere'}"}, "ssim": 1.0}
    with pytest.raises(UsageError) as caught:
        create_composite(read_quality(quality))
    said = str(caught.value)
    assert said.startswith("metric clip_score: ") and "which leaves psnr, ssim" in said and "\n" not in said


def test_the_only_metric_leaves_nothing(tmp_path):
    with pytest.raises(UsageError) as caught:
        create_composite({"clip_score": QualitySpec(options={"model": f"local-dir:{tmp_path / 'nowhere'}"})})
    assert "which leaves" not in str(caught.value)


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lpips" else found(name, *rest)
    )
    run = ["--model", "var-tiny", "--budget", "80%", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(run) == 2
    assert "metric lpips needs lpips: pip install 'stagevar-tune[metrics]'" in capsys.readouterr().err
    assert main([*run, "--dry-run", "--weights", "random"]) == 0, "only latency is judged"
    findings = doctor.check_metrics("var-tiny")
    assert [(f.state, f.text.partition(":")[0]) for f in findings] == [("fail", "metric lpips needs lpips")]
    assert doctor.check_metrics("infinity-tiny") == []


NAMED = {
    "clip_score": {"pretrained": "{}/clip.pt", "model": "ViT-L-14"},
    "clip_image_similarity": {"model": "local-dir:{}/clip"},
    "geneval": {"detector_model": "{}/mask2former", "clip_pretrained": "openai"},
    "lpips": {"weights": "alex.pth"},
    "geneval2": {"questions": "./geneval2_data.jsonl", "model": "Qwen/Qwen3-VL-8B-Instruct"},
    "pickscore": {"model": "../PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495"},
    "plugged": {"anything": "~/gone"},
}


def test_files_that_options_name_are_found_or_missing_whatever_the_metric(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for metric, options in NAMED.items():
        options = {name: value.format(tmp_path) for name, value in options.items()}
        path = next(iter(options.values())).removeprefix("local-dir:")
        assert missing_files(metric, options) == [
            f"metric {metric}: {next(iter(options))} {path} does not exist; give a file or folder that does, or leave out "
            "the option"
        ]
        if not path.startswith("~"):
            Path(path).touch()
            assert missing_files(metric, options) == []


def test_names_on_a_hub_tags_and_numbers_are_no_files():
    for name, (module, cls) in registry.CLASSES.items():
        parameters = inspect.signature(getattr(importlib.import_module(module), cls)).parameters.values()
        assert missing_files(name, {one.name: one.default for one in parameters}) == [], name
    assert missing_files("clip_score", {"model": "hf-hub:org/clip.pt", "pretrained": "laion2b_s32b_b82k"}) == []


def space_file(folder: Path, **options: object) -> Path:
    metrics = [{"name": "geneval_nano", "weight": 1}, {"name": "clip_score", "weight": 0.1, **options}]
    path = folder / "space.yaml"
    path.write_text(json.dumps({"model": "nano", "objectives": {"latency": "ms", "quality": {"metrics": metrics}}}))
    return path


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"pretrained": "/models/clip.pt"}, "metric clip_score: pretrained /models/clip.pt does not exist"),
        ({"modle": "nano"}, "metric clip_score has no option 'modle'"),
    ],
    ids=["file", "option"],
)
def test_a_metrics_options_are_checked_before_a_model_is_loaded(asked, says, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stagevar.models.registry.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    words = ["--model", "nano", "--budget", "80%", "--space", str(space_file(tmp_path, **asked))]
    assert main([*words, "--out", str(tmp_path / "run"), *options]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_latency_alone_needs_no_metric_files(tmp_path):
    words = ["--model", "infinity-tiny", "--budget", "80%", "--weights", "random", "--dry-run", "--device", "cpu"]
    file = space_file(tmp_path, pretrained="/models/clip.pt")
    file.write_text(file.read_text().replace('"nano"', '"infinity-tiny"').replace("geneval_nano", "geneval"))
    assert main([*words, "--space", str(file), "--out", str(tmp_path / "run")]) == 0


def test_doctor_lists_the_metric_files_of_a_space_that_are_missing(tmp_path):
    (found,) = doctor.check_metrics("nano", space_file(tmp_path, pretrained="/models/clip.pt"))
    assert (found.state, found.text.partition(";")[0]) == (
        "fail", "metric clip_score: pretrained /models/clip.pt does not exist",
    )  # fmt: skip
    (found,) = doctor.check_metrics("nano", space_file(tmp_path, modle="nano"))
    assert found.state == "fail" and "no option 'modle'" in found.text
    assert doctor.check_metrics("nano", space_file(tmp_path, model="nano")) == []


def imports_of(module: str) -> set[str]:
    """Full names of the modules that a module's source imports, inside functions too."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return names | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}


def packages_behind(module: str) -> set[str]:
    """Packages that a module imports itself or through other metrics and nano's checker."""
    seen, waiting, packages = set(), [module], set()
    while waiting:
        current = waiting.pop()
        seen.add(current)
        names = imports_of(current)
        packages |= {name.partition(".")[0] for name in names}
        waiting += [n for n in names if n.startswith(("tuner.metrics.", "stagevar.models.nano.")) and n not in seen]
    return packages


def test_the_packages_of_a_metric_are_those_that_its_module_imports():
    own = {*sys.stdlib_module_names, "tuner", "stagevar", "numpy", "torch", "PIL"}
    brought_along = {"huggingface_hub"}  # open_clip needs it
    named: dict[str, set[str]] = {}
    for name, (module, _) in registry.CLASSES.items():
        packages = set(registry.PACKAGES.get(name, ()))
        assert packages <= packages_behind(module) | {"torchmetrics"}, name
        named.setdefault(module, set()).update(packages)
    for module, packages in named.items():
        assert {name.partition(".")[0] for name in imports_of(module)} - own - brought_along <= packages, module
