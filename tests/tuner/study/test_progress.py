"""Progress: a log gets few lines and none twice, a terminal a bar, quiet nothing."""

import io

import pytest

from tests.fakes.studies import study
from tuner.study.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines_of(stream):
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_as_a_phase_starts_and_one_per_tenth():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.phase("search", 200)
    for done in range(201):
        progress.update(done, f"{done} of 200 schedules, best so far 1.72x")
    progress.close()
    lines = lines_of(stream)
    assert lines[0].startswith("search: proposing schedules") and lines[-1].startswith("search: 0.")
    assert lines[1:-1] == [f"search {10 * n} %: {20 * n} of 200 schedules, best so far 1.72x" for n in range(1, 11)]


def test_one_text_for_a_whole_phase_is_no_line_twice():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.phase("verification", 100)
    for rounds in (15, 30, 60):
        progress.update(0.0, f"timing 6 finalists, {rounds} rounds")
    for step in range(2000):
        progress.update(100 * step / 2000, "verifying 6 finalists on held-out prompts")
    progress.close()
    lines = lines_of(stream)
    assert len(lines) == len(set(lines)) == 2 + 9
    assert lines[1] == "verification 10 %: verifying 6 finalists on held-out prompts"


@pytest.mark.parametrize("total", [1, 3, 30, 448])
def test_never_more_than_one_line_per_tenth_whatever_the_units(total):
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.phase("baseline", total)
    for done in range(total + 3):
        for _ in range(4):
            progress.update(done, "full schedule")
    progress.close()
    said = lines_of(stream)[1:-1]
    assert len(said) == len(set(said)) == min(10, total) and said[-1] == "baseline 100 %: full schedule"


def test_a_phase_that_goes_on_from_where_it_stood_says_where():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.phase("search", 30)
    progress.update(20, "20 of 30 schedules")
    progress.update(10, "less than before")
    progress.close()
    assert lines_of(stream)[1:-1] == ["search 67 %: 20 of 30 schedules"]


def test_a_remark_in_a_row_is_said_once_and_another_again():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for line in ("worker lost", "worker lost", "worker joined", "worker lost"):
        progress.say(line)
    assert lines_of(stream) == ["worker lost", "worker joined", "worker lost"]


def test_a_terminal_keeps_its_bar():
    stream = Terminal()
    progress = Progress(stream=stream)
    progress.phase("search", 3)
    progress.update(1, "1 of 3 schedules, best so far 1.31x")
    progress._bar.refresh()
    shown = stream.getvalue()
    progress.close()
    assert "1 of 3 schedules, best so far 1.31x" in shown and "━" in shown and "1/3" in shown
    assert "proposing schedules" not in stream.getvalue() and "33 %" not in stream.getvalue()


def test_seconds_and_parts_are_booked_and_said_also_when_quiet():
    stream = io.StringIO()
    for quiet in (False, True):
        progress = Progress(quiet, stream)
        progress.phase("search", 3)
        with progress.part("asking"):
            progress.update(1, "1 of 3")
        progress.close()
        assert set(progress.seconds) == {"search"} and set(progress.parts) == {"search: asking"}
    lines = lines_of(stream)
    assert len(lines) == 3 and "(asking 0." in lines[-1]


def test_a_whole_study_says_each_line_once(tmp_path):
    stream = io.StringIO()
    work = study(tmp_path, {"drop": lambda steps: 0.0}, trials=12)
    work.progress = Progress(stream=stream)
    work.run()
    work.progress.close()
    lines = lines_of(stream)
    assert len(lines) == len(set(lines)), lines
    for phase in ("baseline", "search", "verification", "images"):
        starts = [line for line in lines if line.startswith((f"{phase}: ", f"{phase} "))]
        assert len(starts) <= 2 + 10 and any("best so far" in line for line in lines)
