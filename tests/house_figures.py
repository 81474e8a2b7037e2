"""Figures of the house from its syntax trees: rooms, arrows, circles, long files and functions, open dictionaries, reaches
into private names, mypy.

`python -m tests.house_figures` prints them (mypy only where it is installed); tests/repository/test_house.py holds them to
tests/house_plan.py. An import inside a function counts as one at the top does, and so does one for type checking only.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests import ROOT

PACKAGES = ("stagevar", "tuner")
FILE_LINES = 400
FUNCTION_LINES = 80
#: A value of any kind behind any key: what nobody can check.
OPEN_DICTIONARY = re.compile(r"(?:dict|Mapping)\[str, Any\]")


def python_files(*packages: str) -> list[Path]:
    """The Python files of packages, sorted."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_imports(*packages: str) -> dict[str, set[str]]:
    """The modules of these packages that each of their modules imports, anywhere in the file."""
    files = {module_name(path): path for path in python_files(*packages)}
    imported = {}
    for name, path in files.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    targets.add(submodule if submodule in files else node.module)
        imported[name] = {target for target in targets if target in files and target != name}
    return imported


def room(module: str) -> str:
    """The folder of a module: "tuner.study" of tuner.study.ledger, "tuner" of a module beside the folders."""
    parts = module.split(".")
    is_folder = (ROOT / "/".join(parts)).is_dir()
    return ".".join(parts[:2] if len(parts) > 2 or is_folder else parts[:1])


def arrows(imported: Mapping[str, set[str]], package: str) -> dict[str, set[str]]:
    """The rooms of a package that each of its rooms imports."""
    between: dict[str, set[str]] = {}
    for module, targets in imported.items():
        if module.split(".")[0] == package:
            reached = {room(target) for target in targets if target.split(".")[0] == package}
            between.setdefault(room(module), set()).update(reached - {room(module)})
    return between


def circles(graph: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of nodes that reach each other, sorted."""
    reached = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            fresh = graph.get(todo.pop(), set()) - seen
            seen |= fresh
            todo.extend(fresh)
        reached[start] = seen
    groups = {
        tuple(sorted({start} | {other for other in reached[start] if start in reached.get(other, ())}))
        for start in graph
        if start in reached[start]
    }
    return sorted(groups)


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each node of a graph without circles: 0 imports nothing, others stand above all they import."""
    height: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in height:
            height[node] = 1 + max((floor(target) for target in graph.get(node, ())), default=-1)
        return height[node]

    return {node: floor(node) for node in graph}


def long_files(*packages: str) -> dict[str, int]:
    """Lines of the files above FILE_LINES, by path."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(*packages)}
    return {path: count for path, count in lines.items() if count > FILE_LINES}


def long_functions(*packages: str) -> dict[str, int]:
    """Lines of the functions above FUNCTION_LINES, by "path::Class.name"."""
    return {
        f"{path.relative_to(ROOT)}::{name}": lines
        for path in python_files(*packages)
        for name, lines in _functions(ast.parse(path.read_text()), "")
        if lines > FUNCTION_LINES
    }


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{child.name}."
            if not isinstance(child, ast.ClassDef):
                yield inner[:-1], (child.end_lineno or child.lineno) - child.lineno + 1
        yield from _functions(child, inner)


def open_dictionaries(*packages: str) -> dict[str, int]:
    """How often files write `dict[str, Any]` or `Mapping[str, Any]`, by path; files without are left out."""
    counts = {
        str(path.relative_to(ROOT)): len(OPEN_DICTIONARY.findall(path.read_text())) for path in python_files(*packages)
    }
    return {path: count for path, count in counts.items() if count}


def private_reaches(*packages: str) -> dict[str, int]:
    """How often files import a name that begins with an underscore, or read one off anything but self, cls and super()."""
    counts = {str(path.relative_to(ROOT)): _reaches(ast.parse(path.read_text())) for path in python_files(*packages)}
    return {path: count for path, count in counts.items() if count}


def _reaches(tree: ast.AST) -> int:
    def private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    def own(value: ast.expr) -> bool:
        value = value.func if isinstance(value, ast.Call) else value
        return isinstance(value, ast.Name) and value.id in ("self", "cls", "super")

    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    read = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not own(node.value)]
    return sum(map(private, [*imported, *read]))


def mypy_errors(*packages: str) -> dict[str, int] | None:
    """Errors of mypy at its loosest setting, by path; None where mypy is not installed."""
    if importlib.util.find_spec("mypy") is None:
        return None
    command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", *packages]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts: dict[str, int] = {}
    for path in re.findall(r"^(\S+?):\d+: error:", answer.stdout, re.MULTILINE):
        counts[path] = counts.get(path, 0) + 1
    return counts


def main() -> None:
    """Prints the figures of both packages as a table."""
    imported = module_imports(*PACKAGES)
    print(f"{'':44}" + "".join(f"{package:>10}" for package in PACKAGES))

    def row(title: str, *cells: object) -> None:
        print(f"{title:44}" + "".join(f"{cell!s:>10}" for cell in cells))

    row("files", *(len(python_files(package)) for package in PACKAGES))
    row("lines", *(sum(len(p.read_text().splitlines()) for p in python_files(package)) for package in PACKAGES))
    graphs = [arrows(imported, package) for package in PACKAGES]
    row("rooms (the folder itself counts)", *(len(graph) for graph in graphs))
    row("arrows between rooms", *(sum(map(len, graph.values())) for graph in graphs))
    row("floors", *("circle" if circles(graph) else 1 + max(floors(graph).values()) for graph in graphs))
    row("circles of rooms", *(len(circles(graph)) for graph in graphs))
    of_modules = [circles(module_imports(package)) for package in PACKAGES]
    row("circles of modules", *(len(found) for found in of_modules))
    row(f"files above {FILE_LINES} lines", *(len(long_files(package)) for package in PACKAGES))
    row(f"functions above {FUNCTION_LINES} lines", *(len(long_functions(package)) for package in PACKAGES))
    row("dict[str, Any] and Mapping[str, Any]", *(sum(open_dictionaries(p).values()) for p in PACKAGES))
    rooms = {name: sum(private_reaches(name).values()) for name in ("tests", "benchmarks", "training")}
    print(f"{'private names reached from outside':44}" + ", ".join(f"{name} {count}" for name, count in rooms.items()))
    errors = mypy_errors(*PACKAGES)
    if errors is None:
        row("mypy errors, loosest setting", *("no mypy" for _ in PACKAGES))
    else:
        row(
            "mypy errors, loosest setting",
            *(sum(n for path, n in errors.items() if path.startswith(p)) for p in PACKAGES),
        )
    for found in of_modules:
        for circle in found:
            print("circle:", " <-> ".join(circle))


if __name__ == "__main__":
    main()
