"""The wheel: what is in it, and that it works in an environment that holds its declared dependencies and nothing else.

The environments are folders of links to the installed packages that `Requires-Dist` names, and to what those need in turn,
so a dependency that is used and not declared is missing here. `.ci/install_wheel.sh` does the same with real downloads.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from stagevar import __version__
from tests import ROOT

PACKAGES = ("stagevar", "tuner", "search_spaces")
SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "NOTICE")
RUN = """
import sys
from importlib.metadata import entry_points
name, *sys.argv[1:] = sys.argv[1:]
[script] = entry_points(group="console_scripts", name=name)
sys.exit(script.load()())
"""


def _copy_sources(folder):
    skip = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=skip)
        else:
            shutil.copy(source, folder / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built in a copy so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    _copy_sources(folder)
    code = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    out = folder / "dist"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=folder, check=True, capture_output=True, timeout=120)
    [path] = out.glob("*.whl")
    return path


def closure(requirements, extras=frozenset()):
    """Distributions that these requirements bring, each with what it needs in turn; names as they are installed."""
    found, waiting = {}, [(Requirement(line), extras) for line in requirements]
    while waiting:
        requirement, extras_of_parent = waiting.pop()
        environments = [{"extra": extra} for extra in extras_of_parent] or [{"extra": ""}]
        if requirement.marker and not any(requirement.marker.evaluate(env) for env in environments):
            continue
        key = (requirement.name.lower(), frozenset(requirement.extras))
        if key in found:
            continue
        distribution = found[key] = metadata.distribution(requirement.name)
        waiting += [(Requirement(line), key[1]) for line in distribution.requires or ()]
    return list(found.values())


def environment(folder, wheel, extras=frozenset()):
    """A site folder that holds the wheel, unpacked as an installer does, and links to its dependencies alone."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    requires = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    for distribution in closure(requires, extras):
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def run(site, cwd, *words):
    """A console script of the wheel in its own environment: no other site folder, no checkout, no PYTHONPATH."""
    start = f"import sys; sys.path.insert(0, {str(site)!r})\n{RUN}"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", start, *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environ)


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("base"), wheel)


@pytest.fixture(scope="module")
def tune(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("tune"), wheel, frozenset({"tune"}))


def test_the_wheel_holds_the_packages_their_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        others = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert others == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "top_level.txt",
        "licenses/LICENSE",
        "licenses/NOTICE",
    }
    for needed in ("search_spaces/nano.yaml", "stagevar/py.typed", "tuner/py.typed", "stagevar/data/rank_ratio.json"):
        assert needed in names
    assert any(re.match(r"stagevar/.*nano/weights/transformer\.safetensors$", name) for name in names)


def test_the_metadata_says_what_an_index_shows(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    for line in (
        f"Version: {__version__}",
        "License-Expression: MIT",
        "License-File: NOTICE",
        "Description-Content-Type: text/markdown",
        "Requires-Python: >=3.11",
    ):
        assert f"\n{line}\n" in text
    unconditional = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", text, re.MULTILINE)
    assert sorted(unconditional) == ["numpy", "pillow", "pyyaml", "safetensors", "torch"]


def test_the_base_installation_imports_and_draws(base, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(base)!r}); import stagevar; print(stagevar.__file__, stagevar.__version__)"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == [str(base / "stagevar" / "__init__.py"), __version__], result.stderr
    helped = run(base, tmp_path, "stagevar", "--help")
    assert helped.returncode == 0 and "generate" in helped.stdout
    drawn = run(base, tmp_path, "stagevar", "generate", "--model", "nano", "a photo of a red circle", "-o", "red.png")
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    assert (tmp_path / "red.png").read_bytes().startswith(b"\x89PNG")


def test_the_base_installation_names_the_extra_that_tunes(base, tmp_path):
    result = run(base, tmp_path, "stagevar-tune", "--model", "nano", "--budget", "75%")
    assert result.returncode == 2
    assert result.stderr == "stagevar-tune: stagevar-tune needs optuna: pip install 'stagevar-tune[tune]'\n"


def test_the_tune_extra_finds_the_shipped_spaces_and_everything_a_study_imports(tune, tmp_path):
    planned = run(tune, tmp_path, "stagevar-tune", "--model", "nano", "--budget", "75%", "--dry-run")
    assert planned.returncode == 0, planned.stderr[-2000:]
    assert "dry run" in planned.stdout and list(tmp_path.iterdir()) == []
    code = f"""
import sys; sys.path.insert(0, {str(tune)!r})
import tuner.study.study, tuner.proposals.trial_sampler, tuner.report.export, tuner.report.page, tuner.study.progress
from importlib.metadata import entry_points
assert {{point.name for point in entry_points(group="stagevar.similarities")}} >= {{"clip", "lpips"}}
print(tuner.study.study.__file__)
"""
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip().startswith(str(tune)), result.stderr[-2000:]
