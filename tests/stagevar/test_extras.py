"""The base installation is the runtime; what needs more says in one line which extra to install, and exits with 2."""

import ast
import re
import sys
import tomllib

import pytest
from PIL import Image

from stagevar import __version__, extras
from stagevar.console import report_errors
from tests import ROOT
from tests.repository.test_house import imports, modules, run_without
from tuner.cli import doctor

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
#: Names of distributions that differ from what imports say.
IMPORTED_AS = {
    "open_clip_torch": "open_clip",
    "scikit-learn": "sklearn",
    "torch-fidelity": "torch_fidelity",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
}
#: Come with a declared package that cannot work without them, or are offered by the system where they matter.
BROUGHT_ALONG = {
    "sqlalchemy": "optuna",
    "starlette": "fastapi",
    "pynvml": "a warning says how to get it",
    "triton": "torch's builds for CUDA",
    "pytest": "whoever tests a plug-in by stagevar.testing has it",
}
TUNE = extras.PACKAGES["tune"]
EVERYTHING = tuple(package for packages in extras.PACKAGES.values() for package in packages)


def packages_of(requirements):
    """Import names of requirement lines, those of this project's own extras left out."""
    names = [re.match(r"[\w.-]+", line)[0] for line in requirements if not line.startswith(extras.DISTRIBUTION)]
    return {IMPORTED_AS.get(name, name) for name in names}


def test_the_table_of_extras_is_what_pyproject_installs():
    for extra, packages in extras.PACKAGES.items():
        shared = {p for other, names in extras.PACKAGES.items() if other != extra for p in names}
        assert set(packages) <= packages_of(EXTRAS[extra]) <= {*packages, *shared}, extra
    everything = next(line for line in EXTRAS["all"] if line.startswith(extras.DISTRIBUTION))
    for_the_project_itself = {"all", "dev", "docs", "notebook", "photographs"}
    assert set(re.search(r"\[(.*)\]", everything)[1].split(",")) == set(EXTRAS) - for_the_project_itself


def test_every_package_that_is_imported_is_declared():
    own = {"stagevar", "tuner", "search_spaces"}
    declared = packages_of(PROJECT["project"]["dependencies"]) | set(EVERYTHING)
    for package in ("stagevar", "tuner"):
        for path in modules(package):
            strangers = imports(path) - own - declared - set(IMPORTED_AS) - set(BROUGHT_ALONG)
            assert strangers <= set(sys.stdlib_module_names), path


def test_no_package_is_declared_that_nothing_imports():
    used = {name for package in ("stagevar", "tuner") for path in modules(package) for name in imports(path)}
    used.add("sentencepiece")  # transformers needs it to read T5's vocabulary, without declaring it
    assert set(EVERYTHING) <= used, set(EVERYTHING) - used


def test_there_is_one_version():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "stagevar.__version__"}
    numbers = [
        node.value
        for package in ("stagevar", "tuner")
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == __version__
    ]
    assert numbers == [__version__]


def test_doctor_asks_for_what_pyproject_declares():
    lines = [*PROJECT["project"]["dependencies"], *EXTRAS["tune"]]
    least = dict(re.match(r"([\w.-]+)>=([\d.]+)$", line).groups() for line in lines)
    for name, numbers in doctor.REQUIRED.items():
        assert tuple(int(part) for part in least[name].split("."))[:2] == numbers, name


COMMANDS = {
    ("tuner.cli", "--model", "nano", "--budget", "75%"): "tune",
    ("tuner.cli", "--model", "nano", "--budget", "75%", "--dry-run"): "tune",
    ("tuner.cli", "resume", "run"): "tune",
    ("tuner.cli", "report", "run"): "tune",
    ("tuner.cli", "verify", "profile.yaml"): "tune",
    ("tuner.cli", "sweep", "sweep.yaml"): "tune",
    ("tuner.evalkit.command", "images", "--images", ".", "--metric", "clip_score"): "tune",
    ("tuner.evalkit.command", "images", "--images", ".", "--metric", "psnr"): "metrics",
    ("stagevar.cli.command", "analyze", "--model", "nano"): "tune",
    ("stagevar.cli.command", "serve", "--model", "nano"): "serve",
    ("stagevar.cli.command", "refit", "--model", "nano", "--out", "rule.json"): "tune",
}


@pytest.mark.parametrize(("words", "extra"), COMMANDS.items(), ids=[" ".join(words)[:60] for words in COMMANDS])
def test_a_command_without_its_extra_names_it_in_one_line(words, extra, tmp_path):
    module, *arguments = words
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn.png")
    code = f"""
sys.path.insert(0, {str(ROOT)!r})
import os; os.chdir({str(tmp_path)!r})
from {module} import main
sys.exit(main({arguments!r}))
"""
    result = run_without(EVERYTHING, code)
    assert result.returncode == 2, result.stderr[-2000:]
    assert result.stderr.count("\n") == 1 and f"pip install 'stagevar-tune[{extra}]'" in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]


def test_help_and_doctor_work_on_the_base_installation():
    for module, words in (
        ("tuner.cli", ["--help"]),
        ("tuner.evalkit.command", ["--help"]),
        ("stagevar.cli.command", ["--help"]),
    ):
        result = run_without(EVERYTHING, f"from {module} import main\nsys.exit(main({words!r}))")
        assert result.returncode == 0 and "usage:" in result.stdout, result.stderr[-2000:]
    result = run_without(
        EVERYTHING,
        """
from importlib import metadata
version = metadata.version
def without(name):
    if name in ("optuna", "scipy", "pandas", "rich"):
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = without
from tuner.cli import main
sys.exit(main(["doctor"]))
""",
    )
    assert result.returncode == 1, result.stderr[-2000:]
    assert "fail optuna is missing: pip install 'stagevar-tune[tune]'" in result.stdout


def test_a_package_that_is_missed_late_is_one_line_too(capsys):
    def run():
        raise ModuleNotFoundError("No module named 'optuna.trial'", name="optuna.trial")

    assert report_errors("x", run) == 2
    assert capsys.readouterr().err == "x: this command needs optuna: pip install 'stagevar-tune[tune]'\n"


def test_a_module_of_ours_that_is_missing_is_a_fault_of_the_program():
    def run():
        raise ModuleNotFoundError("No module named 'tuner.nowhere'", name="tuner.nowhere")

    with pytest.raises(ModuleNotFoundError):
        report_errors("x", run)


def test_packages_without_an_extra_are_named_by_themselves():
    assert str(extras.missing("pynvml", "reading clocks")) == "reading clocks needs pynvml: pip install pynvml"
