"""A metric whose weights cannot be had is named, and so are those that would remain; nothing is dropped in silence."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from stagevar.errors import UsageError
from tuner.cli import doctor, main
from tuner.metrics import registry
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
