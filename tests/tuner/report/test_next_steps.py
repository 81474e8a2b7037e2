"""The last lines of a study: what was proved, where it is, what to do next; every command can be pasted."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from tests.fakes.studies import FULL_TOKENS, study, tokens
from tuner.cli.command import VERBS, verb_parser
from tuner.cli.tune import build_parser
from tuner.report.next_steps import next_steps
from tuner.results.candidate import Finalist, Interval, Measured
from tuner.results.result import EXIT_CODES

RUN = Path("outputs/my run")
WORDS = shlex.split("stagevar-tune --model nano --budget=60% --max-drop 3% --out 'outputs/old place' --seed 2")
BIG = {"prompts": {"source": "nano", "search": 16, "heldout": 256, "micro_batch": 16}}
HARMLESS = {"drop": lambda steps: 0.0}


def told(result, words=WORDS):
    """Text and commands, each command taken apart as a shell and then the program would do it."""
    found = next_steps(result, RUN, words)
    for command in found.commands:
        assert f"  {command}" in found.lines
        program, *rest = shlex.split(command)
        if program == "stagevar":
            assert rest[0] == "generate"
        elif rest[0] in VERBS:
            verb_parser(rest[0]).parse(rest[1:])
        else:
            build_parser().parse(rest)
    return "\n".join(found.lines), [shlex.split(command) for command in found.commands]


def option(command, name):
    return command[command.index(name) + 1]


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    return study(tmp_path_factory.mktemp("v"), HARMLESS, BIG, trials=5).run()


def test_a_verified_study_says_what_was_proved_and_how_to_draw(verified):
    text, (draw, check) = told(verified)
    pick = verified.pick
    gain, drop = (next(v for v in pick.verification.verdicts if v.name == n) for n in ("gain", "drop:geneval_nano"))
    first = text.splitlines()[0]
    assert first.startswith("proved: on 256 prompts that the search never saw, images come out at least ")
    shown = float(first.partition("at least ")[2].partition("x as fast")[0])
    assert 1 / gain.bound - 0.01 < shown <= 1 / gain.bound
    lost = float(first.partition("at most ")[2].partition(" % fewer of them are right (geneval_nano)")[0])
    assert 100 * drop.bound <= lost < 100 * drop.bound + 0.1
    assert "files: 'outputs/my run/profile.yaml' is the schedule to deploy" in text and "report.html" in text
    assert draw == [
        "stagevar",
        "generate",
        "--profile",
        f"{RUN}/profile.yaml",
        verified.search_prompts[0],
        "-o",
        "image.png",
    ]
    assert check == ["stagevar-tune", "verify", f"{RUN}/profile.yaml", "--max-regression", "3%"]


def test_finalists_that_were_left_are_counted_with_the_command_that_judges_them(tmp_path):
    result = study(tmp_path, HARMLESS, BIG, trials=5, one_by_one=True).run()
    left = [c for c in result.candidates if isinstance(c, Finalist) and c.verification.passed_over]
    text, (_, _, on) = told(result)
    assert len(left) > 1 and f"next: search on, and judge the {len(left)} finalists that were left, too" in text
    assert on[-2:] == ["--effort", "full"] and not any(c.verification.prompts for c in left)


def test_a_prompt_with_quotes_survives_the_shell(verified):
    odd = dataclasses.replace(verified, search_prompts=('it\'s a "cat" & $HOME',))
    assert told(odd)[1][0][4] == 'it\'s a "cat" & $HOME'


def test_several_judgements_are_owned_up_to(verified):
    assert "judged" not in told(verified)[0]
    text, _ = told(dataclasses.replace(verified, judged_on=(64, 256)))
    assert "(judged 2 times, on 64 and 256 prompts; all judgments together err in at most 5 % of studies)" in text


def test_other_metrics_go_by_their_units(tmp_path):
    quality = {
        "metrics": [
            {"name": "geneval_nano", "max_drop": 0.05},
            {"name": "clip_score", "max_drop": 0.5},
        ]
    }
    space = {**BIG, "objectives": {"latency": "ms", "quality": quality}}
    result = study(tmp_path, {**HARMLESS, "points": lambda steps: 0.0}, space, trials=4).run()
    text, _ = told(result)
    assert (
        " % fewer of them are right (geneval_nano) and clip_score falls by at most 0.1" in text
        and "CLIP points" in text
    )


def test_a_full_schedule_within_the_budget_needs_nothing(tmp_path):
    result = study(tmp_path, HARMLESS, BIG, trials=4, budget="1s").run()
    assert result.verdict == "baseline_meets_budget"
    text, commands = told(result)
    assert "the full schedule takes" in text and "within 1s; no acceleration is needed" in text
    assert option(commands[-1], "--budget").endswith("ms") and option(commands[-1], "--out") != str(RUN)
    assert float(option(commands[-1], "--budget").removesuffix("ms")) < result.baseline.latency.median_ms


def test_no_schedule_names_the_smallest_budget_and_asks_for_it(tmp_path):
    options = {**HARMLESS, "ratio": lambda steps: 0.8 + 0.2 * tokens(steps) / FULL_TOKENS}
    result = study(tmp_path, options, BIG, trials=4, budget="50%").run()
    assert result.verdict == "infeasible" and result.smallest_budget_ms
    text, [again] = told(result)
    budget = float(option(again, "--budget").removesuffix("%")) / 100
    assert budget * result.baseline.latency.median_ms >= result.smallest_budget_ms and budget < 1
    assert f"{result.smallest_budget_ms:.1f} ms" in text and option(again, "--out") == f"{RUN}-{budget:.0%}".replace(
        "%", "pct"
    )
    assert "--budget=60%" not in again and again.count("--max-drop") == 1
    # Where it is taken at its word, it can be kept.
    assert (
        study(tmp_path / "again", options, BIG, trials=4, budget=option(again, "--budget")).run().verdict == "verified"
    )


def test_no_schedule_that_keeps_the_quality_asks_for_more_time_or_a_little_more_loss(tmp_path):
    result = study(tmp_path, {"drop": lambda s: 0.3 * (tokens(s) < FULL_TOKENS)}, BIG, trials=4, max_drop=0.06).run()
    assert result.verdict == "infeasible" and result.smallest_budget_ms is None
    words = [*WORDS, "--max-drop", "clip_score=0.3"]
    text, [more_time] = told(result, words)
    assert option(more_time, "--budget") == "80%" and more_time.count("--max-drop") == 2
    assert "the nearest one loses" in text and "6 % of prompts allowed" in text
    nearest = result.candidate(result.nearest[0]).becomes(
        Measured, differences={"geneval_nano": Interval(-0.08, -0.135, -0.03, 64)}
    )
    candidates = tuple(nearest if c.key == nearest.key else c for c in result.candidates)
    _, commands = told(dataclasses.replace(result, candidates=candidates), words)
    assert commands[0] == more_time
    drops = [commands[1][i + 1] for i, word in enumerate(commands[1]) if word == "--max-drop"]
    assert drops == ["clip_score=0.3", "geneval_nano=14%"], "the limit of 3 % made way"


def test_undecided_quality_asks_for_more_prompts_of_the_same_run(verified):
    key = verified.picks["pick"]
    open_ = [
        dataclasses.replace(v, status="open", value=0.01, bound=0.06) if v.name.startswith("drop") else v
        for v in verified.pick.verification.verdicts
    ]
    check = dataclasses.replace(verified.pick.verification, verdicts=tuple(open_), status="open")
    candidates = tuple(dataclasses.replace(c, verification=check) if c.key == key else c for c in verified.candidates)
    result = dataclasses.replace(
        verified, verdict="inconclusive", picks={}, candidates=candidates, nearest=(key,), settle_heldout="1152",
        reason="x is too close to its limit; no number of prompts would do",
    )  # fmt: skip
    text, [again] = told(result, [*WORDS, "--heldout=256"])
    assert "not decided: on 256 held-out prompts the drop of geneval_nano is 1 % of prompts and may be 6 %" in text
    assert "profile.yaml" not in text and "1152 held-out prompts; this continues the run" in text
    assert option(again, "--heldout") == "1152" and option(again, "--out") == str(RUN)
    assert [w for w in again if w.startswith("--heldout")] == ["--heldout"] and "--fresh" not in again
    assert [w for w in again if w not in ("--heldout", "1152", str(RUN))] == [
        w for w in WORDS if w != "outputs/old place"
    ]
    text, commands = told(dataclasses.replace(result, settle_heldout=None))
    assert commands == [] and "no number of prompts would do" in text
    hair = tuple(dataclasses.replace(v, bound=0.05004) if v.name.startswith("drop") else v for v in open_)
    candidates = tuple(
        dataclasses.replace(c, verification=dataclasses.replace(check, verdicts=hair)) if c.key == key else c
        for c in verified.candidates
    )
    assert "may be just above 5 % of prompts (5 %" in told(dataclasses.replace(result, candidates=candidates))[0]
    text, _ = told(dataclasses.replace(result, settle_heldout="256+896"))
    assert "decide it on 1152 held-out prompts" in text
    # Where timings did not decide either, prompts are not what is missing.
    late = tuple(dataclasses.replace(v, status="open") for v in open_)
    slow = dataclasses.replace(check, verdicts=late)
    candidates = tuple(dataclasses.replace(c, verification=slow) if c.key == key else c for c in verified.candidates)
    text, [again] = told(dataclasses.replace(result, candidates=candidates))
    assert again == ["stagevar-tune", "resume", str(RUN)] and "on a quiet machine" in text and "one image takes" in text


def test_a_stopped_study_resumes_and_a_failed_one_starts_anew(tmp_path):
    partial = study(tmp_path / "a", HARMLESS, BIG, trials=4, stop=lambda: True).run()
    text, commands = told(partial)
    assert commands == [["stagevar-tune", "resume", str(RUN)]] and "nothing is proved yet" in text
    failed = study(tmp_path / "b", {"broken": lambda steps: True}, BIG, trials=4).run()
    text, (doctor, again) = told(failed)
    assert doctor == ["stagevar-tune", "doctor", "--model", "fake"]
    assert again[-1] == "--fresh" and option(again, "--out") == str(RUN) and "profile.yaml" not in text


def test_random_weights_claim_nothing_about_quality(tmp_path):
    result = study(tmp_path, {"random_weights": True}, BIG, trials=5).run()
    text, [again] = told(result, [*WORDS, "--weights", "random"])
    assert "nothing is known about quality" in text and "proved" not in text
    assert "--weights" not in again and "random" not in again and option(again, "--out") == f"{RUN}-weights"


@pytest.mark.parametrize("verdict", sorted(EXIT_CODES))
def test_every_verdict_has_its_words_also_for_a_run_of_before(verdict, verified):
    result = dataclasses.replace(verified, verdict=verdict, nearest=(), judged_on=())
    found = next_steps(result, RUN, shlex.split(verified.command))
    assert bool(found.lines) == (verdict != "dry_run")
    assert all("\n" not in line for line in found.lines) and json.dumps(dataclasses.asdict(found))


def test_a_bound_below_nothing_is_no_fewer(verified):
    better = tuple(
        dataclasses.replace(v, bound=-0.01) if v.name.startswith("drop") else v
        for v in verified.pick.verification.verdicts
    )
    pick = dataclasses.replace(
        verified.pick,
        verification=dataclasses.replace(
            verified.pick.verification, verdicts=better, differences={"geneval_nano": Interval(0.02, 0.01, 0.03, 256)}
        ),
    )
    candidates = tuple(pick if c.key == pick.key else c for c in verified.candidates)
    assert "no fewer of them are right (geneval_nano)" in told(dataclasses.replace(verified, candidates=candidates))[0]
