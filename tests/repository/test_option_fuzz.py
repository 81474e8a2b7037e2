"""Every option of every verb of the three commands, found in their parsers, with values that no one should type.

Nothing is loaded: what would load a model, start a cluster or measure the machine is replaced by `Reached`, which says that
the arguments were accepted. A value is accepted, or refused with exit code 2 and one line; never a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from stagevar.cli import command as stagevar_cli
from stagevar.console import LONGEST_LINE
from stagevar.models.registry import model_parts, resolve
from stagevar.models.request import LoadRequest
from tests.stagevar.profile.test_profile import make
from tuner import cli as tuner_cli
from tuner.cli.command import VERBS as TUNE_VERBS
from tuner.cli.command import verb_parser
from tuner.cli.tune import build_parser
from tuner.evalkit import command as eval_cli
from tuner.metrics.prompt_sets import generate

VALUES = {
    "empty": "",
    "huge text": "x" * 100_000,
    "huge number": "9" * 5000,
    "beyond 64 bits": str(2**70),
    "negative": "-1",
    "zero": "0",
    "NaN": "nan",
    "infinity": "inf",
    "not ASCII": "é漢\u2028😀",
    "YAML": "[1, {a: b}]",
    "a folder": ".",
    "nowhere": "/nowhere/else.json",
    "a device": "/dev/null",
    "a file of another kind": "noise.png",
    "like an option": "--model",
    "half a character": "\udce9",
    "line feeds": "a\n\nb",
    "a null character": "a\0b",
    "a URL": "foo://bar:baz/?q#f",
}
#: Options beside which another must stand to be read at all.
BESIDE = {
    "--ray-address": ["--executor=ray"],
    "--gpu-kind": ["--executor=ray"],
    "--task-timeout": ["--executor=ray"],
    "--tags": ["--count=4"],
}
#: Beside a run that ends at once: 0, doctor's 1, unusable input, a disk or database that gave way.
CODES = {0, 1, 2, 6}


class Reached(BaseException):
    """What comes after the arguments was begun; no `except Exception` takes it for an error."""


def reached(*_: object, **__: object) -> None:
    raise Reached


@dataclasses.dataclass(frozen=True)
class Verb:
    """program: name of the command. words: a command line of this verb that is accepted, or that lacks only its run."""

    program: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join((self.program, *self.words[:1])) if not self.words[0].startswith("-") else self.program


MAINS = {"stagevar": stagevar_cli.main, "stagevar-tune": tuner_cli.main, "stagevar-eval": eval_cli.main}
VERBS = (
    Verb("stagevar", ("generate", "a red circle", "--model=nano", "--output=x.png")),
    Verb("stagevar", ("bench", "--model=nano")),
    Verb("stagevar", ("serve", "--model=nano", "--port=0")),
    Verb("stagevar", ("memory", "--model=infinity-tiny", "--compare=exact", "--kv-cache=model")),
    Verb("stagevar", ("analyze", "--model=nano", "--out=analysis")),
    Verb("stagevar", ("refit", "--model=nano", "--out=refit.json")),
    Verb(
        "stagevar", ("convert", "--model=infinity-tiny", "--weights=a.pth", "--tokenizer=b.pth", "--output=converted")
    ),
    Verb("stagevar-tune", ("--model=nano", "--budget=60%", "--out=run")),
    Verb("stagevar-tune", ("resume", "run")),
    Verb("stagevar-tune", ("report", "run")),
    Verb("stagevar-tune", ("verify", "profile.yaml")),
    Verb("stagevar-tune", ("sweep", "sweep.yaml")),
    Verb("stagevar-tune", ("doctor",)),
    Verb("stagevar-eval", ("geneval", "--detections=found.json")),
    Verb("stagevar-eval", ("dpg", "--answers=answers.csv")),
    Verb("stagevar-eval", ("answers", "--benchmark=oneig", "--answers=answers.csv")),
    Verb("stagevar-eval", ("images", "--images=pictures", "--metric=psnr", "--reference=pictures")),
    Verb("stagevar-eval", ("prompts", "--count=4")),
    Verb("stagevar-eval", ("pairs", "--a=pictures", "--b=pictures", "--page=page.html")),
    Verb("stagevar-eval", ("preference", "--key=key.json", "--answers=votes.json")),
)


def parsers(program: str) -> dict[str, argparse.ArgumentParser]:
    """Parsers of a command by verb, "" where it needs none."""
    if program == "stagevar-tune":
        verbs = {verb: verb_parser(verb) for verb in TUNE_VERBS}
        return {"": build_parser(), **verbs}
    parser = stagevar_cli.build_parser() if program == "stagevar" else eval_cli.build_parser()
    action = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def inputs(verb: Verb) -> Iterator[tuple[str, list[str]]]:
    """(what is tried, arguments): every value for every option and place of a verb, and for an option that it does not have."""
    first = "" if verb.words[0].startswith("-") else verb.words[0]
    places = 0
    for action in parsers(verb.program)[first]._actions:
        option = action.option_strings[-1] if action.option_strings else ""
        places += not option
        for what, value in VALUES.items():
            if option:
                kept = [word for word in verb.words if word.partition("=")[0] not in action.option_strings]
                words = [*kept, *BESIDE.get(option, []), f"{option}={value}"]
            else:
                words = [*verb.words]
                words[places] = value
            yield f"{verb.name} {option or action.dest}, {what}", words
    for what, value in VALUES.items():
        yield f"{verb.name}, an option that is not there, {what}", [*verb.words, f"--{value}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the command lines of VERBS name: pictures, detections, answers, votes, a profile, a sweep."""
    root = tmp_path_factory.mktemp("fuzz")
    metadata = generate(2)
    rng = np.random.default_rng(0)
    for index, line in enumerate(metadata):
        samples = root / "pictures" / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(line))
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(samples / "0000.png")
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / "noise.png")
    for name in ("a.pth", "b.pth"):
        (root / name).touch()
    found = [{"name": str(i), "metadata": line, "detections": []} for i, line in enumerate(metadata)]
    (root / "found.json").write_text(json.dumps(found))
    (root / "answers.csv").write_text("item_id,proposition_id,dependency,tile,answer\na,1,0,0,yes\nb,1,0,0,no\n")
    (root / "key.json").write_text(json.dumps({"study": "s", "pairs": {"p": {"name": "n", "a": "left"}}}))
    (root / "votes.json").write_text(json.dumps({"study": "s", "answers": [{"pair": "p", "choice": "left"}]}))
    (root / "sweep.yaml").write_text("models: [nano]\nbudgets: [60%]\n")
    make(model={"name": "nano", "weights": {}}, reproduce="stagevar-tune --model nano --budget 60%").save(
        root / "profile.yaml"
    )
    return root


def nobody(address: tuple[str, int], timeout: float = 0, source: object = None) -> None:
    """`socket.create_connection` where nobody answers, without asking a name server."""
    address[0].encode("idna")
    raise ConnectionRefusedError(111, "Connection refused")


@functools.cache
def parts_of(name: str, resolution: str, ratio: float) -> object:
    return model_parts(resolve(name, resolution=resolution, ratio=ratio))


def parts_once(request: LoadRequest) -> object:
    """`registry.model_parts`, each model built once."""
    return parts_of(request.spec.name, request.resolution, request.ratio)


@pytest.fixture
def stubs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    places = (
        "stagevar.models.registry.load_model",
        "stagevar.models.convert.load_into",
        "stagevar.serving.server.serve",
        "tuner.evaluation.model_evaluator.load_evaluator",
        "tuner.cli.tune._ray_executor",
        "tuner.cluster.sweep.run_sweep",
        "tuner.metrics.registry.create",
        "tuner.similarities.create",
    )
    # All first: a module that is imported once another one is patched would keep the stub for good.
    for place in places:
        importlib.import_module(place.rpartition(".")[0])
    for place in places:
        monkeypatch.setattr(place, reached)
    # Neither takes a file, but each a tenth of a second, every time.
    monkeypatch.setattr("stagevar.models.memory.estimate_model", reached)
    monkeypatch.setattr("stagevar.models.registry.model_parts", parts_once)
    monkeypatch.setattr("tuner.cluster.connection.check_installed", lambda: None)
    monkeypatch.setattr("socket.create_connection", nobody)
    for name in ("check_device", "_models", "_packages"):  # they look at the machine, not at arguments
        monkeypatch.setattr(f"tuner.cli.doctor.{name}", list)
    monkeypatch.setattr("tuner.cli.doctor._timings", mock.Mock(return_value=mock.Mock(state="ok", text="")))


def outcome(program: str, words: list[str]) -> tuple[int | str, str]:
    """(exit code, or "reached", or the type of what was raised; stderr)."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            code: int | str = MAINS[program](words)
        except SystemExit as stop:
            code = stop.code or 0
        except Reached:
            code = "reached"
        except Exception as error:  # what the command would show with a traceback
            code = f"{type(error).__name__}: {error!s:.200}"
        err.flush()
    return code, err.buffer.getvalue().decode("utf-8")


def fault(code: int | str, err: str) -> str:
    """What is wrong with an outcome, "" for nothing."""
    lines = err.splitlines()
    refusals = [line for line in lines if ": warning: " not in line]
    if code != "reached" and code not in CODES:
        return f"ended with {code}"
    if code in (2, 6) and len(refusals) != 1:
        return f"{len(refusals)} lines on stderr: {refusals[:3]!r:.400}"
    if any(len(line) > LONGEST_LINE for line in lines):
        return f"a line of {max(map(len, lines))} characters"
    if "Traceback" in err:
        return "a traceback"
    return ""


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_any_value_of_any_option_is_accepted_or_refused_in_one_line(verb, stubs):
    code, err = outcome(verb.program, list(verb.words))
    # resume and report need a run, which takes a study to make.
    assert code in ("reached", 0) or verb.words[-1] == "run", (code, err)
    faults = []
    for what, words in inputs(verb):
        wrong = fault(*outcome(verb.program, words))
        if wrong:
            faults.append(f"{what}: {wrong}")
    assert not faults, "\n".join(faults)


def test_every_verb_is_tried_and_how_many_inputs_there_are(capsys):
    for program in MAINS:
        tried = {
            verb.words[0] if not verb.words[0].startswith("-") else "" for verb in VERBS if verb.program == program
        }
        assert tried == set(parsers(program))
    count = sum(1 for verb in VERBS for _ in inputs(verb))
    with capsys.disabled():
        print(f"\n{count} inputs: {len(VALUES)} values for every option of {len(VERBS)} verbs")
    assert count >= 4000


@pytest.mark.parametrize(
    ("code", "err"),
    [
        ("KeyError: 'x'", ""),
        (3, "a command that measured\n"),
        (2, ""),
        (2, "x: one line\nx: another\n"),
        (2, "x: warning: a line\n"),
        (2, "x" * (LONGEST_LINE + 1)),
        (0, "Traceback (most recent call last):\n"),
    ],
)
def test_what_is_wrong_with_an_outcome_is_found(code, err):
    assert fault(code, err)
    assert not fault(2, "x: warning: a line\nx: 'y' must be a number\n") and not fault("reached", "")
