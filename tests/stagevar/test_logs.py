"""Messages: one console, one file per run, nothing printed by libraries."""

import ast
import io
import logging
import re
import warnings

import pytest

from stagevar import console, logs
from stagevar.cli.command import build_parser
from tests import ROOT
from tests.house_figures import PACKAGES, python_files
from tests.repository.test_house import CONTRACTS
from tuner.cli.command import VERBS, verb_parser
from tuner.evalkit import command as eval_cli
from tuner.results.run_dir import LOG_FILE
from tuner.study.progress import Progress

#: Rooms whose business is to write to a console.
CLI_ROOMS = ("stagevar/cli/", "tuner/cli/", "tuner/evalkit/", CONTRACTS)
#: Modules beside them that may: the console itself, a study's progress on it, and the server's log.
CONSOLES = ("stagevar/console.py", "tuner/study/progress.py", "stagevar/serving/server.py")


def library_files():
    files = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in python_files(*PACKAGES)}
    return {name: tree for name, tree in files.items() if not name.startswith((*CLI_ROOMS, *CONSOLES))}


def calls(tree):
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_libraries_never_print_and_never_touch_the_standard_streams():
    files = library_files()
    assert len(files) > 100
    assert [name for name, tree in files.items() if "print" in calls(tree)] == []
    streams = {"sys.stdout", "sys.stderr"}
    users = [
        name for name, tree in files.items() for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in streams
    ]  # fmt: skip
    assert users == []
    assert "print" not in calls(ast.parse((ROOT / "stagevar/serving/server.py").read_text()))


def test_libraries_configure_neither_logging_nor_warnings():
    """A filter is set only inside catch_warnings, but for a library's own category; handlers are added in stagevar.logs."""
    for name, tree in library_files().items():
        if name in ("stagevar/logs.py", "stagevar/__init__.py", "tuner/__init__.py"):
            continue
        done = [
            ast.unparse(node.func) for node in ast.walk(tree)
            if isinstance(node, ast.Call) and "category=optuna." not in ast.unparse(node)
        ]  # fmt: skip
        assert not [call for call in done if re.search(r"basicConfig|addHandler|captureWarnings", call)], name
        guarded = [
            inner for node in ast.walk(tree) if isinstance(node, ast.With) and "catch_warnings" in ast.unparse(node.items[0])
            for inner in calls(node)
        ]  # fmt: skip
        for call in ("warnings.simplefilter", "warnings.filterwarnings"):
            assert done.count(call) == guarded.count(call), f"{name}: {call} outside catch_warnings"
        assert not [
            node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "showwarning"
        ], name


def test_loggers_are_named_after_their_modules():
    for name, tree in library_files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger" and node.args:
                given = ast.unparse(node.args[0])
                assert given in ("__name__", "name") or given.startswith(("'stagevar", "'uvicorn")), (name, given)


def test_both_packages_are_silent_until_somebody_listens():
    for package in PACKAGES:
        assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger(package).handlers)


def every_verb():
    stagevar = next(action for action in build_parser()._actions if action.dest == "verb").choices
    evaluation = next(action for action in eval_cli.build_parser()._actions if action.dest == "verb").choices
    return [*stagevar.values(), *evaluation.values(), *map(verb_parser, VERBS)]


def test_every_verb_takes_v_and_q():
    parsers = every_verb()
    assert len(parsers) >= 18
    for parser in parsers:
        options = {option for action in parser._actions for option in action.option_strings}
        assert {"-v", "--verbose", "-q", "--quiet"} <= options, parser.prog


@pytest.mark.parametrize(
    ("verbose", "quiet", "shown"),
    [
        (0, False, "p: warning: careful\np: error: bad\n"),
        (1, False, "p: it happens\np: warning: careful\np: error: bad\n"),
        (2, False, "p: a detail\np: it happens\np: warning: careful\np: error: bad\n"),
        (0, True, "p: error: bad\n"),
    ],
)
def test_the_console_shows_what_v_and_q_say(capsys, verbose, quiet, shown):
    log = logging.getLogger("tuner.somewhere")

    def run():
        console.set_verbosity(verbose, quiet)
        log.debug("a detail")
        log.info("it happens")
        log.info("seen elsewhere", extra={"shown": True})
        log.warning("careful")
        log.error("bad")
        return 0

    assert console.report_errors("p", run) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", shown)
    log.warning("after the command nobody listens")
    assert capsys.readouterr().err == ""


def test_the_file_of_a_run_is_appended_and_holds_times_levels_versions_and_warnings(tmp_path):
    path, log = tmp_path / LOG_FILE, logging.getLogger("stagevar.somewhere")
    for part in ("first", "second"):
        with pytest.warns(UserWarning, match="too"), logs.log_file(path, f"tune {part}", {"torch": "9.9"}):
            log.info("the %s part", part)
            log.debug("too fine for the file")
            warnings.warn("too\nwarm", stacklevel=1)
    log.warning("nobody writes this down")
    lines = path.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    assert all(re.match(stamp + r"(INFO|WARNING) +(stagevar|tuner)\.", line) for line in lines)
    texts = [line.split(": ", 1)[1] for line in lines]
    assert [text for text in texts if "Linux" not in text and "Darwin" not in text] == [
        "tune first", "torch 9.9", "the first part", "too warm", "tune second", "torch 9.9", "the second part", "too warm",
    ]  # fmt: skip


@pytest.fixture
def root_lines():
    """Lines of a handler on the root logger, as a library leaves one there by `logging.basicConfig`."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    yield lambda: stream.getvalue().splitlines()
    logging.getLogger().removeHandler(handler)


def test_a_root_handler_gets_no_more_than_before_while_a_run_is_written(tmp_path, root_lines):
    log = logging.getLogger("tuner.study.progress")
    with logs.log_file(tmp_path / LOG_FILE, "command", {}):
        log.info("search 50 %")
        log.warning("a warning")
    log.warning("later")
    assert root_lines() == ["a warning", "later"]
    assert "search 50 %" in (tmp_path / LOG_FILE).read_text()


def test_a_command_is_its_own_console(tmp_path, root_lines, capsys):
    def run():
        with logs.log_file(tmp_path / LOG_FILE, "command", {}):
            logging.getLogger("tuner.study.progress").info("search 50 %")
            logging.getLogger("stagevar.models").warning("a warning")
        return 0

    assert console.report_errors("stagevar-tune", run) == 0
    assert root_lines() == [] and capsys.readouterr().err.splitlines() == ["stagevar-tune: warning: a warning"]
    assert logging.getLogger("stagevar").propagate and logging.getLogger("tuner").propagate


def test_the_file_says_what_ended_the_run(tmp_path):
    with pytest.raises(RuntimeError), logs.log_file(tmp_path / LOG_FILE, "tune", {}):
        raise RuntimeError("the disk\nis full")
    assert (
        (tmp_path / LOG_FILE)
        .read_text()
        .splitlines()[-1]
        .endswith("ERROR   stagevar.logs: ended by RuntimeError: the disk is full")
    )


def test_progress_is_in_the_file_when_quiet_and_when_a_bar_shows_it(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name, progress in {"quiet": Progress(True), "bar": Progress(False, Terminal())}.items():
        with logs.log_file(tmp_path / name, "tune", {}):
            progress.phase("search", 10)
            for done in range(1, 11):
                progress.update(done, f"{done} schedules")
                progress.update(done, f"{done} schedules")
            progress.close()
        text = (tmp_path / name).read_text()
        assert text.count("search 50 %: 5 schedules") == 1 and "search: proposing schedules" in text


def test_no_color_is_respected(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = {}
    for no_color in ("", "1"):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("NO_COLOR", no_color)
        terminal = Terminal()
        progress = Progress(False, terminal)
        progress.phase("search", 4)
        progress.update(2, "half")
        progress.close()
        shown[no_color] = re.findall(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", terminal.getvalue())
    assert shown[""] and not shown["1"]


def test_what_a_worker_logs_is_passed_on_under_its_name(caplog):
    kept = logs.Kept()
    log = logging.getLogger("tuner.evaluation.somewhere")
    with logs.listening(kept):
        log.info("the reference images are drawn")
        log.debug("not this")
    with caplog.at_level(logging.INFO, "tuner"):
        logs.pass_on(kept.take(), "worker 3")
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("tuner.evaluation.somewhere", "INFO", "worker 3: the reference images are drawn")
    ]
    assert kept.take() == ()
