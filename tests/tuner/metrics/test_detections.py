"""The detections file: every accepted spelling reads alike, everything else is refused on one line."""

from __future__ import annotations

import json
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagevar.errors import UsageError
from stagevar.prompts.geneval import COLORS, Detection
from tuner.metrics.detections import read_detections, read_metadata, score_detections

METADATA = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"}
FOUND = (Detection("dog", 0.9, (1.0, 2.0, 11.0, 22.0), "red"), Detection("cat", 0.5, (0.0, 0.0, 5.0, 5.0)))
DOG = {"class": "dog", "score": 0.9, "box": [1, 2, 11, 22], "color": "red"}
CAT = {"class": "cat", "score": 0.5, "box": [0, 0, 5, 5]}
ENTRY = {"name": "00003/samples/0000.png", "metadata": METADATA, "detections": [DOG, CAT]}
RED_FIRST = [0.5, *[0.1] * 8, 0.5]


def write(tmp_path, content, name="found.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


SAME = {
    "list": [ENTRY],
    "lines": json.dumps(ENTRY) + "\n\n" + json.dumps(ENTRY | {"name": "b"}) + "\n",
    "by name": {"00003/samples/0000.png": {"metadata": METADATA, "detections": [DOG, CAT]}},
    "wrapped": {"images": [ENTRY], "model": "x"},
    "one entry": ENTRY,
    "inline metadata": [{"filename": "00003/samples/0000.png", **METADATA, "objects": [DOG, CAT]}],
    "metadata as text": [ENTRY | {"metadata": json.dumps(METADATA)}],
    "other words": [
        ENTRY
        | {
            "detections": [
                {"label": "dog", "confidence": 0.9, "bbox": [1, 2, 11, 22], "colour": "red"},
                {"category": "cat", "prob": 0.5, "box_xywh": [0, 0, 5, 5]},
            ]
        }
    ],
    "score in the box": [
        ENTRY
        | {
            "detections": [
                {"class_name": "dog", "xyxy": [1, 2, 11, 22, 0.9], "color": "red"},
                {"class": "cat", "box": [0, 0, 5, 5, 0.5]},
            ]
        }
    ],
    "by class": [
        ENTRY
        | {"detections": {"dog": [{"score": 0.9, "box": [1, 2, 11, 22], "color": "red"}], "cat": [[0, 0, 5, 5, 0.5]]}}
    ],
    "color scores": [ENTRY | {"detections": [DOG | {"color": None, "color_scores": RED_FIRST}, CAT]}],
    "color scores by name": [
        ENTRY | {"detections": [DOG | {"color": None, "color_scores": {"white": 0.5, "red": 0.5}}, CAT]}
    ],
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME.keys())
def test_every_accepted_spelling_reads_alike(tmp_path, content):
    image = read_detections(write(tmp_path, content))[0]
    assert (image.name, image.metadata, image.detections) == ("00003/samples/0000.png", METADATA, FOUND)


def test_metadata_from_its_own_file(tmp_path):
    other = METADATA | {"prompt": "other", "include": [{"class": "cat", "count": 1}]}
    lines = write(tmp_path, "\n".join(json.dumps(line) for line in (other, other, other, METADATA)), "prompts.jsonl")
    entries = [
        {"name": "00003/samples/0000.png", "detections": []},
        {"index": 3, "detections": []},
        {"prompt": METADATA["prompt"], "detections": []},
    ]
    path = write(tmp_path, entries)
    assert [image.metadata for image in read_detections(path, lines)] == [METADATA] * 3
    bare = write(tmp_path, {"00003/samples/0000.png": [DOG]}, "bare.json")
    assert read_detections(bare, lines)[0].metadata == METADATA
    with pytest.raises(UsageError, match="--metadata"):
        read_detections(path)
    for wrong in ({"index": 4}, {"prompt": "never asked"}, {"name": "x.png"}):
        with pytest.raises(UsageError):
            read_detections(write(tmp_path, [wrong | {"detections": []}], "wrong.json"), lines)


def test_the_official_results_file_is_judged_again_alike(tmp_path):
    metadata = {"tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}]}
    rows = [
        {
            "filename": "0.png",
            "tag": "counting",
            "prompt": "p",
            "correct": True,
            "reason": "",
            "metadata": json.dumps(metadata),
            "details": json.dumps({"dog": [[0, 0, 9, 9, 0.95]]}),
        },
        {
            "filename": "1.png",
            "tag": "counting",
            "prompt": "p",
            "correct": False,
            "reason": "expected dog<2, found 2",
            "metadata": json.dumps(metadata),
            "details": json.dumps({"dog": [[0, 0, 9, 9, 0.95], [1, 1, 8, 8, 0.95]]}),
        },
    ]
    images = read_detections(write(tmp_path, "\n".join(json.dumps(row) for row in rows), "results.jsonl"))
    report = score_detections(images)
    assert [(verdict.correct, verdict.reason) for verdict in report.verdicts] == [
        (row["correct"], row["reason"]) for row in rows
    ]
    assert report.summary.overall == 0.5 and report.summary.correct_prompts == 1.0
    # Best first, equals later-first: that order must survive the second reading.
    assert images[1].detections[-1].box_xyxy == (0.0, 0.0, 9.0, 9.0)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no images"),
        ("[1, 2", "line 1: not JSON"),
        ("3", "is 3"),
        ([], "no images"),
        ([5], "image 0: is 5"),
        ([{"detections": []}], "has no metadata"),
        ([ENTRY | {"metadata": "{"}], "not JSON"),
        ([ENTRY | {"metadata": {"include": []}}], "tag None"),
        ([ENTRY | {"detections": None}], "detections is None"),
        ([ENTRY | {"detections": {"dog": 3}}], "detections is"),
        ([ENTRY | {"detections": [3]}], "detection 3"),
        ([ENTRY | {"detections": [{"score": 1}]}], "no class name"),
        ([ENTRY | {"detections": [DOG | {"box": [1, 2, 3]}]}], r"box \[1, 2, 3\]"),
        ([ENTRY | {"detections": [DOG | {"box": [1, 2, 3, "x"]}]}], "box 'x'"),
        ([ENTRY | {"detections": [DOG | {"score": None}]}], "score None"),
        ([ENTRY | {"detections": [DOG | {"color": 3}]}], "color 3"),
        ([ENTRY | {"detections": [DOG | {"color": None, "color_scores": [1, 2]}]}], "2 color scores"),
        ([ENTRY | {"detections": [DOG | {"color": None, "color_scores": {"gold": 1}}]}], "'gold'"),
    ],
)
def test_unreadable_files_are_refused_by_name(tmp_path, content, named):
    with pytest.raises(UsageError, match=named):
        read_detections(write(tmp_path, content))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_detections(tmp_path / "none.json")
    with pytest.raises(UsageError, match="line 2"):
        read_metadata(write(tmp_path, json.dumps(METADATA) + "\n{}\n"))


def image(metadata, *detections, name="a.png"):
    return {"name": name, "metadata": metadata, "detections": list(detections)}


def asks(label, **extra):
    return {"tag": "single_object", "include": [{"class": label, "count": 1, **extra}], "prompt": "p"}


def score(tmp_path, *images):
    return score_detections(read_detections(write(tmp_path, list(images)))).summary.overall


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("computer keyboard", "keyboard"),
        ("dog", "Dog"),
        ("TV Remote", "remote"),
        ("stop sign", "stop_sign"),
        ("potted plant", "pottedplant"),
        ("couch", " Sofa "),
        ("keyboard", "computer keyboard"),
        ("motorcycle", "MOTORBIKE"),
        ("wine glass", "wine-glass"),
        ("circle", "Circle"),
    ],
)
def test_classes_are_matched_by_alias_and_case(tmp_path, asked, found):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(tmp_path, image(asks(asked), DOG | {"class": found})) == 1.0
        counted = asks(asked) | {"tag": "counting", "exclude": [{"class": asked, "count": 2}]}
        assert score(tmp_path, image(counted, *[DOG | {"class": found, "score": 0.95}] * 2)) == 0.0


@pytest.mark.parametrize(("asked", "found"), [("red", "Red"), ("Red", "red"), ("WHITE", " white")])
def test_colors_are_matched_by_case(tmp_path, asked, found):
    assert score(tmp_path, image(asks("dog", color=asked), DOG | {"color": found})) == 1.0


def test_names_that_nobody_knows_are_said(tmp_path):
    with pytest.warns(UserWarning) as said:
        score(
            tmp_path,
            image(asks("computer keybord", color="gold"), DOG | {"class": "computer keyboard"}),
            image(asks("dog"), DOG | {"class": "doge", "color": "crimson"}, CAT, name="b.png"),
        )
    assert [str(warning.message) for warning in said] == [
        "class 'doge', in 1 detections, is in no prompt, did you mean dog?",
        "class 'computer keybord', which prompts ask for, is in no detection, did you mean computer keyboard?",
        "color 'crimson', in 1 detections, is in no prompt",
        "color 'gold', which prompts ask for, is in no detection",
    ]


COUNTING = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([image({"tag": "counting", "prompt": "three dogs"})], "nothing to judge"),
        ([image({"tag": "counting", "include": [], "prompt": "three dogs"})], "nothing to judge"),
        (
            [image({"tag": "counting", "includes": COUNTING["include"]})],
            "unknown key 'includes', did you mean include",
        ),
        ([image(COUNTING | {"excluded": []})], "did you mean exclude"),
        ([image(COUNTING | {"tag": "Counting"})], "tag 'Counting', did you mean counting"),
        ([image(COUNTING | {"tag": "objects"})], "tag 'objects'"),
        ([image(asks("dog", colour="red"))], "unknown key 'colour', did you mean color"),
        ([image(asks("dog", count=0))], "count 0"),
        ([image(asks("dog", color=""))], "color ''"),
        ([image(asks("dog"), DOG | {"score": 97})], "score 97, expected 0 to 1"),
        ([image(asks("dog"), DOG | {"score": -0.1})], "score -0.1"),
        ([image(asks("dog"), DOG | {"box": [100, 100, 50, 50]})], "box_xywh"),
        ([image(asks("dog"), DOG), image(asks("dog"), DOG)], r"image a\.png appears twice"),
        ('{"a.png": {"detections": []}, "a.png": {"detections": []}}', "twice in one object"),
        ([image('{"tag": "counting", "tag": "colors"}')], "twice in one object"),
    ],
)
def test_what_does_not_add_up_is_refused(tmp_path, images, named):
    with pytest.raises(UsageError, match=named):
        score_detections(read_detections(write(tmp_path, images)))


def test_a_probability_that_rounding_put_above_one_is_taken(tmp_path):
    assert score(tmp_path, image(asks("dog"), DOG | {"score": 1.0000001})) == 1.0


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("threshold", 30),
        ("threshold", -1),
        ("threshold", float("nan")),
        ("counting_threshold", "0.9"),
        ("max_overlap", 2),
        ("max_per_class", 0),
        ("max_per_class", 1.5),
        ("position_margin", float("inf")),
    ],
)
def test_rules_outside_of_their_range_are_refused(tmp_path, rule, value):
    images = read_detections(write(tmp_path, [image(asks("dog"), DOG)]))
    with pytest.raises(UsageError, match=rule):
        score_detections(images, **{rule: value})


def test_metadata_that_fits_two_lines_or_another_prompt_is_refused(tmp_path):
    dog, cat = asks("dog"), asks("cat")  # the same caption
    lines = write(tmp_path, [dog, cat, dog | {"prompt": "q"}], "prompts.json")
    bare = [{"name": "a", "prompt": "p", "detections": []}]
    with pytest.raises(UsageError, match="is in the metadata file twice; give the index"):
        read_detections(write(tmp_path, bare), lines)
    with pytest.raises(UsageError, match="line 3 of the metadata file has prompt 'q'"):
        read_detections(write(tmp_path, [bare[0] | {"index": 2}]), lines)
    with pytest.warns(UserWarning, match=r"2 of 3 lines .* have no image and are not scored; the first: line 2"):
        read_detections(write(tmp_path, [bare[0] | {"index": 0}]), lines)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "tag",
                    "include",
                    "metadata",
                    "detections",
                    "details",
                    "class",
                    "count",
                    "score",
                    "box",
                    "color",
                    "color_scores",
                    "images",
                    "position",
                    "dog",
                    *COLORS[:1],
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(json_values, st.sampled_from(["entry", "metadata", "detections", "detection", "whole"]))
def test_whatever_the_file_holds_the_answer_is_a_report_or_a_usage_error(tmp_path, value, where):
    content = {
        "whole": value,
        "entry": [value],
        "metadata": [ENTRY | {"metadata": value}],
        "detections": [ENTRY | {"detections": value}],
        "detection": [ENTRY | {"detections": [value]}],
    }[where]
    try:
        report = score_detections(read_detections(write(tmp_path, content)))
    except UsageError as error:
        assert str(error)
    else:
        assert len(report.verdicts) == len(report.images) >= 1
