"""What is known to be wrong before a model is loaded, by every command that would load one; paths found from anywhere."""

import errno
import fcntl
import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stagevar.console import report_errors
from stagevar.errors import InfrastructureError, UsageError
from stagevar.prompts.seeds import in_32_bits, non_negative
from tests import ROOT
from tuner import cli
from tuner.cli.sweep import check
from tuner.config import checks
from tuner.config.prompts import load_prompts
from tuner.config.space import PromptSource
from tuner.evalkit import command as eval_cli
from tuner.results import run_dir as journal

WORDS = ["--model", "nano", "--budget", "95%", "--dry-run"]
GOOD = {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "cyan"}]}


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch):
    """Whatever gets as far as loading a model fails the test."""
    monkeypatch.setattr("stagevar.models.registry.load_model", lambda *a, **k: pytest.fail("a model was loaded"))


def line(capsys, words, code=2) -> str:
    assert cli.main(words) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def prompt_file(folder: Path, bad: object, at: int = 40, count: int = 90) -> Path:
    rows = [json.dumps({**GOOD, "prompt": f"a photo of ring {i}"}) for i in range(count)]
    rows[at - 1] = bad if isinstance(bad, str) else json.dumps(bad)
    path = folder / "p.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "a photo of a circle"}, "line 40: geneval_nano: prompt"),
        ({**GOOD, "prompt": "half \ud83d"}, "line 40: .* is half a character"),
        (
            {**GOOD, "prompt": "x", "include": [{"class": "ring"}]},
            r"line 40: GenEval metadata: include\[0\] has count None",
        ),
        ({"prompt": "x", "include": []}, "line 40: GenEval metadata has tag None"),
        ("[" * 100_000, "line 40: JSON nested too deeply"),
        ('{"prompt": 3}', "line 40 has no text under 'prompt'"),
    ],
)
def test_every_line_of_a_prompt_file_is_checked_before_anything_runs(tmp_path, capsys, bad, reason):
    """Line 40 of 90: some seeds leave it to the held-out set, or to nobody."""
    import re

    path = prompt_file(tmp_path, bad)
    for seed in ("0", "3"):
        err = line(capsys, [*WORDS, "--prompts", str(path), "--heldout", "9", "--seed", seed])
        assert re.search(reason, err), err


def test_good_files_and_blank_lines_pass(tmp_path, capsys):
    path = prompt_file(tmp_path, "")
    assert cli.main([*WORDS, "--prompts", str(path), "--weights", "random"]) == 0
    assert "nothing was loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--threads", "999"], "threads 999 must be between 1 and"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "meta"], "unknown device 'meta'"),
        (["--device", "cuda:99"], "does not exist"),
        (["--weights", "/nowhere/w"], "no weights at /nowhere/w: No such file"),
        (["--weights", ""], "is empty"),
        (["--resolution", "9M"], "has no resolution '9M'"),
        (["--engine", "graph"], "needs a CUDA device"),
        (["--out", "/dev/null/run"], "cannot be written"),
        (["--out", "/proc/run"], "cannot be written"),
        (["--seed", "1.5"], "must be a whole number"),
        (["--seed", "nan"], "must be a whole number"),
        (["--prompts", "9" * 5000], "must be a number from 1 to"),
        (["--heldout", "9" * 5000], "must be a whole number of at least 1"),
        (["--storage", "foo://x"], "cannot be opened"),
        (["--storage", "sqlite:////proc/nowhere/x.db"], "folder /proc/nowhere does not exist"),
        (["--storage", "postgresql://u:secret@h/d"], "holds a password"),
        (["--storage", "http://[x"], "must be a database URL"),
    ],
)
def test_options_are_checked_before_anything_runs(capsys, words, reason):
    assert reason in line(capsys, [*WORDS, *words])


def test_a_run_folder_that_holds_something_else_is_refused_by_the_dry_run_too(tmp_path, capsys):
    (tmp_path / ".DS_Store").touch()
    assert cli.main([*WORDS, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "thesis.tex").touch()
    assert "holds no run (thesis.tex)" in line(capsys, [*WORDS, "--out", str(tmp_path)])


@pytest.mark.parametrize("seed", ["-1", "4294967296", "-99999999999999999999999", "9" * 60])
def test_seeds_of_any_sign_and_size_make_a_plan(capsys, seed):
    assert cli.main([*WORDS, "--seed", seed]) == 0
    name = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("run directory"))
    assert len(name) < 80
    sets = load_prompts(PromptSource(search=4, heldout=4), int(seed))
    assert len(sets["search"]) == 4 and sets["search"].seeds[0] == int(seed)


def test_seeds_for_generators_that_take_fewer():
    assert [non_negative(n) for n in (0, 7, 2**70)] == [0, 7, 2**70]
    assert len({non_negative(n) for n in (-1, -2, -(2**70), 0, 1, 2)}) == 6
    assert [in_32_bits(n) for n in (0, 2**32 - 1, 2**32, -1)] == [0, 2**32 - 1, 0, 2**32 - 1]


# ---------------------------------------------------------------------------------------------------- who answers


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "", ":", "host with spaces:1", "h:x", "é:1"]
)
def test_a_ray_address_where_nobody_answers_is_one_line(address):
    with pytest.raises(UsageError, match="no Ray cluster at"):
        checks.check_ray_address(address.format(port=free_port()))


def test_addresses_that_answer_pass():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        checks.check_ray_address(f"127.0.0.1:{port}")
        checks.check_ray_address("auto")


def test_a_database_that_was_used_before_and_is_away_is_infrastructure(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_check_driver", lambda url: None)
    url = f"postgresql://127.0.0.1:{free_port()}/d"
    with pytest.raises(UsageError, match="does not answer"):
        checks.check_storage(url, tmp_path)
    (tmp_path / "study.name").touch()
    with pytest.raises(InfrastructureError, match="the same command resumes"):
        checks.check_storage(url, tmp_path)


def test_a_file_that_is_no_database_is_refused_before_a_model_is_loaded(tmp_path):
    file = tmp_path / "t.db"
    url = f"sqlite:///{file}"
    checks.check_storage(url, tmp_path)
    for begins in (b"", b"SQLite format 3\0 and more"):
        file.write_bytes(begins)
        checks.check_storage(url, tmp_path)
    file.write_bytes(b"trial,latency\n")
    with pytest.raises(UsageError, match=r"t\.db is not an SQLite database; name a new file"):
        checks.check_storage(url, tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, code):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match=rf"without locks \({os.strerror(code)}\)"), journal.driver_lock(tmp_path):
        pass


# ---------------------------------------------------------------------------------------------------- paths of a run


def test_the_files_of_a_command_are_found_from_anywhere(tmp_path):
    for name in ("s.yaml", "p.txt"):
        (tmp_path / name).touch()
    words = [
        "--space",
        "s.yaml",
        "--prompts=p.txt",
        "--weights",
        "random",
        "--storage",
        "sqlite:///t.db",
        "--budget",
        "9%",
    ]
    found = checks.with_absolute_paths(words, [tmp_path])
    assert found == [
        *("--space", f"{tmp_path}/s.yaml", f"--prompts={tmp_path}/p.txt", "--weights", "random"),
        *("--storage", f"sqlite:///{tmp_path}/t.db", "--budget", "9%"),
    ]
    assert checks.with_absolute_paths(found, [Path("/")]) == found
    kept = ["--prompts", "64", "--prompts", "geneval:8", "--space", "gone.yaml"]
    assert checks.with_absolute_paths(kept, [tmp_path]) == kept
    # A run of before, resumed from elsewhere: its files are looked for beside it.
    assert checks.with_absolute_paths(["--space", "s.yaml"], [Path("/"), tmp_path]) == ["--space", f"{tmp_path}/s.yaml"]


def test_a_plan_stores_absolute_paths(tmp_path, monkeypatch):
    from tuner.config.space_file import load_space

    monkeypatch.chdir(tmp_path)
    (tmp_path / "space").mkdir()
    shipped = ROOT / "search_spaces" / "nano.yaml"
    text = shipped.read_text()
    (tmp_path / "space" / "s.yaml").write_text(text.replace("source: nano", "source: p.jsonl"))
    prompt_file(tmp_path / "space", "", count=400)
    assert load_space("nano", tmp_path / "space" / "s.yaml").prompts.source == "p.jsonl"
    plan = check(["--model", "nano", "--budget", "95%", "--space", "space/s.yaml", "--out", "r"])
    assert plan.space.prompts.source == str(tmp_path / "space" / "p.jsonl")
    assert f"{tmp_path}/space/s.yaml" in shlex.split(plan.command)


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_a_folder_without_a_transformer_is_refused_before_anything_is_fetched(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stagevar.models.hub.fetch", lambda file: pytest.fail(f"{file} was asked for"))
    (tmp_path / "infinity_vae_d56_f8_14_patchify.pth").touch()
    words = ["--model", "infinity-8b", "--budget", "2s", "--weights", str(tmp_path), "--out", str(tmp_path / "run")]
    assert "holds no transformer of infinity-8b: none of infinity_8b_weights/" in line(capsys, [*words, *options])
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- manners


def test_ctrl_c_is_one_line_and_130(capsys):
    def stopped():
        raise KeyboardInterrupt

    assert report_errors("x", stopped) == 130
    assert capsys.readouterr().err.startswith("x: stopped") and signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


INTERRUPTED = """
import os, signal, sys
from stagevar.console import report_errors
def run():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**9): pass
    except KeyboardInterrupt:
        raise ImportError("a library that was interrupted while it loaded")
sys.exit(report_errors("x", run))
"""


@pytest.mark.process
def test_an_error_that_ctrl_c_caused_is_no_traceback():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130 and done.stderr.count("\n") == 1 and done.stderr.startswith("x: stopped"), done.stderr


def test_ctrl_c_while_the_modules_of_a_command_load_is_one_line(monkeypatch, capsys):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    def interrupted(name):
        raise KeyboardInterrupt

    for command, place in scripts.items():
        module, function = place.split(":")
        entry = getattr(importlib.import_module(module), function)
        with monkeypatch.context() as patch:
            patch.setattr("stagevar.console.importlib.import_module", interrupted)
            assert entry() == 130
        assert capsys.readouterr().err.startswith(f"{command}: stopped;")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [command, "--version"])
            with pytest.raises(SystemExit, match="0"):
                entry()
        assert capsys.readouterr().out.startswith("stagevar")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "r/trials.jsonl"), 6, "r/trials.jsonl cannot be written"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 6, "Disk quota exceeded"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 4000), 2, "File name too long"),
        (MemoryError(), 6, "out of memory"),
        (UsageError("two\nlines"), 2, "two lines"),
        (
            UsageError("value " + "9" * 10_000 + " is too large; take a smaller one"),
            2,
            "9 is too large; take a smaller one",
        ),
        (UsageError("\udce9" * 10_000 + " is no name"), 2, "udce9 is no name"),
    ],
)
def test_what_the_system_refuses_is_one_line(capsys, error, code, text):
    def run():
        raise error

    assert report_errors("x", run) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and text in err and len(err) <= 601


def test_faults_of_the_program_keep_their_traceback():
    def run():
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        report_errors("x", run)


def test_eval_lists_metrics_without_a_folder_and_checks_its_output_first(tmp_path, capsys):
    assert eval_cli.main(["--metric", "list"]) == 0
    assert "geneval" in capsys.readouterr().out.split()
    assert eval_cli.main(["--metric", "psnr"]) == 2
    assert "give --images DIR" in capsys.readouterr().err
    words = ["--images", str(tmp_path), "--metric", "psnr", "--out", str(tmp_path / "no" / "r.json")]
    assert eval_cli.main(words) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "ulimit -v"),
        (OSError(errno.EMFILE, "Too many open files", "a/file"), "ulimit -n"),
        (OSError(errno.ENFILE, "Too many open files in system"), "fs.file-max"),
    ],
)
def test_a_limit_of_the_system_is_infrastructure_and_the_line_names_it(capsys, error, fix):
    def run():
        raise error

    assert report_errors("stagevar-tune", run) == 6
    line = capsys.readouterr().err
    assert fix in line and "the same command resumes" in line and line.count("\n") == 1
