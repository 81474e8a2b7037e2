"""A study that is judged again: on more prompts, with new timings; it goes on, and all of it errs in 5 % at most."""

import dataclasses
import json
import shlex

import numpy as np
import pytest

from stagevar.errors import UsageError
from tests.fakes.studies import FULL_TOKENS, FakeEvaluator, study, tokens
from tuner import cli
from tuner.cli import tune
from tuner.cli.plan import with_prompts
from tuner.config.prompts import load_prompts
from tuner.config.quality import quality_limits
from tuner.config.space import PromptSource
from tuner.metrics.quality_spec import QualitySpec
from tuner.report.next_steps import next_steps
from tuner.results.candidate import Finalist
from tuner.results.result import StudyResult
from tuner.statistics.bounds import continuous_drop_bounds, drop_bounds, median_interval
from tuner.statistics.looks import claims, judgement_alpha
from tuner.statistics.provable import prompts_to_decide
from tuner.study.verdict import Heldout, prompts_advice

YES_NO = quality_limits({"geneval_nano": QualitySpec(max_drop=0.05)})[0]
POINTS = quality_limits({"clip_score": QualitySpec(max_drop=0.3)})[0]
#: Images that change at random on every eighth prompt: 72 prompts do not prove that 12 % at most are lost.
RESTLESS = {"drop": lambda steps: 0.0, "discordance": 0.125, "seed": 3}
LIMIT = 0.12


def space(heldout, micro_batch=16):
    return {"prompts": {"source": "nano", "search": 24, "heldout": heldout, "micro_batch": micro_batch}}


# ------------------------------------------------------------------------------------------------ the error of it all


def share_of_false_claims(error, studies=800):
    """Studies of a schedule that loses a hair more than is allowed and that go on, while undecided, up to eight times."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(studies):
        drops_N = np.empty(0)
        for extensions, count in enumerate((64, 96, 128, 192, 256, 384, 512, 768, 1024)):
            drops_N = np.append(drops_N, rng.normal(0.3, 1, count - drops_N.size))
            upper, _ = continuous_drop_bounds(-drops_N[None], 0.0, error(count, extensions))
            if upper[0] < 0.3:
                wrong += 1
                break
    return wrong / studies


def test_going_on_until_it_is_verified_errs_in_one_study_of_twenty_at_most():
    most = 0.05 + 3 * (0.05 * 0.95 / 800) ** 0.5
    assert share_of_false_claims(lambda count, k: claims(count, 16, k)[count]) <= most
    assert share_of_false_claims(lambda count, k: claims(count, 16, 0)[count]) > most, "what the halving prevents"


@pytest.mark.parametrize("tail", [0.004, 0.0008, 0.00004])
def test_medians_are_bounded_at_errors_that_resampling_cannot_tell(tail):
    rng, studies = np.random.default_rng(1), 4000
    missed = sum(median_interval(rng.exponential(1, 21), 1 - 2 * tail).high < np.log(2) for _ in range(studies))
    assert missed / studies <= tail + 3 * (tail / studies) ** 0.5 + 1 / studies


# ------------------------------------------------------------------------------------------------ how many would do


@pytest.mark.parametrize("mean", [0.0, 0.02])
def test_the_number_that_is_named_decides_four_times_of_five(mean):
    rng = np.random.default_rng(2)

    def drops(count):
        return (rng.random(count) < mean + 0.03).astype(float) - (rng.random(count) < 0.03)

    first = drops(64)
    first += mean - first.mean()  # an estimate that is right, as the promise supposes
    bound = drop_bounds(-first[None], 1.0, 0.04)[0][0]
    needed = prompts_to_decide(YES_NO, first, bound, (0.04, 0.005), 16)
    assert needed % 16 == 0 and needed > 64
    met = [drop_bounds(-drops(needed)[None], 1.0, 0.005)[0][0] <= 0.05 for _ in range(40)]
    assert np.mean(met) >= 0.65, needed
    fewer = [drop_bounds(-drops(needed // 2)[None], 1.0, 0.005)[0][0] <= 0.05 for _ in range(40)]
    assert np.mean(fewer) < np.mean(met)


def test_an_estimate_beyond_the_limit_is_to_be_refuted_and_one_on_it_never_decides():
    rng = np.random.default_rng(3)
    drops_N = rng.normal(0, 1, 256)
    for mean, decided in ((0.34, True), (0.26, True), (0.3, False)):
        sample = drops_N - drops_N.mean() + mean
        needed = prompts_to_decide(POINTS, sample, mean + 0.2, (0.04, 0.005), 16)
        assert (needed is not None) == decided


# ------------------------------------------------------------------------------------------------ studies that go on


@pytest.mark.parametrize("source", ["nano", "imagenet", "file"])
def test_a_larger_held_out_set_begins_with_the_smaller_one(source, tmp_path):
    if source == "file":
        source = tmp_path / "p.txt"
        source.write_text("".join(f"a photo of {n} rings\n" for n in range(600)))
    small, large = (load_prompts(PromptSource(str(source), 40, count, 8), seed=4) for count in (100, 313))
    assert small["search"].digest == large["search"].digest
    assert small["heldout"].digest == large["heldout"].first(100).digest != large["heldout"].digest


def test_prompts_of_geneval_are_added_to_those_that_were_there():
    small = load_prompts(PromptSource("geneval", 64, 448, 16))
    for added in ((152,), (152, 600)):
        large = load_prompts(PromptSource("geneval", 64, 448 + sum(added), 16, added))
        assert small["search"].digest == large["search"].digest
        assert small["heldout"].digest == large["heldout"].first(448).digest and len(large["heldout"]) == 448 + sum(
            added
        )
        texts = [*large["search"].texts, *large["heldout"].texts]
        assert len(set(texts)) == len(texts)


def test_a_study_goes_on_with_more_prompts_and_measures_none_twice(tmp_path):
    restless = {**RESTLESS, "seed": 2}
    first = study(tmp_path, restless, space(72), trials=4, max_drop=LIMIT).run()
    assert (first.verdict, first.judged_on) == ("inconclusive", (72,))
    needed = int(first.settle_heldout)
    assert f"about {needed} prompts should be enough" in first.reason
    work = study(tmp_path, restless, space(needed), trials=4, max_drop=LIMIT)
    walked = []
    whole = work.evaluator.quality
    work.evaluator.quality = lambda steps, split, batch: (walked.append((split, batch)), whole(steps, split, batch))[1]
    second = work.run()
    assert (second.verdict, second.judged_on) == ("verified", (72, needed))
    assert [c.key for c in second.candidates] == [c.key for c in first.candidates]
    # The last micro-batch of the first part held 8 prompts only, so it is measured again, in full.
    assert {split for split, _ in walked} == {"heldout"} and min(batch for _, batch in walked) == 4

    fresh = FakeEvaluator(load_prompts(work.space.prompts), **restless)
    [metric], full = second.limits, work.ledger.full
    for candidate in (c for c in second.candidates if isinstance(c, Finalist) and c.verification.prompts == needed):
        steps = work.ledger.steps[candidate.key]
        parts = [fresh.quality([steps, full], "heldout", b) for b in range(work.prompts["heldout"].batches)]
        own, base = (np.concatenate([part[i]["geneval_nano"] for part in parts]) for i in (0, 1))
        assert candidate.verification.values["geneval_nano"] == tuple(own)
        [verdict] = [v for v in candidate.verification.verdicts if v.name == metric.name]
        alone = drop_bounds((own - base)[None], 1.0, judgement_alpha(1))[0][0]
        assert verdict.bound >= alone > drop_bounds((own - base)[None], 1.0, judgement_alpha(0))[0][0]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["judged_on"] == [72, needed]
    assert StudyResult.load(tmp_path) == second


def test_what_was_verified_stays_so_when_a_run_is_judged_again(tmp_path):
    """More trials bring other finalists; the claims that were made are made, and not made anew at a smaller error."""
    calm = {"drop": lambda steps: 0.0, "discordance": 0.03}
    first = study(tmp_path, calm, space(256), trials=4).run()
    assert first.verdict == "verified"
    second = study(tmp_path, calm, space(256), trials=12).run()
    assert second.verdict == "verified" and second.judged_on in ((256,), (256, 256))
    for before in first.candidates:
        if isinstance(before, Finalist) and before.verification.status == "verified":
            assert second.candidate(before.key).verification == before.verification


def test_a_run_without_a_judgement_pays_for_none(tmp_path):
    asked = iter([False, False, *[True] * 50])
    partial = study(tmp_path, RESTLESS, space(64), trials=8, stop=lambda: next(asked)).run()
    assert partial.verdict == "partial" and partial.judged_on == ()
    assert study(tmp_path, RESTLESS, space(72), trials=8).run().judged_on == (72,)


def test_a_run_of_before_that_kept_no_account_was_judged_once(tmp_path):
    work = study(tmp_path, {**RESTLESS, "discordance": 0.03}, space(72), trials=3)
    work.run()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["judged_on"]
    path.write_text(json.dumps(config))
    again = study(tmp_path, RESTLESS, space(144), trials=3)
    assert again.check_identity() and again.judged_on == [72]
    assert json.loads(path.read_text())["judged_on"] == [72]


def test_ctrl_c_during_verification_is_no_verdict(tmp_path):
    work = study(tmp_path, RESTLESS, space(320), trials=6, max_drop=0.06)
    whole, begun = work.evaluator.quality, []
    work.evaluator.quality = lambda s, split, b: (begun.append(1) if split == "heldout" else 0, whole(s, split, b))[1]
    work.stop = lambda: bool(begun)
    stopped = work.run()
    assert (stopped.verdict, stopped.exit_code, stopped.judged_on) == ("partial", 130, ())
    assert "during verification" in stopped.reason
    assert study(tmp_path, RESTLESS, space(320), trials=6, max_drop=0.06).run().judged_on == (320,)


def test_other_prompts_and_fewer_are_another_study(tmp_path):
    study(tmp_path, RESTLESS, space(72), trials=3, max_drop=LIMIT).run()
    for change in (space(64), {"prompts": {"source": "imagenet", "search": 24, "heldout": 128, "micro_batch": 16}}):
        with pytest.raises(UsageError, match="another study"):
            study(tmp_path, RESTLESS, change, trials=3, max_drop=LIMIT).run()
    with pytest.raises(UsageError, match="max_drop"):
        study(tmp_path, RESTLESS, space(144), trials=3, max_drop=0.3).run()
    assert json.loads((tmp_path / "config.json").read_text())["identity"]["space"]["prompts"]["heldout"] == 72


def test_more_prompts_of_geneval_are_asked_for_as_an_addition(tmp_path):
    """COCO has 80 single objects; where they run out, the order of all depends on their number."""
    prompts = {"source": "geneval", "search": 24, "heldout": 72, "micro_batch": 16}
    study(tmp_path, RESTLESS, {"prompts": prompts}).check_identity()
    more = study(tmp_path, RESTLESS, {"prompts": {**prompts, "heldout": 672}})
    with pytest.raises(UsageError, match=r"write --heldout 72\+600 to add to them"):
        more.check_identity()
    more.space = with_prompts(more.space, None, (72, 600))
    more.prompts = load_prompts(more.space.prompts)
    assert more.check_identity() and more.check_identity()
    heldout = Heldout(more.space.prompts, 672, 8, judgements=1, available=lambda count: count)
    assert prompts_advice(1000, heldout)[1] == "72+600+328"


def test_a_file_without_enough_prompts_is_named(tmp_path):
    path = tmp_path / "few.jsonl"
    lines = load_prompts(PromptSource("geneval", 8, 96, 8))
    rows = [json.dumps(item) for part in lines.values() for item in part.items]
    path.write_text("\n".join(rows) + "\n")
    prompts = {"source": str(path), "search": 24, "heldout": 72, "micro_batch": 16}
    result = study(tmp_path / "run", {**RESTLESS, "seed": 2}, {"prompts": prompts}, trials=3, max_drop=LIMIT).run()
    assert result.settle_heldout is None and "few.jsonl leaves only 80: add prompts and start over" in result.reason
    told = next_steps(result, tmp_path / "run", ["stagevar-tune"])
    assert told.commands == () and any("add prompts" in line for line in told.lines)


# ------------------------------------------------------------------------------------------------ on the command line


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs stagevar-tune on a fake; returns exit code and printed lines."""
    from tests.fakes.studies import SPACE
    from tuner.config.limits import Budget
    from tuner.study.options import SearchShortcuts
    from tuner.study.study import Options, Study

    (tmp_path / "space.json").write_text(json.dumps({**SPACE, "model": "nano", **space(72)}))
    monkeypatch.chdir(tmp_path)

    def run(words, **fake):
        def build(checked, progress, stop):
            args, prompts = checked.args, load_prompts(checked.space.prompts, checked.args.seed)
            assert isinstance(args.budget, Budget)
            options = Options(args.budget, args.max_drop, args.trials, seed=args.seed, command=checked.command)
            options = dataclasses.replace(options, sampler="random", shortcuts=SearchShortcuts(overlap=False))
            evaluator = FakeEvaluator(prompts, **{**RESTLESS, **fake})
            return Study(checked.run_dir, checked.space, options, evaluator, prompts, None, progress, stop)

        monkeypatch.setattr(tune, "build_study", build)
        code = cli.main([*words, "--quiet"])
        return code, capsys.readouterr().out.splitlines()

    return run


WORDS = ["--model=nano", "--budget", "60%", "--trials", "4", "--space", "space.json", "--max-drop", "12%"]


def pasted(lines, nth=0):
    """The words of a printed command, as a shell would take them apart."""
    return shlex.split([line for line in lines if line.startswith("  stagevar-tune ")][nth])[1:]


def test_the_command_that_is_printed_settles_the_study(command, tmp_path):
    code, lines = command([*WORDS, "--heldout", "72", "--out", "a run"])
    assert code == 5
    assert any(line.startswith("not decided: on 72 held-out prompts the drop of geneval_nano") for line in lines)
    code, lines = command(pasted(lines))
    result = StudyResult.load(tmp_path / "a run")
    assert code == 0 and result.judged_on == (72, len(result.heldout_prompts)), result.reason
    assert not (tmp_path / "outputs").exists()
    assert any("judged 2 times" in line for line in lines)
    # From then on that is the run: resume shows it, the command of before is told what differs.
    assert command(["resume", "a run"])[0] == 0
    assert StudyResult.load(tmp_path / "a run").judged_on == result.judged_on
    assert command([*WORDS, "--heldout", "72", "--out", "a run"])[0] == 2


def test_timings_that_did_not_decide_are_measured_again(command, tmp_path):
    fast = {"discordance": 0.0, "ratio": lambda steps: 1.0 if tokens(steps) == FULL_TOKENS else 0.595}
    code, lines = command([*WORDS, "--out", "run"], **fast, noise=0.5)
    result = StudyResult.load(tmp_path / "run")
    assert code == 5 and result.candidate(result.nearest[0]).verification.times_open
    assert "measure again on a quieter machine" in result.reason and "--heldout" not in result.reason
    words = pasted(lines)
    assert words == ["resume", "run"]
    assert command([*WORDS, "--out", "run"], **fast, noise=0.001)[0] == 5, "the command itself shows what was found"
    code, _ = command(words, **fast, noise=0.001)
    again = StudyResult.load(tmp_path / "run")
    assert code == 0 and again.judged_on == (72, 72), again.reason
    assert command(words, **fast, noise=0.5)[0] == 0, "a settled study is shown, not measured again"
