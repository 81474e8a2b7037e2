"""Schedules: expansion, equality of what expands alike, presets, refusals."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagevar.errors import ScheduleError, UsageError
from stagevar.models.registry import list_models, published, scale_grids
from stagevar.schedule import BOTH, PROJECTIONS, LowRank, StageSchedule, exact, paper, preset, released, skip_only
from stagevar.schedule.grids import INFINITY_GRIDS, infinity_grids, nearest_ratio, square
from stagevar.schedule.published import INFINITY_SETTINGS
from stagevar.schedule.ranks import published_table, rank, ratios_for_energy

GRIDS, _ = infinity_grids("1M")
NANO = square((1, 2, 3, 4, 6, 8))


def test_paper_preset_is_the_published_setting():
    steps = paper(GRIDS, INFINITY_SETTINGS).expand(GRIDS, 8)
    assert [s.scale for s in steps if s.branches == ("uncond",)] == [10, 11, 12]
    assert [s.scale for s in steps if s.reduction] == [10, 11, 12]
    assert steps[10].reduction == LowRank((27, 219, 337, 401, 410, 317, 252, 306), "gaussian", "first", "chunk")
    assert [s.stage for s in steps] == ["semantic"] * 7 + ["structure"] * 3 + ["fidelity"] * 3
    assert not any(s.skipped for s in steps)
    assert [s.scale for s in released(GRIDS, INFINITY_SETTINGS).expand(GRIDS, 8) if s.skipped] == [11, 12]


@pytest.mark.parametrize("scales", [13, 14])
def test_another_familys_number_of_scales_is_no_setting(scales):
    """Thirteen or fourteen scales alone do not make a model Infinity or STAR."""
    grids = square(tuple(range(1, scales + 1)))
    carried = paper(grids)
    assert carried.energy is None and carried.rank_ratios == (0.177, 0.157, 0.049)
    assert preset("stagevar-paper", grids, published("nano")) == preset("stagevar-paper", grids) == carried
    assert released(grids).skip == (scales - 2, scales - 1)


@pytest.mark.parametrize("model", [model.name for model in list_models()])
def test_presets_follow_the_models_family(model):
    row = published(model)
    if row is None:
        return
    grids = scale_grids(model)
    setting = preset("stagevar-paper", grids, row)
    assert (setting == row.paper) == (len(grids) == row.scales)
    chunks = max(8, row.chunks)  # a row with ratios per chunk fits its own model alone
    released = preset("stagevar-released", grids, row).expand(grids, chunks)
    assert len(released) == len(setting.expand(grids, chunks)) == len(grids)


def test_scales_follow_the_resolution():
    assert [len(scale_grids("infinity-8b", r)) for r in (None, "1M", 512, "256")] == [13, 13, 10, 7]
    with pytest.raises(UsageError, match="no resolution '2M'"):
        scale_grids("infinity-8b", "2M")
    with pytest.raises(UsageError, match="not known before"):
        scale_grids("nano")


def test_expansion_decides_equality_not_parameters():
    one = StageSchedule(4, semantic_end=2, cfg_delay=0, rank_ratios=(0.2,))
    other = StageSchedule(4, semantic_end=3, cfg_delay=0, rank_ratios=(0.2, 0.2))
    assert one != other
    assert one.expand(NANO, 2) == other.expand(NANO, 2)
    assert hash(one.expand(NANO, 2)) == hash(other.expand(NANO, 2))
    # Parameters of a reduction that is not used do not matter.
    assert StageSchedule(6, projection="rows").expand(NANO, 2) == exact(6).expand(NANO, 2)


BASE = StageSchedule(structure_end=3, cfg_delay=1, rank_ratios=(0.5, 0.25))


@pytest.mark.parametrize(
    "change",
    [
        {"structure_end": 4},
        {"cfg_delay": 0},
        {"cfg_delay": None},
        {"branch": "cond"},
        {"rank_ratios": (0.4, 0.25)},
        {"rank_ratios": (0.5, 0.2)},
        {"rank_ratios": None},
        {"rank_ratios": None, "energy": 0.96},
        {"rank_delay": 1},
        {"projection": "rows"},
        {"rope": "index"},
        {"site": "trunk"},
        {"skip": (5,)},
        {"accelerator": "fastvar"},
        {"accelerator": "exact"},
    ],
    ids=str,
)
def test_every_parameter_changes_an_expansion(change):
    assert dataclasses.replace(BASE, **change).expand(NANO, 2) != BASE.expand(NANO, 2)


FUSED = {"structure_end": 4, "cfg_delay": 0, "branch": "cond", "fuse_layer": 2}


def test_fusing_is_at_the_cutoff_and_mixes_with_what_keeps_tokens_in_place():
    """Null branch until scale 4, fused there, rows from 5 on; pruning may also start at 4, and another scale be skipped."""
    steps = StageSchedule(**FUSED, rank_ratios=(0.5,), rank_delay=1, projection="rows").expand(NANO, 3)
    assert [s.fuse_layer for s in steps] == [0, 0, 0, 0, 2, 0]
    assert [len(s.branches) for s in steps] == [2, 2, 2, 2, 2, 1]
    assert [steps[4].branches_at(layer) for layer in (0, 1, 2, 5)] == [BOTH, BOTH, ("cond",), ("cond",)]
    assert steps[5].branches_at(0) == ("cond",)
    pruned = StageSchedule(**FUSED, rank_ratios=(0.5,), accelerator="fastvar", skip=(3,)).expand(NANO, 3)
    assert pruned[4].reduction.kept == 18 and pruned[4].fuse_layer == 2 and pruned[4].reduction.cache_scale == 2
    plain = StageSchedule(**{**FUSED, "fuse_layer": 0}).expand(NANO, 3)
    assert len({plain, steps, StageSchedule(**{**FUSED, "fuse_layer": 3}).expand(NANO, 3)}) == 3


def test_relative_parameters_move_with_structure_end():
    for start in (2, 3, 4):
        steps = StageSchedule(start, cfg_delay=1, rank_ratios=(0.5,)).expand(NANO, 1)
        assert [s.scale for s in steps if s.reduction] == list(range(start, 6))
        assert [s.scale for s in steps if s.branches != BOTH] == list(range(start + 1, 6))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"structure_end": -1}, "structure_end -1"),
        ({"structure_end": 7}, "structure_end 7 is beyond the model's 6 scales"),
        ({"structure_end": 2, "semantic_end": 3}, "before semantic_end 3"),
        ({"structure_end": 5, "cfg_delay": 2}, "cfg cutoff 7"),
        ({"structure_end": 5, "rank_ratios": (0,)}, "rank ratio 0"),
        ({"structure_end": 5, "rank_ratios": (1.5,)}, "rank ratio 1.5"),
        ({"structure_end": 5, "rank_ratios": ()}, "rank_ratios"),
        ({"structure_end": 5, "rank_ratios": ((0.1, 0.2, 0.3),)}, "3 rank ratios at scale 5"),
        ({"structure_end": 5, "rank_ratios": (0.1,), "energy": 0.96}, "both given"),
        ({"structure_end": 5, "energy": 0.961}, "nearest: 0.96"),
        ({"structure_end": 5, "branch": "null"}, "branch 'null'"),
        ({"structure_end": 5, "projection": "gausian"}, "did you mean gaussian"),
        ({"structure_end": 5, "skip": (6,)}, "skipped scale 6"),
        ({"structure_end": 5, "skip": (0,)}, "scale 0 cannot be skipped"),
        ({"structure_end": 5, "fuse_layer": -1}, "fuse_layer -1"),
        ({"structure_end": 5, "fuse_layer": 2}, "fuse_layer 2 says where guidance ends; give a cfg_delay"),
        ({"structure_end": 5, "fuse_layer": 2, "cfg_delay": 0}, "fuse_layer 2 goes on with the conditional branch"),
        ({**FUSED, "cfg_delay": 2}, "fuse_layer 2 is for scale 6 .structure_end . cfg_delay., which is not run"),
        ({**FUSED, "skip": (4,)}, "fuse_layer 2 is for scale 4 .structure_end . cfg_delay., which is not run"),
        ({**FUSED, "rank_ratios": (0.5,)}, "scale 4 fuses the branches at layer 2, but projection leaves them on"),
        ({**FUSED, "decision": "ssim-0.84"}, "both drop a branch"),
        ({"structure_end": True}, "structure_end True"),
        ({"structure_end": 2.0}, "structure_end 2.0"),
    ],
)
def test_refusals_name_the_value(parameters, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        StageSchedule(**parameters).expand(NANO, 2)
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_keys():
    with pytest.raises(ScheduleError, match=r"unknown schedule parameter 'structur_end', did you mean structure_end"):
        StageSchedule.from_dict({"structur_end": 3})
    with pytest.raises(ScheduleError, match="structure_end is missing"):
        StageSchedule.from_dict({"cfg_delay": 3})
    with pytest.raises(ScheduleError, match="must be a mapping"):
        StageSchedule.from_dict([1])
    with pytest.raises(ScheduleError, match="did you mean stagevar-paper"):
        preset("stagevarpaper", NANO)


ratio = st.floats(0.01, 1.0)
schedules = st.builds(
    StageSchedule,
    structure_end=st.integers(3, 6),
    semantic_end=st.integers(0, 3),
    cfg_delay=st.none() | st.just(0),
    branch=st.sampled_from(BOTH),
    rank_ratios=st.none() | st.lists(ratio | st.tuples(ratio, ratio), min_size=1, max_size=4).map(tuple),
    rank_delay=st.integers(0, 2),
    projection=st.sampled_from(PROJECTIONS),
    rope=st.sampled_from(("first", "index")),
    site=st.sampled_from(("chunk", "trunk")),
    skip=st.lists(st.integers(1, 5), max_size=3).map(tuple),
)


@given(schedules)
def test_round_trip_and_invariants(schedule):
    again = StageSchedule.from_dict(schedule.to_dict())
    assert again == schedule
    steps = schedule.expand(NANO, 2)
    assert again.expand(NANO, 2) == steps
    assert [s.scale for s in steps] == list(range(6))
    for step in steps:
        if step.scale < schedule.structure_end and step.scale not in schedule.skip:
            assert step.reduction is None and step.branches == BOTH
        if isinstance(step.reduction, LowRank):
            assert all(1 <= r <= step.tokens for r in step.reduction.ranks)
    full = sum(s.processed_tokens(2) for s in exact(6).expand(NANO, 2))
    assert sum(s.processed_tokens(2) for s in steps) <= full


@given(st.dictionaries(st.text(max_size=12), st.integers() | st.text(max_size=5) | st.none() | st.lists(st.integers())))
def test_any_mapping_parses_or_is_refused_in_one_line(data):
    try:
        StageSchedule.from_dict(data)
    except ScheduleError as error:
        assert "\n" not in str(error)


def test_rank_rule():
    assert rank(0.25, 36) == 10
    assert rank(1.0, 36) == 36
    published = published_table()["0.96"]["40"]
    assert ratios_for_energy(0.96, 1600, 8) == tuple(published)
    assert len(ratios_for_energy(0.96, 1600, 3)) == 3
    assert min(published) <= min(ratios_for_energy(0.96, 1500, 3))


def test_grid_tables():
    assert sum(h * w for h, w in GRIDS) == 10521
    assert [len(infinity_grids(p)[0]) for p in ("0.06M", "0.25M", "0.60M", "1M")] == [7, 10, 12, 13]
    assert len(INFINITY_GRIDS) == 15 and all(len(rows) == 13 for rows in INFINITY_GRIDS.values())
    assert infinity_grids("0.06M", 1.5)[1] == (78, 52)
    assert nearest_ratio(1.49) == 1.5 and nearest_ratio(0.1) == 0.333
    for ratio_, rows in INFINITY_GRIDS.items():
        assert abs(rows[-1][0] / rows[-1][1] - ratio_) < 0.08 * ratio_


def test_skip_only_keeps_everything_else():
    steps = skip_only(NANO, 2).expand(NANO, 2)
    assert [s.skipped for s in steps] == [False] * 4 + [True] * 2
    assert all(s.branches == BOTH and s.reduction is None for s in steps[:4])
