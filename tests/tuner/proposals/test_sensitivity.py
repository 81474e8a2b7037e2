"""Single changes and their sums: what a schedule is made of, which changes are measured, what is predicted, how it agrees."""

import dataclasses

import numpy as np
import pytest

from stagevar.schedule import LowRank, StageSchedule, exact, preset
from stagevar.schedule.grids import square
from tuner.config.space import draws, load_space
from tuner.proposals.sensitivity import (
    FewerTokens,
    GuidanceEnds,
    LeftOut,
    Precision,
    Predicted,
    SumModel,
    agreement,
    alone,
    changes_of,
    changes_to_measure,
)

GRIDS = square((1, 2, 3, 4, 6, 8))
FULL = exact(6).expand(GRIDS, 1)


def expand(*args, **options):
    return StageSchedule(*args, **options).expand(GRIDS, 1)


def rows(share, scale=5):
    kept = round(share * 64)
    return FewerTokens(scale, LowRank((kept,), "rows", "index", "trunk"), 64)


def test_a_schedule_is_its_changes():
    steps = expand(3, cfg_delay=1, branch="cond", skip=(3,), rank_ratios=(0.5, 0.25), projection="rows", site="trunk")
    leave, ends, *fewer = changes_of(steps)
    assert leave == LeftOut(3) and ends == GuidanceEnds(4, "cond")
    assert [change.scale for change in fewer] == [4, 5]
    assert changes_of(FULL) == ()


def test_guidance_that_would_end_at_a_scale_left_out_ends_at_the_next():
    assert GuidanceEnds(4, "cond") in changes_of(expand(3, cfg_delay=0, branch="cond", skip=(3,)))


@pytest.mark.parametrize(
    "steps",
    [
        expand(3, cfg_delay=0, branch="uncond"),
        expand(3, cfg_delay=0, branch="cond", fuse_layer=2),
        expand(5, rank_ratios=(0.3,)),
        expand(4, rank_ratios=(0.3,), rank_delay=1, accelerator="fastvar", layers=(0, 2)),
        expand(5, skip=(4,)),
        tuple(dataclasses.replace(s, precision="int8" if s.scale == 5 else "model") for s in FULL),
    ],
)
def test_one_change_alone_is_that_schedule(steps):
    [change] = changes_of(steps)
    assert alone(change, FULL) == steps


def test_a_decision_per_image_has_no_sum():
    steps = preset("skipvar", GRIDS).expand(GRIDS, 1)
    with pytest.raises(ValueError, match="decides per image"):
        changes_of(steps)
    assert changes_to_measure([steps]) == []


def test_every_schedule_of_a_space_can_be_predicted_from_two_amounts_per_kind():
    drawn = list(draws(load_space("nano"), square((1, 2, 3, 4, 6, 8, 11, 16)), 3, seed=0, at_most=300))
    changes = changes_to_measure(drawn)
    assert len(changes) == len(set(changes)) < sum(len(set(changes_of(s))) for s in drawn) / 4
    kinds = [c.kind for c in changes if isinstance(c, FewerTokens)]
    assert max(kinds.count(kind) for kind in kinds) == 2
    model = SumModel({change: np.zeros(4) for change in changes})
    assert all(model.predict(steps) is not None for steps in drawn)
    assert [c.scale for c in changes] == sorted((c.scale for c in changes), reverse=True)


def test_sums_are_paired_per_prompt():
    """Two changes that harm the same prompt are less certain together than two that harm different ones."""
    ends, leaves = GuidanceEnds(4, "cond"), LeftOut(3)
    steps = expand(3, cfg_delay=1, branch="cond", skip=(3,))
    same = SumModel({ends: [-1, 0, 0, 0], leaves: [-1, 0, 0, 0]}).predict(steps)
    apart = SumModel({ends: [-1, 0, 0, 0], leaves: [0, -1, 0, 0]}).predict(steps)
    assert same.mean == apart.mean == -0.5
    assert same.standard_error == pytest.approx(np.std([-2, 0, 0, 0], ddof=1) / 2)
    assert same.standard_error > apart.standard_error


def test_amounts_between_those_measured_are_interpolated():
    model = SumModel({rows(0.25): [-0.4, -0.2], rows(0.5): [-0.1, -0.1]})

    def mean(share):
        return model.predict((*FULL[:5], dataclasses.replace(FULL[5], reduction=rows(share).reduction))).mean

    assert mean(0.25) == pytest.approx(-0.3) and mean(0.5) == pytest.approx(-0.1)
    assert mean(0.375) == pytest.approx(-0.2), "halfway between the two"
    assert mean(0.75) == pytest.approx(-0.05), "all tokens cost nothing"
    assert mean(0.125) == pytest.approx(-0.3), "below the smallest amount nothing is known"


def test_what_was_not_measured_is_not_predicted():
    model = SumModel({LeftOut(4): [0.0, 0.0]})
    assert model.predict(expand(5, skip=(4,))) == Predicted(0.0, 0.0)
    assert model.predict(expand(5, skip=(3,))) is None
    assert model.predict(tuple(dataclasses.replace(s, precision="int8") for s in FULL)) is None
    assert Precision(5, "int8") in changes_of(tuple(dataclasses.replace(s, precision="int8") for s in FULL))
    with pytest.raises(ValueError, match="same prompts"):
        SumModel({LeftOut(4): [0.0], LeftOut(3): [0.0, 0.0]})


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
