"""Runs every golden case of a folder, prints the largest difference of each kind, exits non-zero on any miss.

Cases are told apart by the prefix of their file name; each is a `.json` with its `.npz` beside it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from tests.golden.checks import Check, worst_by_name

#: file-name prefix -> module:function
RUNNERS = {
    "fastervar_": "tests.golden.infinity_cases:run_fastervar",
    "infinity_": "tests.golden.infinity_cases:run_infinity",
    "fastvar_": "tests.golden.fastvar_cases:run_case",
    "skipvar_": "tests.golden.skipvar_cases:run_case",
    "var_": "tests.golden.var_cases:run_case",
    "star_": "tests.golden.star_cases:run_case",
    "hart_": "tests.golden.hart_cases:run_case",
}


def runner(path: Path) -> Callable[[Path], list[Check]] | None:
    """The function that checks this case, None when the prefix is unknown."""
    for prefix, target in RUNNERS.items():
        if path.name.startswith(prefix):
            module, function = target.split(":")
            return getattr(importlib.import_module(module), function)
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with CASE.json and CASE.npz files")
    parser.add_argument("--verbose", action="store_true", help="every check, not only the worst of each kind")
    folder = parser.parse_args(argv).folder
    verbose = parser.parse_args(argv).verbose
    cases = sorted(path for path in folder.glob("*.json") if path.with_suffix(".npz").is_file())
    if not cases:
        print(f"no golden case (a .json with a .npz beside it) in {folder}", file=sys.stderr)
        return 2
    missed = 0
    for path in cases:
        run = runner(path)
        if run is None:
            print(f"{path.stem}: UNKNOWN (prefixes: {', '.join(RUNNERS)})")
            missed += 1
            continue
        try:
            checks = run(path)
        except Exception as error:  # a case that crashes is a miss, and the others still run
            print(f"{path.stem}: MISS ({type(error).__name__}: {error})")
            missed += 1
            continue
        failed = [check for check in checks if not check.ok]
        print(f"{path.stem}: {'MISS' if failed else 'ok'} ({len(checks)} checks)")
        for check in checks if verbose else worst_by_name(checks):
            print(f"  {'ok  ' if check.ok else 'MISS'} {check.name:<28} {check.value:.3g}  (limit {check.limit:g})")
        missed += bool(failed)
    print(f"{len(cases) - missed} of {len(cases)} cases pass")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
