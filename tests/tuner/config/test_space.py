"""Search spaces: strict reading, values to schedules, no idle parameter, names of expansions."""

import copy
import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stagevar.errors import StagevarError, UsageError
from stagevar.schedule import PRESETS, StageSchedule
from stagevar.schedule.grids import square
from tests.fakes.studies import CHUNKS, GRIDS, SPACE
from tuner.config.parameters import NEVER
from tuner.config.space import all_or_drawn_settings, draws, expanded, steps_key
from tuner.config.space_file import load_space, parse_space, space_names


def on_six_scales():
    """nano's own parameters for the six scales of these tests."""
    data = load_space("nano").to_data()
    data["parameters"]["structure_end"] = {"low": 2, "high": 5}
    return parse_space({**data, "semantic_end": 2})


NANO = on_six_scales()


def values_of(space):
    """A hypothesis strategy for points of a space."""

    def one(parameter):
        if parameter.values:
            return st.sampled_from(parameter.values)
        if parameter.kind == "int":
            return st.integers(int(parameter.low), int(parameter.high))
        return st.floats(parameter.low, parameter.high)

    return st.fixed_dictionaries({p.name: one(p) for p in space.parameters})


@given(values_of(NANO))
def test_every_point_of_nanos_space_is_a_schedule_that_reads_back(values):
    schedule = NANO.schedule(values, GRIDS)
    steps = schedule.expand(GRIDS, CHUNKS)
    assert len(steps) == len(GRIDS)
    again = StageSchedule.from_dict(yaml.safe_load(yaml.safe_dump(schedule.to_dict())))
    assert again == schedule and again.expand(GRIDS, CHUNKS) == steps


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(StageSchedule)]), st.one_of(
    st.none(), st.booleans(), st.integers(-3, 20), st.floats(), st.text(max_size=8), st.lists(st.floats(), max_size=3),
    st.lists(st.integers(-2, 9), max_size=3))))  # fmt: skip
def test_any_schedule_data_is_a_schedule_or_one_line(data):
    try:
        steps = StageSchedule.from_dict(data).expand(GRIDS, CHUNKS)
    except StagevarError as error:
        assert "\n" not in str(error)
    else:
        assert len(steps) == len(GRIDS)


def test_each_parameter_changes_some_expansion():
    start = {"structure_end": 3, "cfg_delay": 1, "branch": "uncond", "rank_ratio": 0.5, "rank_decay": 0.6, "rank_delay": 0,
             "projection": "gaussian", "rope": "first", "site": "chunk", "skip_last": 0}  # fmt: skip
    for parameter in NANO.parameters:
        options = parameter.values or range(int(parameter.low), int(parameter.high) + 1)
        # Branches are fused where the conditional one stays and no projection is at work yet.
        point = {**start, **({"branch": "cond", "rank_delay": 2} if parameter.name == "fuse_layer" else {})}
        keys = {steps_key(NANO.schedule({**point, parameter.name: v}, GRIDS).expand(GRIDS, CHUNKS)) for v in options}
        assert len(keys) > 1, parameter.name


def test_ranks_decay_from_the_first_reduced_scale():
    values = {"structure_end": 3, "rank_ratio": 0.5, "rank_decay": 0.5}
    assert NANO.schedule(values, GRIDS).rank_ratios == (0.5, 0.25, 0.125)


def test_a_cutoff_beyond_the_last_scale_is_none():
    late = NANO.schedule({"structure_end": 5, "cfg_delay": 2}, GRIDS)
    assert late == NANO.schedule({"structure_end": 5, "cfg_delay": NEVER}, GRIDS)


def test_inner_scales_are_skipped_right_before_the_last_one_that_runs():
    def skipped(**values):
        return NANO.schedule({"structure_end": 3, **values}, GRIDS).skip

    assert skipped(skip_inner=1) == (4,) and skipped(skip_inner=2) == (3, 4)
    assert skipped(skip_last=1, skip_inner=1) == (3, 5)
    assert skipped(skip_last=4, skip_inner=3) == (2, 3, 4, 5), "the first scale always runs"


def test_fusing_is_left_out_where_the_schedule_would_refuse_it():
    def fuse_layer(**values):
        start = {"structure_end": 4, "cfg_delay": 0, "branch": "cond", "fuse_layer": 3}
        return NANO.schedule({**start, **values}, GRIDS).fuse_layer

    assert fuse_layer() == fuse_layer(rank_ratio=0.5, accelerator="fastvar") == fuse_layer(skip_last=1) == 3
    assert fuse_layer(rank_ratio=0.5, rank_delay=1) == 3, "the branches are fused before tokens are reduced"
    for reason in (
        {"cfg_delay": NEVER},
        {"branch": "uncond"},
        {"rank_ratio": 0.5},
        {"skip_inner": 1},
        {"cfg_delay": 2},
    ):
        assert fuse_layer(**reason) == 0, reason


def test_the_neutral_point_is_the_full_schedule():
    neutral = NANO.schedule({"structure_end": 4}, GRIDS).expand(GRIDS, CHUNKS)
    assert steps_key(neutral) == steps_key(StageSchedule(len(GRIDS)).expand(GRIDS, CHUNKS))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_a_nearest_point_inside(name):
    values = NANO.nearest_values(PRESETS[name](GRIDS), GRIDS)
    for parameter in NANO.parameters:
        value = values[parameter.name]
        assert value in parameter.values if parameter.values else parameter.low <= value <= parameter.high


def test_nearest_values_recover_a_point_of_the_space():
    values = {"structure_end": 3, "cfg_delay": 1, "branch": "cond", "rank_ratio": 0.5, "rank_decay": 0.6, "rank_delay": 0,
              "projection": "rows", "rope": "index", "site": "trunk", "skip_last": 0, "skip_inner": 1, "fuse_layer": 0,
              "accelerator": "fastvar"}  # fmt: skip
    assert NANO.nearest_values(NANO.schedule(values, GRIDS), GRIDS) == values


@pytest.fixture
def small():
    """A space of 12 settings; `rank_ratio` is its last parameter."""
    data = load_space("infinity-tiny").to_data()
    data["parameters"] = {"structure_end": {"low": 3, "high": 6}, "branch": ["cond"], "rank_ratio": [0.1, 0.5, 1]}
    return data


def test_settings_are_the_product_of_the_values(small):
    assert parse_space(small).settings == 4 * 3
    small["parameters"]["rank_ratio"] = {"low": 0.1, "high": 1}
    assert parse_space(small).settings is None


def test_a_small_space_is_enumerated_and_a_larger_one_drawn_from(small):
    space = parse_space(small)
    every = list(all_or_drawn_settings(space, seed=0, at_most=12))
    assert len({tuple(values.values()) for values in every}) == len(every) == 12
    assert all(space.schedule(values, GRIDS).structure_end == values["structure_end"] for values in every)
    drawn = list(all_or_drawn_settings(space, seed=0, at_most=11))
    assert len(drawn) == 11 and drawn == list(all_or_drawn_settings(space, 0, 11)) != list(
        all_or_drawn_settings(space, 1, 11)
    )
    assert all(values in every for values in drawn)
    small["parameters"]["rank_ratio"] = {"low": 0.1, "high": 1}
    assert len(list(all_or_drawn_settings(parse_space(small), seed=0, at_most=50))) == 50, "no end of settings to list"


def test_draws_of_a_small_space_come_to_the_schedules_of_all_its_settings(small):
    space = parse_space(small)
    every = {
        steps_key(s) for _, s in expanded(space, GRIDS, CHUNKS, all_or_drawn_settings(space, 0, 12)) if s is not None
    }
    assert {steps_key(s) for s in draws(space, GRIDS, CHUNKS, 0, 400)} == every and len(every) > 6


def test_stage_labels_do_not_make_schedules_differ():
    one, two = StageSchedule(4, semantic_end=1, cfg_delay=0), StageSchedule(4, semantic_end=3, cfg_delay=0)
    assert steps_key(one.expand(GRIDS, CHUNKS)) == steps_key(two.expand(GRIDS, CHUNKS))


def changed(path, value):
    data = copy.deepcopy(SPACE)
    *parents, last = path.split(".")
    target = data
    for key in parents:
        target = target[key]
    target[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("modle", "nano", "did you mean model"),
        ("parameters.strcture_end", {"low": 1, "high": 2}, "did you mean structure_end"),
        ("parameters.rank_ratio", [0], "rank_ratio 0 must be a number from 0.001 to 1"),
        ("parameters.rank_ratio", {"low": 0.5}, "no high"),
        ("parameters.rank_ratio", {"low": 0.5, "high": 0.2}, "low must not exceed high"),
        ("parameters.rank_ratio", [], "empty"),
        ("parameters.rank_ratio", [0.5, 0.5], "twice"),
        ("parameters.rank_ratio", {"low": 0.1, "hihg": 1}, "did you mean high"),
        ("parameters.cfg_delay", ["nevr"], "never"),
        ("parameters.cfg_delay", [True], "cfg_delay True"),
        ("parameters.branch", ["unkond"], "did you mean uncond"),
        ("parameters.branch", {"low": 0, "high": 1}, "list of words"),
        ("parameters.structure_end", 3, "structure_end 3 must be"),
        ("parameters", [], "must be a mapping"),
        ("objectives.quality", {}, "metrics with weights"),
        ("objectives.quality", {"clip_scor": 1.0}, "did you mean clip_score"),
        ("objectives.quality", {"clip_score": 0}, "above 0"),
        ("objectives.latency", "seconds", "latency: ms"),
        ("objectives", {"latency": "ms"}, "latency and quality"),
        ("constraints", {"floors": {"psnrr": 1}}, "did you mean psnr"),
        ("constraints", {"floors": {"psnr": "high"}}, "must be a number"),
        ("enqueue", ["stagevar-papre"], "did you mean stagevar-paper"),
        ("enqueue", "stagevar-paper", "must be a list"),
        ("prompts.search", 0, "at least 1"),
        ("prompts.serach", 4, "did you mean search"),
        ("semantic_end", 3, "before semantic_end 3"),
        ("semantic_end", "two", "semantic_end 'two'"),
        ("model", 3, "model is missing"),
    ],
)
def test_bad_spaces_are_one_line_that_names_the_fault(path, value, says):
    with pytest.raises(UsageError) as caught:
        parse_space(changed(path, value))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["model", "parameters.structure_end", "objectives"])
def test_what_is_missing_is_named(path):
    data = copy.deepcopy(SPACE)
    *parents, last = path.split(".")
    target = data
    for key in parents:
        target = target[key]
    del target[last]
    with pytest.raises(UsageError, match=last):
        parse_space(data)


@pytest.mark.parametrize(
    ("path", "value"), [("parameters.structure_end", {"low": 2, "high": 9}), ("parameters.cfg_delay", [0, 9])]
)
def test_a_range_beyond_the_models_scales_is_refused(path, value):
    with pytest.raises(UsageError, match="6 scales"):
        parse_space(changed(path, value)).fit(GRIDS)


def test_spaces_of_other_models_are_refused(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    with pytest.raises(UsageError, match="for model 'fake', not 'nano'"):
        load_space("nano", path)


@pytest.mark.parametrize(
    "text", ["a: [", "!!python/object/apply:os.system ['true']", "- 1\n- 2", "a: &x 1\nb: *x", "\0"]
)
def test_hostile_files_are_usage_errors(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_space("nano", path)
    assert "\n" not in str(caught.value)


def test_digest_follows_what_the_space_says():
    assert parse_space(SPACE).digest == parse_space(copy.deepcopy(SPACE)).digest
    assert parse_space(SPACE).digest != parse_space(changed("parameters.rank_ratio", [0.05, 1])).digest


def test_shipped_spaces_read_and_fit():
    assert "nano" in space_names()
    load_space("nano").fit(square((1, 2, 3, 4, 6, 8, 11, 16)))


EIGHT_BITS = parse_space({**SPACE, "parameters": {**SPACE["parameters"], "precision": ["model", "fp8", "int8"]}})


def test_products_in_eight_bits_are_a_dimension_of_their_own():
    """Each precision is another schedule of every setting, from structure_end on."""
    values = {p.name: (p.values or (p.low,))[0] for p in EIGHT_BITS.parameters}
    found = {
        name: EIGHT_BITS.schedule({**values, "precision": name}, GRIDS).expand(GRIDS, CHUNKS)
        for name in ("model", "fp8", "int8")
    }
    assert len({steps_key(steps) for steps in found.values()}) == 3
    start = int(values["structure_end"])
    ran = [step for step in found["fp8"] if not step.skipped]
    assert all((step.precision == "fp8") == (step.scale >= start) for step in ran)


def test_precisions_that_the_card_refuses_are_not_searched(tmp_path):
    left = EIGHT_BITS.runnable({"fp8": "no such units"})
    (precision,) = (p for p in left.parameters if p.name == "precision")
    assert precision.values == ("model", "int8") and EIGHT_BITS.runnable({}) is EIGHT_BITS
    only = parse_space({**SPACE, "parameters": {**SPACE["parameters"], "precision": ["fp8"]}})
    with pytest.raises(UsageError, match=r"precision fp8 cannot run here \(no such units\); add model to its values"):
        only.runnable({"fp8": "no such units"})


def test_a_study_leaves_out_what_its_card_refuses(tmp_path, monkeypatch):
    from tests.fakes import studies as fakes

    real = fakes.FakeEvaluator.__init__

    def refusing(self, *arguments, **options):
        real(self, *arguments, **options)
        self.facts = dataclasses.replace(self.facts, refused={"fp8": "no such units", "int8": "none either"})

    monkeypatch.setattr(fakes.FakeEvaluator, "__init__", refusing)
    study = fakes.study(tmp_path / "run", space={"parameters": EIGHT_BITS.to_data()["parameters"]})
    assert study.space == EIGHT_BITS.runnable(study.facts.refused) and study.ledger.space == study.space
    assert study.identity()["space"] != dataclasses.asdict(EIGHT_BITS)
