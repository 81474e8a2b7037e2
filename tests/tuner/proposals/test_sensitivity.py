"""Lasting changes: what a schedule is made of, which are measured, what is predicted, how it agrees."""

import dataclasses
import json

import numpy as np
import pytest

from stagevar.schedule import LowRank, Pivotal, StageSchedule, exact, preset
from stagevar.schedule.grids import square
from tuner.config.space import draws
from tuner.config.space_file import load_space
from tuner.proposals.sensitivity import (
    FewerTokens,
    GuidanceEnds,
    LeftOut,
    Precision,
    Predicted,
    Sensitivities,
    agreement,
    alone,
    changes_of,
    changes_to_measure,
    noise_ceiling,
)

GRIDS = square((1, 2, 3, 4, 6, 8))
FULL = exact(6).expand(GRIDS, 1)
ROWS = LowRank((0,), "rows", "index", "trunk")


def expand(*args, **options):
    return StageSchedule(*args, **options).expand(GRIDS, 1)


def reduced(start, *ratios, **options):
    return expand(start, rank_ratios=ratios, projection="rows", rope="index", site="trunk", **options)


def table(**rows):
    return Sensitivities(["m"], {change: [row] for change, row in rows.values()})


def test_a_schedule_is_its_changes():
    left_out, ends, *fewer = changes_of(reduced(3, 0.5, 0.25, cfg_delay=1, branch="cond", skip=(3,)))
    assert left_out == LeftOut((3,)) and ends == GuidanceEnds(4, "cond")
    assert [change.scale for change in fewer] == [4, 5]
    assert [change.kind for change in fewer] == [ROWS, ROWS]
    assert fewer[1].share == pytest.approx(17 / 64), "the second entry repeats: scale 3 is left out"
    assert changes_of(FULL) == ()


def test_guidance_that_would_end_at_a_scale_left_out_ends_at_the_next():
    assert GuidanceEnds(4, "cond") in changes_of(expand(3, cfg_delay=0, branch="cond", skip=(3,)))


@pytest.mark.parametrize(
    "steps",
    [
        expand(3, cfg_delay=0, branch="uncond"),
        expand(3, cfg_delay=0, branch="cond", fuse_layer=2),
        expand(4, rank_ratios=(0.3,)),
        expand(4, rank_ratios=(0.3,), rank_delay=1, accelerator="fastvar", layers=(0, 2)),
        expand(4, skip=(3, 5)),
        tuple(dataclasses.replace(s, precision="int8" if s.scale >= 4 else "model") for s in FULL),
    ],
)
def test_one_change_alone_is_that_schedule(steps):
    changes = changes_of(steps)
    first = changes[0]
    if isinstance(first, FewerTokens):
        first = dataclasses.replace(first, share=0.3)
    assert alone(first, FULL) == steps


def test_a_decision_per_image_has_no_prediction():
    steps = preset("skipvar", GRIDS).expand(GRIDS, 1)
    with pytest.raises(ValueError, match="decides per image"):
        changes_of(steps)
    assert changes_to_measure([steps]) == [] and Sensitivities(["m"], {}).predict(steps) is None


def test_every_schedule_of_a_space_is_predicted_from_a_few_dozen_changes():
    grids = square((1, 2, 3, 4, 6, 8, 11, 16))
    drawn = list(draws(load_space("nano"), grids, 3, seed=0, at_most=300))
    changes = changes_to_measure(drawn)
    assert len(changes) == len(set(changes)) < 40
    rows = Sensitivities(["m"], {change: np.zeros((1, 4)) for change in changes})
    assert all(rows.predict(steps) is not None for steps in drawn)
    first = [change.scales[0] if isinstance(change, LeftOut) else change.scale for change in changes]
    assert first == sorted(first, reverse=True)
    assert len(changes_to_measure(drawn, every_kind=True)) > 2 * len(changes)


def test_a_share_that_lasts_is_its_own_row_and_others_are_telescoped():
    rows = table(
        early=(FewerTokens(4, ROWS, 0.5), [-0.8]),
        late=(FewerTokens(5, ROWS, 0.5), [-0.2]),
        early_few=(FewerTokens(4, ROWS, 0.25), [-1.0]),
        late_few=(FewerTokens(5, ROWS, 0.25), [-0.6]),
    )

    def mean(*shares):
        steps = list(FULL)
        for scale, share in zip((4, 5), shares, strict=True):
            if share < 1:
                kept = LowRank((round(share * FULL[scale].tokens),), "rows", "index", "trunk")
                steps[scale] = dataclasses.replace(FULL[scale], reduction=kept)
        return rows.predict(tuple(steps))["m"].mean

    assert mean(0.5, 0.5) == pytest.approx(-0.8)
    assert mean(1, 0.5) == pytest.approx(-0.2)
    assert mean(0.5, 1) == pytest.approx(-0.6), "what the last scale's tokens cost is taken off"
    assert mean(0.5, 0.25) == pytest.approx(-0.8 + 0.2 - 0.6)
    assert mean(1, 0.375) == pytest.approx(-0.4), "halfway between two shares"
    assert mean(1, 0.75) == pytest.approx(-0.1), "all tokens cost nothing"
    assert mean(1, 0.125) == pytest.approx(-0.6), "below the smallest share nothing is known"


def test_of_the_kinds_of_change_the_worst_counts_prompt_by_prompt():
    """Two changes that break the same image break it once; two that break different ones break both."""
    ends, left_out = GuidanceEnds(4, "cond"), LeftOut((3,))
    steps = expand(3, cfg_delay=1, branch="cond", skip=(3,))
    same = Sensitivities(["m"], {ends: [[-1, 0, 0, 0]], left_out: [[-1, 0, 0, 0]]}).predict(steps)["m"]
    apart = Sensitivities(["m"], {ends: [[-1, 0, 0, 0]], left_out: [[0, -1, 0, 0]]}).predict(steps)["m"]
    assert (same.mean, apart.mean) == (-0.25, -0.5)
    assert same.standard_error == pytest.approx(np.std([-1, 0, 0, 0], ddof=1) / 2)


def test_metrics_are_predicted_together():
    ends = GuidanceEnds(4, "cond")
    found = Sensitivities(["a", "b"], {ends: [[-1, 0], [-4, -2]]}).predict(expand(4, cfg_delay=0, branch="cond"))
    assert (found["a"].mean, found["b"].mean) == (-0.5, -3)


def test_another_kind_of_an_accelerator_and_a_fused_end_stand_for_what_was_not_measured():
    rows = table(tokens=(FewerTokens(5, ROWS, 0.5), [-0.2]), ends=(GuidanceEnds(4, "cond"), [-0.3]))
    assert rows.predict(expand(5, rank_ratios=(0.49,)))["m"].mean == pytest.approx(-0.2)
    assert rows.predict(expand(4, cfg_delay=0, branch="cond", fuse_layer=2))["m"].mean == -0.3
    assert rows.predict(expand(5, rank_ratios=(0.5,), accelerator="fastvar", layers=(0, 2))) is None


def test_what_was_not_measured_is_not_predicted():
    rows = Sensitivities(["m"], {LeftOut((4,)): [[0.0, 0.0]]})
    assert rows.predict(expand(5, skip=(4,))) == {"m": Predicted(0.0, 0.0)}
    assert rows.predict(expand(5, skip=(3,))) is None
    assert rows.predict(expand(5, skip=(3, 4))) is None
    int8 = tuple(dataclasses.replace(s, precision="int8") for s in FULL)
    assert rows.predict(int8) is None and changes_of(int8) == (Precision(0, "int8"),)
    with pytest.raises(ValueError, match="same metrics and prompts"):
        Sensitivities(["m"], {LeftOut((4,)): [[0.0]], LeftOut((3,)): [[0.0, 0.0]]})


def test_a_table_comes_back_from_plain_data():
    rows = Sensitivities(
        ["a", "b"],
        {
            GuidanceEnds(4, "cond"): [[-1, 0], [0.5, 1 / 3]],
            FewerTokens(5, ROWS, 0.525): [[0, 0], [0, 0]],
            FewerTokens(5, Pivotal(0, (0, 2), 0), 0.05): [[0, 0], [0, 0]],
            LeftOut((3, 5)): [[0, 0], [0, 0]],
            Precision(3, "int8"): [[0, 0], [0, 0]],
        },
    )
    back = Sensitivities.from_data(json.loads(json.dumps(rows.to_data())))
    assert back.metrics == rows.metrics and list(back.rows) == list(rows.rows)
    assert all(np.array_equal(back.rows[change], row) for change, row in rows.rows.items())
    for wrong in ({}, {"metrics": ["a"], "changes": [{"change": "other"}]}, {"metrics": 1, "changes": 2}):
        with pytest.raises(ValueError, match="not a table of sensitivities"):
            Sensitivities.from_data(wrong)


def test_agreement_knows_order_bias_and_coverage():
    rng = np.random.default_rng(0)
    truth = np.linspace(-0.3, 0, 40)
    measured = [t + rng.normal(0, 0.1, 50) for t in truth]
    right = agreement([Predicted(t, 0.0) for t in truth], measured)
    assert right.rank_correlation > 0.95 and right.coverage >= 0.85 and abs(right.bias) < 0.01 and right.count == 40
    wrong = agreement([Predicted(-t, 0.0) for t in truth], measured)
    assert wrong.rank_correlation < -0.95 and wrong.coverage < 0.3
    flat = agreement([Predicted(0.0, 0.0)] * 2, [[0.0, 0.0], [0.0, 0.0]])
    assert flat.rank_correlation is None and flat.coverage == 1
    with pytest.raises(ValueError, match="two schedules"):
        agreement([Predicted(0, 0)], [[0.0]])


def test_the_ceiling_is_what_the_truth_itself_would_reach():
    rng = np.random.default_rng(1)
    truth = np.linspace(-0.3, 0, 400)
    measured = truth[:, None] + rng.normal(0, 0.5, (400, 64))
    reached = agreement([Predicted(t, 0.0) for t in truth], list(measured)).rank_correlation
    assert noise_ceiling(measured) == pytest.approx(reached, abs=0.07) and reached < 0.9
    assert noise_ceiling(np.repeat(truth[:, None], 8, axis=1)) == pytest.approx(1)
    assert noise_ceiling([[0.0, 0.0]] * 3) is None
