"""The command line: every bad input is one line and exit 2; a whole study on nano; verbs; Ctrl-C."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from stagevar.errors import UsageError
from stagevar.models.registry import load_model
from stagevar.profile import Profile
from tests.fakes.studies import SPACE
from tuner import tune
from tuner.cli import main
from tuner.cli.command import verb_parser
from tuner.cli.plan import plan
from tuner.cli.tune import Interrupts
from tuner.results.candidate import Interval, Verdict, verification_of
from tuner.results.result import StudyResult
from tuner.study.finalist_times import latency_stats
from tuner.study.verify_profile import Recheck, regression_verdict

GOOD = ["--model", "nano", "--budget", "60%"]
#: A limit that a handful of held-out prompts can prove.
LOOSE = [*GOOD, "--max-drop", "1"]
#: A study of seconds on the shipped model.
QUICK = ["--model", "nano", "--budget", "97%", "--trials", "4", "--prompts", "8", "--heldout", "16", "--max-drop", "1"]


@pytest.fixture
def small_space(tmp_path):
    """nano's space with the cheapest metric and small micro-batches."""
    space = {**SPACE, "model": "nano", "prompts": {"source": "nano", "search": 8, "heldout": 16, "micro_batch": 8}}
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    return path


def bad(argv, capsys):
    """Runs a command that must fail as usage; returns its one line."""
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1 and "Traceback" not in captured.err, captured.err
    assert lines[0].startswith("stagevar-tune: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--budget"),
        (["--model", "nano"], "--budget"),
        (["--budget", "60%"], "--model"),
        (["--model", "nano", "--budget", "60"], "write 2s, 800ms or 60%"),
        (["--model", "nano", "--budget", "-1s"], "budget"),
        (["--model", "nano", "--latency-budget", "0%"], "budget '0%'"),
        (["--model", "nanu", "--budget", "60%"], "did you mean nano"),
        (["--model", "infinity-8b", "--budget", "2s", "--resolution", "2M"], "infinity-8b has no resolution '2M'"),
        ([*GOOD, "--tirals", "3"], "did you mean --trials?"),
        (["--model", "nano", "--budgt", "60%"], "unknown option '--budgt', did you mean --budget?"),
        (["--model", "nano", "--budgt=60%"], "unknown option '--budgt=60%', did you mean --budget?"),
        ([*GOOD, "--latency", "60%"], "did you mean --latency-budget?"),
        (["--model", "nano", "--compare", "exact"], "required: --budget"),
        (["--model", "nano", "--budgt", "60%", "--trials", "many"], "'many'"),
        (["doctor", "--budget", "2s"], "unknown option '--budget' (see"),
        (["sweep", "sweep.yaml", "--dry-run"], "unknown option '--dry-run' (see"),
        ([*GOOD, "--trials", "0"], "'0'"),
        ([*GOOD, "--trials", "many"], "'many'"),
        ([*GOOD, "--seed", "x"], "--seed"),
        ([*GOOD, "--time-budget", "soon"], "write 90s, 10m or 1h30m"),
        ([*GOOD, "--max-drop", "5"], "can: at most 1; write a share, such as 0.02 for 2 %"),
        ([*GOOD, "--prompts", "0"], "prompts '0'"),
        ([*GOOD, "--prompts", "absent.txt"], "neither a number nor a file"),
        ([*GOOD, "--space", "absent.yaml"], "cannot be read"),
        ([*GOOD, "--executor", "kubernetes"], "kubernetes"),
        (["tune", *GOOD], "unknown verb 'tune'"),
        (["resume", "absent"], "holds no run"),
        (["report", "absent"], "cannot be read"),
        (["verify", "absent.yaml"], "cannot be read"),
        (["verify"], "profile"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, says, capsys):
    assert says in bad(argv, capsys)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda space: space["parameters"].update(rank_ratio=[0]), "rank_ratio 0"),
        (lambda space: space["parameters"].update(cfg_delay=[99]), "cfg_delay reaches 99"),
        (lambda space: space["parameters"].update(structure_end={"low": 2, "high": 40}), "structure_end reaches 40"),
        (lambda space: space.update(parametres={}), "did you mean parameters"),
    ],
)
def test_bad_search_spaces_are_one_line_and_exit_2(change, says, small_space, tmp_path, capsys):
    space = yaml.safe_load(small_space.read_text())
    change(space)
    small_space.write_text(yaml.safe_dump(space))
    assert says in bad([*LOOSE, "--space", small_space, "--out", tmp_path / "run", "--quiet"], capsys)


def test_an_unwritable_output_is_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in bad([*GOOD, "--out", tmp_path / "file"], capsys)
    assert "cannot be written" in bad([*GOOD, "--out", tmp_path / "file" / "below"], capsys)


def test_a_folder_of_other_things_is_not_a_run(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert "holds no run" in bad([*GOOD, "--out", tmp_path], capsys)
    assert "holds no run" in bad([*GOOD, "--out", tmp_path, "--fresh"], capsys)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    "text", ["", "a: [", "!!python/object/apply:os.system ['true']", "schema: other/1", "x: &a 1\ny: *a"]
)
def test_hostile_profiles_are_one_line_and_exit_2(tmp_path, text, capsys):
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    bad(["verify", path], capsys)


def test_a_dry_run_measures_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*GOOD, "--out", str(out), "--dry-run", "--json", "--trials", "7"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schedules"] == 7 and data["run_directory"] == str(out) and not out.exists()
    assert main([*GOOD, "--dry-run"]) == 0
    assert "nothing was loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--heldout", "8", "--max-drop", "0.05"], "cannot be proved on 8 held-out prompts"),
        (["--heldout", "8"], "it takes 128"),
        (["--heldout", "1", "--max-drop", "1"], "on 1 held-out prompt (they prove nothing; it takes 16)"),
        (["--max-drop", "0.1%"], "cannot be proved on 1536 held-out prompts"),
        (["--max-drop", "clip_score=0.001"], "clip_score drop of at most 0.001 CLIP points"),
        (["--max-drop", "1e-9"], "no number of prompts would do"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_limits_that_the_heldout_prompts_cannot_prove_are_refused_before_anything_runs(
    options, says, dry, tmp_path, capsys
):
    out = tmp_path / "run"
    line = bad([*GOOD, *options, *dry, "--out", str(out)], capsys)
    assert says in line and "raise --heldout" in line and not out.exists()


def test_a_file_that_leaves_one_prompt_to_verify_on_is_refused(tmp_path, capsys):
    path = tmp_path / "nine.txt"
    path.write_text("".join(f"a photo of {n} rings\n" for n in range(9)))
    space = {**SPACE, "model": "nano", "prompts": {"source": str(path), "search": 8, "heldout": 8, "micro_batch": 8}}
    space["objectives"] = {"latency": "ms", "quality": {"ssim": 1.0}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    line = bad([*GOOD, "--space", str(tmp_path / "space.yaml"), "--max-drop", "1"], capsys)
    assert "on 5 held-out prompts (" in line
    assert main([*GOOD, "--space", str(tmp_path / "space.yaml"), "--weights", "random", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--seed", "1"], "seed was 0 and is 1;"),
        (["--budget", "70%"], "budget was 60% and is 70%;"),
        (["--budget", "70%", "--fresh"], ""),
        ([], ""),
    ],
)
def test_a_folder_of_a_study_with_another_seed_or_budget_is_refused_before_anything_loads(
    tmp_path, asked, says, capsys
):
    (tmp_path / "config.json").write_text(json.dumps({"identity": {"seed": 0, "budget": "60%"}}))
    (tmp_path / "trials.jsonl").touch()
    code = main(["--model", "nano", "--budget", "60%", "--out", str(tmp_path), "--dry-run", *asked])
    assert code == (2 if says else 0) and says in capsys.readouterr().err


@pytest.mark.parametrize(("effort", "proves"), [("full", 0.0125), ("quick", 0.01336)])
def test_a_dry_run_says_what_the_heldout_prompts_can_prove(effort, proves, capsys):
    """In a quick study the first finalist has four fifths of the error."""
    words = ["--dry-run", "--json", "--max-drop", "3%", "--heldout", "256", "--effort", effort]
    assert main([*GOOD, *words]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {"model", "engine", "prompts", "limits", "space"} <= data.keys()
    assert data["prompts"]["heldout"] == 256
    limit = data["limits"][0]
    assert (limit["metric"], limit["unit"], limit["max_drop"]) == ("geneval_nano", "share of prompts", 0.03)
    assert limit["provable_drop"] == pytest.approx(proves, abs=1e-4)
    assert 0.03 < limit["provable_drop_discordant"] < 0.04 and limit["prompts_needed_discordant"] > 256
    assert main([*GOOD, "--dry-run", "--weights", "random"]) == 0
    assert "random weights have no quality" in capsys.readouterr().out


def test_how_threads_wait_is_settled_before_the_plan_loads_torch(monkeypatch):
    policies = []

    def stop(*_):
        policies.append(os.environ.get("OMP_WAIT_POLICY"))
        raise UsageError("enough")

    monkeypatch.setattr("tuner.cli.tune.plan", stop)
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_WAIT_POLICY", "")
        monkeypatch.delenv("OMP_WAIT_POLICY")
        assert main(["--model", "nano", "--budget", "75%", "--threads", threads]) == 2
    assert policies == ["PASSIVE", None]


def test_the_command_reproduces_without_what_only_concerns_the_screen():
    from tuner.cli.tune import build_parser

    argv = [*GOOD, "--fresh", "--quiet", "--seed", "3"]
    assert plan(build_parser().parse(argv), argv).command == "stagevar-tune --model nano --budget 60% --seed 3"


def test_a_study_on_nano_ends_with_a_profile_that_loads_and_verifies(tmp_path, small_space, capsys, monkeypatch):
    monkeypatch.setattr("tuner.study.finalist_times.ROUNDS", (5, 10))  # what they decide is not looked at here
    monkeypatch.setattr("tuner.study.study.BASELINE_ROUNDS", 5)
    out = tmp_path / "run"
    argv = [*QUICK, "--space", str(small_space), "--out", str(out)]
    code = main(argv)
    captured = capsys.readouterr()
    result = StudyResult.load(out)
    assert code == result.exit_code
    assert [
        name for name in ("load", "baseline", "search", "verification", "report") if name not in result.phases_s
    ] == []
    for name in ("pareto.yaml", "trials.csv", "trials.jsonl", "report.html", "study.json"):
        assert (out / name).stat().st_size > 0, name
    assert "seconds" in captured.out and str(out / "report.html") in captured.out
    assert "search: " in captured.err

    # The same command shows the result of the finished run; so does resume.
    before = (out / "trials.jsonl").read_bytes()
    assert main([*argv, "--json", "--quiet"]) == code
    again = json.loads(capsys.readouterr().out)
    assert again["verdict"] == result.verdict and again["schedules"] == 4
    assert (out / "trials.jsonl").read_bytes() == before
    same_from_python(argv, result)
    near = verification_of(result.candidate(result.nearest[0])) if result.nearest else None
    if near is None or not near.times_open:  # else resume times the finalists anew
        assert main(["resume", str(out), "--quiet"]) == code
        assert (out / "trials.jsonl").read_bytes() == before
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").exists()
    capsys.readouterr()

    whole = (out / "study.json").read_bytes()
    (out / "study.json").write_bytes(whole[:300])
    assert f"{out / 'study.json'} is damaged (not JSON: " in bad(["report", str(out)], capsys)
    assert main(argv) == code, "the evidence is whole"
    assert "study.json is damaged; writing it again from the evidence" in capsys.readouterr().err
    assert StudyResult.load(out).picks == result.picks

    assert "seed was 0 and is 1" in bad([*argv, "--seed", "1", "--quiet"], capsys)
    assert (out / "trials.jsonl").read_bytes() == before
    if "pick" in result.picks:
        profile = Profile.load(out / "profile.yaml")
        assert profile.reproduce == result.command and profile.envelope.engine == "eager"
        assert main(["verify", str(out / "profile.yaml"), "--max-regression", "100%", "--quiet"]) in (0, 3, 5)
        assert "regression" in capsys.readouterr().out


def same_from_python(argv, result):
    """The run that a shell made, as `tuner.tune` gives it for the same options."""
    options = dict(zip([word.removeprefix("--").replace("-", "_") for word in argv[::2]], argv[1::2], strict=True))
    tuned = tune(**options, progress=False)
    assert tuned.study == result and tuned.run_dir == Path(options["out"])
    assert len(tuned.trials) == 4 + 1 and tuned.trials["source"].iloc[0].endswith("full schedule")
    assert (tuned.trials["latency_ms"] > 0).all() and tuned.trials["metric.geneval_nano"].between(-1, 1).iloc[1:].all()
    model = load_model("nano", device="cpu")
    assert tuned.pareto and all(len(profile.expand(model)) == len(model.grids) for profile in tuned.pareto)
    shown_ms = [profile.latency.median_ms for profile in tuned.pareto]
    assert shown_ms == sorted(shown_ms)
    assert tuned.report.stat().st_size > 0
    if tuned.profile is None:
        assert not (tuned.run_dir / "profile.yaml").exists() and not tuned.verified
    else:
        assert tuned.profile == Profile.load(tuned.run_dir / "profile.yaml")


def test_ctrl_c_once_asks_twice_stops():
    said = []
    with Interrupts(said.append) as interrupts:
        assert not interrupts()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts() and len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("now_ms", "status", "code"), [(60.0, "met", 0), (61.0, "met", 0), (70.0, "broken", 3)])
def test_a_regression_is_judged_by_the_ratio_to_the_full_schedule(now_ms, status, code):
    drift = [1.0, 1.3, 0.9, 1.1] * 5
    verification = _Verification(latency_stats([now_ms * d for d in drift], [100 * d for d in drift], 100.0))
    verdict = regression_verdict(0.60, verification, 0.03)
    assert verdict.status == status
    recheck = Recheck((verdict,), verification, ("outside the measured envelope",), "graph")
    assert recheck.lines[1].endswith("ms, graph engine") and recheck.to_dict()["engine"] == "graph"
    assert recheck.exit_code == code
    word = {"met": "kept", "broken": "BROKEN"}[status]
    figures = f"{now_ms / 100:g} of the full schedule's time (bound {now_ms / 100:g}, limit 0.618)"
    assert recheck.lines[-1] == f"{word}: no regression beyond the allowed one: {figures}"
    assert json.dumps(recheck.to_dict())


class _Verification:
    def __init__(self, latency):
        self.latency, self.differences = latency, {"quality": Interval(0.0, -0.01, 0.01, 64)}


def test_doctor_reports_this_machine(tmp_path, capsys):
    code = main(["doctor", "--out", str(tmp_path), "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == (1 if any(f["state"] == "fail" for f in findings) else 0)
    texts = " | ".join(f["text"] for f in findings)
    assert all(word in texts for word in ("Python", "torch", "timing spread", "search space nano", "nano loads"))


def test_engines_and_caches_on_offer_are_those_that_exist():
    """The command line names them itself, so that --help imports no torch."""
    from stagevar.engine import ENGINES
    from stagevar.tensors.cache import KV_CACHES
    from tuner.cli.tune import build_parser

    offered = {action.dest: action.choices for action in build_parser()._actions}
    assert offered["engine"] == ("auto", *ENGINES) and offered["kv_cache"] == KV_CACHES


def test_verify_says_in_words_what_was_kept():
    verdicts = [
        Verdict("latency", 80.0, "ms", 60.0, 61.0, "met"),
        Verdict("gain", 0.98, "ratio", 0.6, 0.61, "met"),
        Verdict("drop:geneval", 0.02, "share of prompts", 0.01, 0.03, "open"),
        Verdict("floor:clip_score", 20.0, "clip_score", 25.0, 24.0, "met"),
    ]
    verification = _Verification(latency_stats([60.0] * 9, [100.0] * 9, 100.0))
    assert Recheck(tuple(verdicts), verification, ()).lines[1:] == [
        "kept: latency within the budget: 60 ms (bound 61, limit 80)",
        "kept: faster than the full schedule: 0.6 of its time (bound 0.61, limit 0.98)",
        "undecided: allowed drop of geneval: 0.01 share of prompts (bound 0.03, limit 0.02)",
        "kept: floor of clip_score: 25 (bound 24, limit 20)",
    ]


def test_the_help_of_verify_names_the_profiles_values():
    shown = " ".join(verb_parser("verify").format_help().split())
    assert "continues a run" not in shown and "(default: 0)" not in shown and "the space's" not in shown
    assert "of prompts and noise (default: the profile's)" in shown
    assert verb_parser("verify").parse(["profile.yaml"]).seed is None
