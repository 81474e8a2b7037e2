"""The walls of the house: who may import what, and what a bare machine can still do."""

import ast
import functools
import re
import subprocess
import sys
import tomllib

import pytest

from tests import ROOT, house_figures, house_plan
from tests.house_figures import PACKAGES

RUNTIME = {"torch", "numpy", "yaml", "safetensors", "PIL", "stagevar"}
#: Comes with torch's builds for CUDA only, so this module alone may want it, and must do without.
TRITON_DOOR = "stagevar/engine/kernels.py"
#: The one module of the runtime that may import Ray: several GPUs are Ray Serve's.
RAY_DOOR = "stagevar/serving/ray_app.py"
#: Contracts for authors of plug-ins are test classes; nothing of the runtime imports this room.
CONTRACTS = "stagevar/testing/"
#: Each of these is imported in one module of the tuner only.
ONE_PLACE = ("optuna", "ray", "open_clip", "pandas")


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


@functools.cache
def imports(path, top_level_only=False):
    """Names of packages that a file imports."""
    tree = ast.parse(path.read_text())
    found = set()

    def visit(node, depth):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        inner = depth + isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not (top_level_only and inner):
            for child in ast.iter_child_nodes(node):
                visit(child, inner)

    visit(tree, 0)
    return frozenset(found)


def test_stagevar_never_imports_the_tuner():
    assert [str(p) for p in modules("stagevar") if "tuner" in imports(p)] == []


def test_stagevar_imports_only_its_own_packages_at_the_top():
    strangers = {
        str(path.relative_to(ROOT)): sorted(extra)
        for path in modules("stagevar")
        if (extra := imports(path, top_level_only=True) - RUNTIME - set(sys.stdlib_module_names))
    }
    assert strangers.pop(TRITON_DOOR) == ["triton"]
    assert {name for names in _of_contracts(strangers) for name in names} == {"pytest"}
    assert strangers == {}


def _of_contracts(strangers):
    """Takes what the room of the contracts imports out of a list."""
    return [strangers.pop(path) for path in list(strangers) if path.startswith(CONTRACTS)]


def test_nothing_imports_the_contracts_but_tests():
    importers = [
        path
        for package in PACKAGES
        for path in modules(package)
        if "testing" not in path.parts and re.search(r"\b(stagevar|tuner)\.testing\b", path.read_text())
    ]
    assert importers == []


@pytest.mark.parametrize("package", ONE_PLACE)
def test_heavy_packages_have_one_door(package):
    doors = [str(path.relative_to(ROOT)) for path in modules("tuner") if package in imports(path)]
    assert len(doors) <= 1, doors
    runtime_doors = [str(path.relative_to(ROOT)) for path in modules("stagevar") if package in imports(path)]
    assert runtime_doors == ([RAY_DOOR] if package == "ray" else [])


def run_without(packages, code):
    """Runs code in a fresh interpreter in which these packages cannot be imported."""
    block = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {set(packages)!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
"""
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_runtime_imports_without_the_tuners_packages():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in modules("stagevar")]
    names = [name for name in names if not name.endswith("__main__")]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nprint('fine')"
    result = run_without((*ONE_PLACE, "transformers", "sklearn", "matplotlib", "rich", "triton"), code)
    assert result.stdout.strip() == "fine", result.stderr[-2000:]


def test_generate_works_without_the_tuners_packages(tmp_path):
    target = tmp_path / "x.png"
    words = ["generate", "--model", "nano", "a photo of a red circle", "-o", str(target)]
    code = f"from stagevar.cli.command import main; sys.exit(main({words!r}))"
    result = run_without((*ONE_PLACE, "transformers", "matplotlib", "rich", "scipy"), code)
    assert result.returncode == 0, result.stderr[-2000:]
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["stagevar.cli.command", "tuner.cli", "tuner.evalkit.command"])
def test_help_is_cheap(command):
    code = f"""
import importlib, sys
try:
    importlib.import_module({command!r}).main(['--help'])
except SystemExit as stop:
    assert stop.code == 0
heavy = {{'torch', 'optuna', 'ray', 'open_clip', 'pandas', 'transformers'}} & {{m.split('.')[0] for m in sys.modules}}
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "usage:" in result.stdout


def test_no_file_names_this_machine_or_a_registry():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in tracked if name.endswith((".lock", "requirements.txt"))]


# ------------------------------------------------------------------------------------------------ the plan


def test_rooms_import_only_what_the_plan_allows():
    imported = house_figures.module_imports(*PACKAGES)
    for package in PACKAGES:
        for room, targets in house_figures.arrows(imported, package).items():
            allowed = house_plan.ARROWS.get(room)
            assert allowed is not None, f"the room {room} is not in ARROWS of tests/house_plan.py"
            strangers = targets - allowed
            assert not strangers, f"{room} may not import {sorted(strangers)} (ARROWS in tests/house_plan.py)"


def test_modules_import_in_no_new_circle():
    found = {circle for package in PACKAGES for circle in house_figures.circles(house_figures.module_imports(package))}
    assert found == house_plan.CIRCLES, "CIRCLES in tests/house_plan.py may only shrink"


@pytest.mark.parametrize("measure, list_name", [("long_files", "LONG_FILES"), ("long_functions", "LONG_FUNCTIONS")])
def test_what_is_too_long_only_shrinks(measure, list_name):
    too_long, listed = set(getattr(house_figures, measure)(*PACKAGES)), getattr(house_plan, list_name)
    assert not too_long - listed, f"too long: {sorted(too_long - listed)}; cut it"
    assert not listed - too_long, f"no longer too long: remove {sorted(listed - too_long)} from {list_name}"


def test_open_dictionaries_only_shrink():
    count = sum(house_figures.open_dictionaries(*PACKAGES).values())
    assert count <= house_plan.OPEN_DICTIONARIES, "dict[str, Any] belongs to the edges: name the type of its values"


def test_reaches_into_private_names_only_shrink():
    count = sum(house_figures.private_reaches("tests", "benchmarks", "training").values())
    assert count <= house_plan.PRIVATE_REACHES, "reach what you need by a public name, or test it through one"
    assert count == house_plan.PRIVATE_REACHES, f"only {count} are left: write that into tests/house_plan.py"


def test_mypy_reports_the_errors_of_every_module():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    assert not [override["module"] for override in overrides if override.get("ignore_errors")]


def test_the_figures_see_what_they_should(tmp_path, monkeypatch):
    monkeypatch.setattr(house_figures, "ROOT", tmp_path)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("from b import _c, d\nself._e + super()._f() + d.__g__ + d._h() + d.i._j\n")
    assert house_figures.private_reaches("room") == {"room/a.py": 3}
    monkeypatch.undo()
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert house_figures.circles(graph) == [("b", "c")]
    assert house_figures.floors({"roof": {"wall"}, "wall": {"ground"}, "ground": set()})["roof"] == 2
    assert house_figures.room("tuner.metrics.clip") == house_figures.room("tuner.metrics") == "tuner.metrics"
    assert house_figures.room("tuner.start") == "tuner"
    imported = house_figures.module_imports("stagevar")
    assert "stagevar.errors" in imported["stagevar.files"]
    assert "stagevar.cli.command" not in imported["stagevar.schedule"]


# ------------------------------------------------------------------------------------------------ rooms of tests

#: Rooms of tests that mirror no folder of code.
APART = ("contracts", "repository")
#: Rooms of code whose tests are in tests/contracts: they are the contracts.
PUBLISHED_CONTRACTS = {"stagevar.testing", "tuner.testing"}


def test_tests_lie_where_what_they_test_lies():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 100
    for path in files:
        place = path.parent.relative_to(ROOT / "tests")
        if place.parts[:1] not in [(room,) for room in APART]:
            assert place.parts and (ROOT / place).is_dir(), f"{path.relative_to(ROOT)} lies in no room of the code"
            *above, room = place.parts
            names = rf"\b{'[./]'.join(place.parts)}\b|from {'.'.join(above)} import .*\b{room}\b"
            named = re.search(names, path.read_text())
            assert named, f"{path.relative_to(ROOT)} never names {'.'.join(place.parts)}: which room does it test?"


def test_every_room_has_tests_of_its_own():
    rooms = set(house_plan.ARROWS) - PUBLISHED_CONTRACTS
    without = [room for room in rooms if not any((ROOT / "tests" / room.replace(".", "/")).rglob("test_*.py"))]
    assert sorted(without) == []
