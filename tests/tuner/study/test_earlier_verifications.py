"""What another study proved on the same held-out prompts: when it stands, when it does not, and what it costs."""

import json

import numpy as np
import pytest

from stagevar.errors import UsageError
from tests.fakes.studies import FULL_TOKENS, study, tokens
from tuner.config.quality import quality_limits
from tuner.config.space import steps_key
from tuner.evaluation.store import quality_context
from tuner.report.next_steps import next_steps
from tuner.results.candidate import Finalist
from tuner.results.result import StudyResult
from tuner.results.run_dir import CONFIG_FILE
from tuner.statistics.bounds import drop_bounds
from tuner.statistics.looks import TURN_SHARE, judgement_alpha
from tuner.study.earlier_verifications import read_earlier_study
from tuner.study.options import FULL_TRIALS, SearchShortcuts

PROMPTS = {"prompts": {"source": "nano", "search": 24, "heldout": 320, "micro_batch": 16}}
LIMIT = 0.1


def lost(steps):
    return 0.01 * (tokens(steps) < FULL_TOKENS)


def made(run_dir, earlier=None, space=PROMPTS, drop=lost, **options):
    """A study of the fake that may start from another one, as --from has it."""
    proposals = {}
    if earlier is not None:
        result = StudyResult.load(earlier)
        keys = dict.fromkeys([*result.picks.values(), *result.front])
        found = [result.candidate(key).schedule for key in keys if key != result.baseline.key]
        proposals = {f"from-{number}": schedule for number, schedule in enumerate(found, 1)}
    options = {"trials": 8, "max_drop": LIMIT, "one_by_one": True, **options}
    space = {**space, "proposals": proposals}
    one = study(run_dir, {"drop": drop}, space, **options)
    if earlier is not None:
        found, _ = taken(one, earlier)
        one = study(run_dir, {"drop": drop}, space, earlier_study=found, **options)
    drawn, whole = [], one.evaluator.quality
    one.evaluator.quality = lambda s, split, b: (drawn.extend([split] * len(s)), whole(s, split, b))[1]
    return one, drawn


def taken(one, earlier, **context):
    known = {**quality_context(one.facts, one.space, "heldout"), **context}
    return read_earlier_study(earlier, known, one.prompts["heldout"], one.metrics, one.space.floors)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A verified study at 50 %."""
    folder = tmp_path_factory.mktemp("first") / "run"
    one, _ = made(folder, budget="50%")
    result = one.run()
    assert result.verdict == "verified"
    return folder, result


def test_at_a_larger_budget_the_earlier_proof_stands_and_no_held_out_image_is_drawn(first, tmp_path):
    folder, before = first
    one, drawn = made(tmp_path / "b", folder, budget="70%")
    result = one.run()
    assert result.verdict == "verified" and result.pick.key == before.pick.key and "heldout" not in drawn
    check, theirs = result.pick.verification, before.pick.verification
    assert check.proved_by == str(folder) and check.prompts == theirs.prompts
    assert check.values["geneval_nano"] == theirs.values["geneval_nano"]
    assert check.latency.samples_ms != theirs.latency.samples_ms, "timed anew"
    assert {v.name: v.limit for v in check.verdicts}["latency"] == pytest.approx(result.budget_ms)
    assert StudyResult.load(tmp_path / "b") == result
    assert any(f"by the study in {folder}" in line for line in next_steps(result, tmp_path / "b", ["x"]).lines)
    # A third study that starts from the second one names who proved it.
    third, _ = made(tmp_path / "c", tmp_path / "b", budget="80%")
    assert third.run().pick.verification.proved_by == str(folder)


def test_at_a_smaller_budget_new_finalists_are_judged_with_an_error_of_their_own(first, tmp_path):
    folder, before = first
    one, drawn = made(tmp_path / "b", folder, budget="36%", trials=14)
    result = one.run()
    check = result.pick.verification
    assert result.pick.key not in {c.key for c in before.candidates if isinstance(c, Finalist)}
    assert result.verdict == "verified" and check.proved_by is None and check.error_share == pytest.approx(TURN_SHARE)
    assert drawn.count("heldout") * 16 == check.prompts, "the full schedule's images are known"
    own = np.subtract(
        check.values["geneval_nano"], result.baseline.verification.values["geneval_nano"][: check.prompts]
    )
    [verdict] = [v for v in check.verdicts if v.name == "drop:geneval_nano"]
    alphas = [alpha * check.error_share for alpha in (0.005, 0.035, 0.04)]
    assert any(verdict.bound == pytest.approx(drop_bounds(own[None], 1.0, alpha)[0][0]) for alpha in alphas)


def test_what_was_judged_there_without_a_proof_is_judged_once_more_not_for_the_first_time(first, tmp_path):
    """The limit is tighter than what the first study proved, so that it counts as a second judgment of that schedule."""
    folder, before = first
    tight = before.pick.verification.drop_upper - 0.001
    one, _ = made(tmp_path / "b", folder, budget="50%", max_drop=tight)
    found, line = taken(one, folder)
    assert not found.proved and before.pick.key in found.checks and "none of its schedules is proved" in line
    result = one.run()
    finalists = [c for c in result.candidates if isinstance(c, Finalist)]
    assert before.pick.key in {c.key for c in finalists} and found.judgments == 1
    for candidate in (c for c in finalists if c.verification.prompts == 320):
        check = candidate.verification
        own = np.subtract(check.values["geneval_nano"], result.baseline.verification.values["geneval_nano"])
        [verdict] = [v for v in check.verdicts if v.name == "drop:geneval_nano"]
        bound = drop_bounds(own[None], 1.0, judgement_alpha(1) * check.error_share)[0][0]
        assert verdict.bound == pytest.approx(bound)


def test_all_together_the_proved_ones_take_part(first, tmp_path):
    folder, before = first
    one, drawn = made(tmp_path / "b", folder, budget="70%", one_by_one=False)
    result = one.run()
    known = result.candidate(before.pick.key).verification
    assert known.status == "verified" and known.proved_by == str(folder) and "heldout" in drawn
    others = [c for c in result.candidates if isinstance(c, Finalist) and c.key != before.pick.key]
    assert any(c.verification.prompts for c in others) and all(c.verification.error_share is None for c in others)


def test_the_composite_counts_in_allowances_of_this_study(first, tmp_path):
    folder, before = first
    one, _ = made(tmp_path / "b", folder, max_drop=2 * LIMIT)
    found, _ = taken(one, folder)
    [theirs], [mine] = quality_limits(one.space.quality, LIMIT), one.metrics
    assert mine.max_drop == 2 * theirs.max_drop
    for key, check in found.checks.items():
        judged = before.baseline if key == "baseline" else before.candidate(key)
        per_prompt = np.asarray(judged.verification.values["geneval_nano"])
        assert check.values["quality"] == pytest.approx(per_prompt / mine.max_drop)
    assert {v.limit for check in found.proved.values() for v in check.verdicts} == {mine.max_drop}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"code": "other"}, "another code"),
        ({"torch": "2.0", "engine": "graph"}, "another engine and torch"),
        ({"new": 1}, "another new"),
    ],
)
def test_other_circumstances_are_named_and_nothing_is_reused(first, tmp_path, change, why):
    folder, _ = first
    found, line = taken(made(tmp_path / "b")[0], folder, **change)
    assert not found.checks and not found.proved and line == f"held-out results of {folder} are not reused: {why}"


def test_other_prompts_fewer_prompts_and_older_runs_are_named(first, tmp_path):
    folder, _ = first
    for space, why in (
        ({**PROMPTS["prompts"], "heldout": 256}, "320 prompts were held out there, 256 here"),
        ({**PROMPTS["prompts"], "source": "imagenet"}, "other held-out prompts"),
        ({**PROMPTS["prompts"], "micro_batch": 8}, "other held-out prompts"),
    ):
        one, _ = made(tmp_path / "b", space={"prompts": space})
        assert taken(one, folder)[1].endswith(f"not reused: {why}")
    config = json.loads((folder / CONFIG_FILE).read_text())
    kept = config.pop("quality_context")
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert "an older version wrote them" in taken(made(tmp_path / "b")[0], folder)[1]
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "quality_context": kept}))
    assert taken(made(tmp_path / "b")[0], tmp_path / "b")[1] == "", "no study there"


def test_killed_after_its_claim_a_quick_study_judges_nobody_else(first, tmp_path):
    """What is on disk says that one was verified; those behind it are not judged because the driver died before it ended."""
    one, _ = made(tmp_path / "b", budget="60%")
    before = one.run()
    (tmp_path / "b" / "study.json").unlink()
    again, drawn = made(tmp_path / "b", budget="60%")
    result = again.run()
    assert result.picks == before.picks and not drawn and result.judged_on == before.judged_on
    assert [c.key for c in result.candidates if isinstance(c, Finalist)] == [
        c.key for c in before.candidates if isinstance(c, Finalist)
    ]


def test_a_floor_is_proved_where_its_bound_keeps_it(tmp_path):
    floors = {**PROMPTS, "constraints": {"floors": {"geneval_nano": 0.5}}}
    made(tmp_path / "a", space=floors)[0].run()
    for floor, proved in ((0.5, True), (0.4, True), (0.75, False)):
        space = {**PROMPTS, "constraints": {"floors": {"geneval_nano": floor}}}
        found, _ = taken(made(tmp_path / "b", space=space)[0], tmp_path / "a")
        assert bool(found.proved) == proved and found.checks
        assert all(v.limit == floor for c in found.proved.values() for v in c.verdicts if v.name.startswith("floor"))


def test_a_run_that_other_code_went_on_with_proves_nothing_to_others(tmp_path, monkeypatch):
    made(tmp_path / "a")[0].run()
    one, _ = made(tmp_path / "b")
    assert taken(one, tmp_path / "a")[0].proved
    monkeypatch.setattr("tuner.evaluation.store.code_digest", lambda: "other")
    assert "another code" in taken(one, tmp_path / "a")[1]
    shown = made(tmp_path / "a")[0].run()
    with pytest.raises(UsageError, match="another study"):
        made(tmp_path / "a", budget="40%")[0].run()
    monkeypatch.undo()
    assert taken(one, tmp_path / "a")[0].proved, "neither judged anything"
    monkeypatch.setattr("tuner.evaluation.store.code_digest", lambda: "other")
    judged = made(tmp_path / "a", trials=30)[0].run()
    assert len(judged.judged_on) > len(shown.judged_on)
    assert "another code" in taken(one, tmp_path / "a")[1]
    monkeypatch.undo()
    assert "another code" in taken(one, tmp_path / "a")[1]


def test_what_is_proved_within_the_budget_is_enough_for_few_trials(first, tmp_path):
    """Everything else loses half of the images, so that without the proof the search would go on to 30 schedules."""
    folder, before = first
    pick = before.pick.key

    def drop(steps):
        return 0.0 if tokens(steps) == FULL_TOKENS or steps_key(steps) == pick else 0.5

    few = {"shortcuts": SearchShortcuts(overlap=False, sensitivity=True, few=True), "budget": "70%"}
    one, _ = made(tmp_path / "b", folder, drop=drop, **few)
    assert len(one.run().candidates) == 8
    alone, _ = made(tmp_path / "c", drop=drop, **few)
    assert len(alone.run().candidates) == FULL_TRIALS
