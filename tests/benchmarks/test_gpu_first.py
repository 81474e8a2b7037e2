"""The script for the first half hour on a card: every command it runs is one that its program takes."""

import json
import os
import shlex
import subprocess

from benchmarks.engine import build_parser
from stagevar.choices import ENGINES
from tests import ROOT


def run(out, *pieces, **variables):
    command = ["bash", "benchmarks/gpu_first.sh", str(out), *pieces]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": "echo", **variables}, capture_output=True, text=True, timeout=60
    )


def test_every_piece_runs_commands_that_parse(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("-m ")]
    figures = []
    for module, *words in lines:
        if module == "benchmarks.engine":
            args = build_parser().parse_args(words)
            assert set(args.engines) <= set(ENGINES)
            figures.append(args.output.name)
        else:
            assert module in ("tuner.cli", "pytest")
            assert module != "pytest" or all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
    names = ["nano", "tiny", "large", "larger", "cudnn", "eight", "others", "batches"]
    assert figures == [f"{name}.json" for name in names]
    pieces = [json.loads(line) for line in (tmp_path / "pieces.jsonl").read_text().splitlines()]
    assert [p["piece"] for p in pieces][:4] == ["doctor", "equal", "large", "larger"]
    assert all(p["exit_code"] == 0 for p in pieces)


def test_a_piece_that_fails_stops_no_other_and_is_told(tmp_path):
    done = run(tmp_path, "doctor", "eight", PYTHON="false")
    assert done.returncode == 1
    assert [json.loads(line)["exit_code"] for line in (tmp_path / "pieces.jsonl").read_text().splitlines()] == [1, 1]


def test_it_wants_a_folder():
    done = subprocess.run(["bash", "benchmarks/gpu_first.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "usage: benchmarks/gpu_first.sh OUT" in done.stderr
