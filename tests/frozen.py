"""Files of record: what earlier versions wrote must load, and what this one prints must not change by accident.

`python -m tests.frozen` writes what lies in tests/data/frozen anew; a change there is a change that users see. The run and
the sample are not written anew when they exist: they stand for the runs that users have on disk (`--all` does it).
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

from tests import DATA

FROZEN = DATA / "frozen"
RUN, SAMPLE, HELP = FROZEN / "run", FROZEN / "sample", FROZEN / "help"
#: What the frozen run was started with (tests.fakes.studies.study).
RUN_OPTIONS = {"trials": 8, "max_drop": 0.2, "command": "stagevar-tune --model fake --budget 60% --trials 8"}
#: Files of record of a run. Its lock and its pictures are made anew by whoever resumes it.
RUN_FILES = ("config.json", "trials.jsonl", "study.json", "journal.log")
DERIVED = ("profile.yaml", "pareto.yaml", "trials.csv")
COMMANDS = {
    "stagevar": ("", "generate", "bench", "serve", "memory", "analyze", "refit", "convert"),
    "stagevar-tune": ("", "resume", "report", "verify", "sweep", "doctor"),
    "stagevar-eval": ("", "images", "geneval", "dpg", "answers", "prompts", "pairs", "preference"),
}


def help_text(command: str, verb: str) -> str:
    """What `command verb --help` prints on a terminal of 100 columns."""
    import stagevar.cli.command
    import tuner.cli
    import tuner.evalkit.command

    mains = {"stagevar": stagevar.cli.command, "stagevar-tune": tuner.cli, "stagevar-eval": tuner.evalkit.command}
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        mains[command].main([*verb.split(), "--help"])
    return printed.getvalue()


def help_path(command: str, verb: str) -> Path:
    """Where that text lies."""
    return HELP / f"{' '.join([command, *verb.split()]).replace(' ', '_')}.txt"


def page_text(page: str) -> str:
    """The words of an HTML page, one element's text a line; styles, scripts and pictures are left out."""
    page = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    lines = (" ".join(html.unescape(line).split()) for line in re.sub(r"<[^>]*>", "\n", page).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def write_derived(folder: Path) -> None:
    """Exports the study of a folder again, and the words of its report beside it."""
    from tuner.report.export import JSON_SCHEMA_FILE, export
    from tuner.report.page import write_report
    from tuner.results.result import StudyResult

    result = StudyResult.load(folder)
    export(result, folder)
    report = write_report(result, folder)
    (folder / "report.txt").write_text(page_text(report.read_text(encoding="utf-8")), encoding="utf-8")
    report.unlink()
    (folder / JSON_SCHEMA_FILE).unlink()  # a copy of the published one


def freeze(everything: bool) -> None:
    """Writes the files of record."""
    from tests.fakes.sample_study import make
    from tests.fakes.studies import study

    HELP.mkdir(parents=True, exist_ok=True)
    for command, verbs in COMMANDS.items():
        for verb in verbs:
            help_path(command, verb).write_text(help_text(command, verb), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        if everything or not RUN.exists():
            run_dir = Path(folder) / "run"
            study(run_dir, **RUN_OPTIONS).run()
            RUN.mkdir(parents=True, exist_ok=True)
            for name in RUN_FILES:
                shutil.copy(run_dir / name, RUN / name)
        if everything or not SAMPLE.exists():
            make("full", Path(folder) / "sample")
            SAMPLE.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / "sample" / "study.json", SAMPLE / "study.json")
    write_derived(SAMPLE)


if __name__ == "__main__":
    freeze("--all" in sys.argv[1:])
