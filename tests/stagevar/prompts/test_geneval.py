"""GenEval's rules, one hand-made case per rule and corner; the expected verdicts are worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagevar.errors import UsageError
from stagevar.prompts.geneval import (
    COLORS,
    RELATIONS,
    Detection,
    check_metadata,
    classify_color,
    judge,
    relations,
    summarize,
)


def thing(name="dog", score=0.95, box=(0, 0, 10, 10), color=None, texture=None):
    return Detection(name, score, tuple(map(float, box)), color, texture)


def wants(tag, *include, exclude=None):
    metadata = {"tag": tag, "include": list(include), "prompt": "p"}
    return metadata | ({"exclude": exclude} if exclude else {})


def clause(name="dog", count=1, **extra):
    return {"class": name, "count": count, **extra}


def verdict(metadata, *detections, **rules):
    return judge(metadata, detections, **rules)


def two_dogs():
    return wants("counting", clause(count=2), exclude=[clause(count=3)])


# Presence and thresholds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "correct"), [(0.3, False), (math.nextafter(0.3, 1), True), (0.5, True), (0.0, False), (1.0, True)]
)
def test_a_score_must_lie_strictly_above_the_threshold(score, correct):
    assert verdict(wants("single_object", clause()), thing(score=score)).correct is correct


@pytest.mark.parametrize(("score", "found"), [(0.9, 0), (math.nextafter(0.9, 1), 2), (0.89, 0), (0.95, 2)])
def test_counting_raises_the_threshold_to_nine_tenths(score, found):
    result = verdict(two_dogs(), thing(score=score), thing(score=score))
    assert result.correct is (found == 2)
    assert result.reason == ("" if found == 2 else "expected dog>=2, found 0")


def test_the_higher_threshold_is_for_the_counting_tag_only():
    metadata = wants("two_object", clause(count=2))
    assert verdict(metadata, thing(score=0.31), thing(score=0.31)).correct


def test_options_move_both_thresholds():
    assert verdict(wants("single_object", clause()), thing(score=0.2), threshold=0.1).correct
    assert verdict(two_dogs(), thing(score=0.6), thing(score=0.6), counting_threshold=0.5).correct


def test_every_missing_class_gets_its_line():
    result = verdict(wants("two_object", clause("dog"), clause("cat")), thing("cup"))
    assert result.reason == "expected dog>=1, found 0\nexpected cat>=1, found 0"


def test_other_objects_and_extra_copies_do_no_harm_outside_counting():
    metadata = wants("two_object", clause("dog"), clause("cat"))
    assert verdict(metadata, thing("dog"), thing("dog"), thing("cat"), thing("cup")).correct


# Counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "correct"), [(0, False), (1, False), (2, True), (3, False), (4, False)])
def test_counting_needs_exactly_the_number(found, correct):
    assert verdict(two_dogs(), *[thing()] * found).correct is correct


def test_an_excess_that_is_not_confident_does_not_count():
    assert verdict(two_dogs(), thing(), thing(), thing(score=0.9)).correct


def test_an_excess_names_the_number_found():
    assert verdict(two_dogs(), *[thing()] * 4).reason == "expected dog<3, found 4"


def test_only_sixteen_of_a_class_are_seen():
    crowd = [thing()] * 40
    exactly_sixteen = wants("counting", clause(count=16), exclude=[clause(count=17)])
    assert verdict(exactly_sixteen, *crowd).correct
    assert not verdict(exactly_sixteen, *crowd, max_per_class=17).correct
    assert verdict(wants("counting", clause(count=17)), *crowd).reason == "expected dog>=17, found 16"


def test_exclude_speaks_of_any_class():
    metadata = wants("single_object", clause("dog"), exclude=[clause("cat")])
    assert verdict(metadata, thing("dog")).correct
    assert verdict(metadata, thing("dog"), thing("cat")).reason == "expected cat<1, found 1"


# Color ------------------------------------------------------------------------------------------------------------


def test_only_the_best_object_is_asked_for_its_color():
    metadata = wants("colors", clause(color="red"))
    assert verdict(metadata, thing(score=0.8, color="red"), thing(score=0.7, color="blue")).correct
    assert not verdict(metadata, thing(score=0.7, color="red"), thing(score=0.8, color="blue")).correct


def test_equal_scores_go_to_the_later_detection():
    metadata = wants("colors", clause(color="red"))
    assert verdict(metadata, thing(color="blue"), thing(color="red")).correct
    assert not verdict(metadata, thing(color="red"), thing(color="blue")).correct


def test_all_counted_objects_need_the_color():
    metadata = wants("colors", clause(count=2, color="red"))
    assert verdict(metadata, thing(color="red"), thing(color="red")).correct
    result = verdict(metadata, thing(color="red"), thing(color="white"))
    assert result.reason == "expected red dog>=2, found 1 red; and 1 red, 1 white"


def test_colors_are_tallied_in_the_official_order():
    metadata = wants("colors", clause(count=3, color="pink"))
    result = verdict(metadata, thing(color="white"), thing(color="red"), thing(color="white"))
    assert result.reason == "expected pink dog>=3, found 0 pink; and 1 red, 2 white"


def test_an_unclassified_object_has_no_color():
    assert not verdict(wants("colors", clause(color="red")), thing()).correct


def test_two_clauses_on_one_class_look_at_the_same_object():
    metadata = wants("color_attr", clause(color="red"), clause(color="blue"))
    assert not verdict(metadata, thing(color="red"), thing(score=0.9, color="blue")).correct


def test_texture_is_judged_as_color_is():
    metadata = wants("texture", clause(color="red", texture="striped"))
    assert verdict(metadata, thing(color="red", texture="striped")).correct
    assert "striped" in verdict(metadata, thing(color="red", texture="plain")).reason
    assert "red" in verdict(metadata, thing(color="blue", texture="striped")).reason
    assert not verdict(metadata, thing(color="red")).correct


def test_a_color_tie_falls_to_the_first_of_the_official_order():
    scores = [0.0] * 10
    scores[COLORS.index("blue")] = scores[COLORS.index("white")] = scores[COLORS.index("orange")] = 0.4
    assert classify_color(scores) == "orange"
    with pytest.raises(UsageError, match="10 colors"):
        classify_color([1.0, 2.0])


# Position ----------------------------------------------------------------------------------------------------------


def box_at(x, y, size=0.0):
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-50, 0), ("left of",)),
        ((50, 0), ("right of",)),
        ((0, -50), ("above",)),
        ((0, 50), ("below",)),
        ((-50, -50), ("left of", "above")),
        ((50, 50), ("right of", "below")),
        ((0, 0), ()),
    ],
)
def test_relations_of_points(offset, expected):
    assert relations(box_at(*offset), box_at(0, 0)) == expected


def test_half_of_the_distance_is_not_enough():
    # Offsets (3, 4), (4, 3): 3/5 > 0.5 holds on both axes. With rest 2.5 of 5 it is exactly one half: not enough.
    assert relations(box_at(3, 4), box_at(0, 0)) == ("right of", "below")
    # 5 wide: margin 0.1 * 5 = 0.5 shortens 3 to 2.5, and 2.5 / 5 is 0.5.
    assert relations((0.5, 4.0, 5.5, 4.0), box_at(0, 0)) == ("below",)


def test_the_margin_is_a_tenth_of_both_sizes_together():
    # Centers 4 apart, sizes 10 and 10: margin 2, rest 2 of 4, a half: nothing. At 4.2 apart 2.2 / 4.2 > 0.5.
    assert relations(box_at(4, 0, 10), box_at(0, 0, 10)) == ()
    assert relations(box_at(4.2, 0, 10), box_at(0, 0, 10)) == ("right of",)
    assert relations(box_at(4, 0, 10), box_at(0, 0, 10), position_margin=0.0) == ("right of",)


def test_the_rest_never_turns_round():
    # Margin 6 exceeds the offset 4: clamped at 0, not a relation on the other side.
    assert relations(box_at(4, 0, 30), box_at(0, 0, 30)) == ()


def test_boxes_with_swapped_corners_keep_their_size():
    assert relations((9, 5, -1, -5), box_at(0, 0, 10)) == relations((-1, -5, 9, 5), box_at(0, 0, 10)) == ()


def position(relation, target=0):
    return wants("position", clause("dog"), clause("cat", position=[relation, target]))


@pytest.mark.parametrize(
    ("relation", "x", "y"), [("left of", -40, 0), ("right of", 40, 0), ("above", 0, -40), ("below", 0, 40)]
)
def test_the_second_class_is_the_subject(relation, x, y):
    found = (thing("dog", box=box_at(0, 0, 10)), thing("cat", box=box_at(x, y, 10)))
    assert verdict(position(relation), *found).correct
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    assert verdict(position(opposite), *found).reason == f"expected cat {opposite} target, found {relation} target"


def test_only_the_best_of_several_candidates_is_placed():
    dog = thing("dog", box=box_at(0, 0, 10))
    near, far = box_at(-40, 0, 10), box_at(40, 0, 10)
    assert verdict(position("left of"), dog, thing("cat", 0.9, near), thing("cat", 0.8, far)).correct
    assert not verdict(position("left of"), dog, thing("cat", 0.8, near), thing("cat", 0.9, far)).correct


def test_every_pair_must_hold():
    metadata = wants("position", clause("dog", 2), clause("cat", 2, position=["left of", 0]))
    dogs = [thing("dog", box=box_at(x, 0, 4)) for x in (0, 30)]
    assert verdict(metadata, *dogs, *[thing("cat", box=box_at(x, 0, 4)) for x in (-30, -60)]).correct
    assert not verdict(metadata, *dogs, *[thing("cat", box=box_at(x, 0, 4)) for x in (-30, 15)]).correct


def test_a_failed_target_fails_the_position():
    metadata = wants("position", clause("dog", color="red"), clause("cat", position=["left of", 0]))
    result = verdict(metadata, thing("dog", color="blue"), thing("cat", box=box_at(-40, 5, 10)))
    assert result.reason.endswith("\nno target for cat to be left of")
    absent = verdict(position("left of"), thing("cat"))
    assert absent.reason == "expected dog>=1, found 0\nno target for cat to be left of"


def test_a_failed_color_ends_the_clause_before_its_position():
    metadata = wants("position", clause("dog"), clause("cat", color="red", position=["left of", 0]))
    result = verdict(metadata, thing("dog"), thing("cat", box=box_at(40, 0), color="blue"))
    assert result.reason == "expected red cat>=1, found 0 red; and 1 blue"


def test_a_failed_include_is_no_target_for_a_third():
    metadata = wants(
        "position", clause("dog"), clause("cat", position=["left of", 0]), clause("cup", position=["below", 1])
    )
    found = [thing("dog", box=box_at(0, 0)), thing("cat", box=box_at(40, 0)), thing("cup", box=box_at(40, 40))]
    assert verdict(metadata, *found).reason.split("\n") == [
        "expected cat left of target, found right of target",
        "no target for cup to be below",
    ]


# Overlap (off by default) ------------------------------------------------------------------------------------------


def test_suppression_is_off_unless_asked_for():
    twins = [thing(), thing(score=0.94)]
    assert verdict(two_dogs(), *twins).correct
    assert not verdict(two_dogs(), *twins, max_overlap=0.9).correct
    # Inclusive corners: 0..10 is 11 wide, so shifted by 5: 6*11 / (2*121 - 66) = 0.375, dropped at 0.375 itself.
    beside = [thing(), thing(score=0.94, box=(5, 0, 15, 10))]
    assert not verdict(two_dogs(), *beside, max_overlap=0.375).correct
    assert verdict(two_dogs(), *beside, max_overlap=0.376).correct


# Metadata and the summary ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ([], "expected an object"),
        ({"include": []}, "tag None"),
        (wants("colors", {"class": "dog"}), "count None"),
        (wants("colors", {"class": "dog", "count": True}), "count True"),
        (wants("colors", {"count": 1}), r"include\[0\]"),
        ({"tag": "colors", "include": "dog"}, "include is 'dog'"),
        (position("beside"), "beside"),
        (position("above", 1), "include 1"),
        (wants("position", clause(position=["above", 0])), "include 0"),
    ],
)
def test_unreadable_metadata_is_refused_by_name(metadata, named):
    with pytest.raises(UsageError, match=named):
        check_metadata(metadata)


def test_detections_that_are_not_numbers_are_refused():
    with pytest.raises(UsageError, match="finite"):
        verdict(wants("single_object", clause()), thing(score=float("nan")))
    with pytest.raises(UsageError, match="four"):
        verdict(wants("single_object", clause()), Detection("dog", 0.5, (0.0, 1.0)))


def test_overall_is_the_unweighted_mean_of_the_tags():
    rows = [{"tag": "counting", "prompt": "a", "correct": correct} for correct in (True, False, False, False)]
    rows += [{"tag": "colors", "prompt": "b", "correct": True}]
    summary = summarize(rows)
    assert summary.tags == {"counting": 0.25, "colors": 1.0}
    assert summary.overall == 0.625  # not 2/5
    assert summary.correct_images == 0.4
    assert (summary.images, summary.prompts, summary.correct_prompts) == (5, 2, 1.0)
    assert summary.images_per_tag == {"counting": 4, "colors": 1}


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(UsageError, match="no judged images"):
        summarize([])


coordinates = st.floats(-500, 500, allow_nan=False)
boxes = st.tuples(coordinates, coordinates, coordinates, coordinates)


@given(boxes, boxes)
def test_relations_mirror(box_a, box_b):
    mirror = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    assert {mirror[name] for name in relations(box_a, box_b)} == set(relations(box_b, box_a))
    assert len(relations(box_a, box_b)) <= 2


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(COLORS)), max_size=6, unique_by=lambda row: row[0]),
    st.randoms(),
)
def test_the_order_of_detections_is_irrelevant_unless_scores_are_equal(rows, random):
    detections = [thing(score=score, color=color) for score, color in rows]
    shuffled = random.sample(detections, len(detections))
    metadata = wants("colors", clause(count=2, color="red"), exclude=[clause(count=4)])
    assert judge(metadata, detections) == judge(metadata, shuffled)
