"""Prompt sets: the generator's balance and wording, subsets that keep shares, files of every kind."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from stagevar.errors import UsageError
from stagevar.prompts.geneval import COLORS, TAGS, check_metadata
from tuner.metrics.prompt_sets import (
    COCO_CLASSES,
    generate,
    read_prompts,
    stratified_subset,
    subset_rank_correlation,
    write_metadata,
)


def test_the_generator_is_valid_distinct_and_balanced():
    prompts = generate(480, seed=3)
    for metadata in prompts:
        check_metadata(metadata)
        assert metadata["prompt"].startswith("a photo of ")
        assert {clause["class"] for clause in metadata["include"]} <= set(COCO_CLASSES)
    assert len({metadata["prompt"] for metadata in prompts}) == 480
    assert Counter(metadata["tag"] for metadata in prompts) == dict.fromkeys(TAGS, 80)
    counts = Counter(metadata["include"][0]["count"] for metadata in prompts if metadata["tag"] == "counting")
    assert set(counts) == {2, 3, 4} and max(counts.values()) - min(counts.values()) <= 1
    colors = Counter(metadata["include"][0]["color"] for metadata in prompts if metadata["tag"] == "colors")
    assert set(colors) == set(COLORS) and max(colors.values()) - min(colors.values()) <= 1
    assert {metadata["include"][0]["class"] for metadata in prompts if metadata["tag"] == "single_object"} == set(
        COCO_CLASSES
    )


def test_wording_and_metadata_follow_the_benchmark():
    by_tag = {metadata["tag"]: metadata for metadata in generate(6, seed=0)}
    wanted = by_tag["counting"]["include"][0]
    assert by_tag["counting"]["exclude"] == [wanted | {"count": wanted["count"] + 1}]
    target, subject = by_tag["position"]["include"]
    relation, group = subject["position"]
    assert group == 0 and by_tag["position"]["prompt"].split(f" {relation} ")[1].endswith(target["class"])
    assert "person" not in {
        clause["class"]
        for metadata in generate(900)
        if metadata["tag"] in ("colors", "color_attr")
        for clause in metadata["include"]
    }
    first, second = by_tag["color_attr"]["include"]
    assert first["class"] != second["class"] and first["color"] != second["color"]


def test_the_same_seed_gives_the_same_and_a_longer_set_starts_alike():
    assert generate(60, seed=5) == generate(120, seed=5)[:60]
    assert generate(60, seed=5) != generate(60, seed=6)
    assert {metadata["tag"] for metadata in generate(7, tags=["colors"])} == {"colors"}


def test_more_prompts_than_exist_are_refused():
    assert len(generate(80, tags=["single_object"])) == 80
    with pytest.raises(UsageError, match="only 80 distinct"):
        generate(81, tags=["single_object"])
    with pytest.raises(UsageError, match="poetry"):
        generate(5, tags=["poetry"])


def test_a_subset_keeps_every_tag_in_its_share():
    prompts = [{"tag": tag, "prompt": ""} for tag, count in (("a", 80), ("b", 99), ("c", 20)) for _ in range(count)]
    indices = stratified_subset(prompts, 50, seed=1)
    assert indices == sorted(set(indices)) and len(indices) == 50
    counts = Counter(prompts[index]["tag"] for index in indices)
    for tag, whole in (("a", 80), ("b", 99), ("c", 20)):
        assert abs(counts[tag] - 50 * whole / 199) < 1
    assert stratified_subset(prompts, 50, seed=2) != indices
    assert stratified_subset(prompts, 199) == list(range(199))
    for count in (0, 200):
        with pytest.raises(UsageError, match="ask for 1 to 199"):
            stratified_subset(prompts, count)


def test_larger_subsets_rank_systems_better():
    rng = np.random.default_rng(0)
    prompts = generate(240)
    values = (rng.random((8, 240)) < np.linspace(0.4, 0.75, 8)[:, None]).astype(float)
    small, large = (subset_rank_correlation(values, prompts, count, draws=60) for count in (12, 120))
    assert small["spearman_mean"] < large["spearman_mean"] and large["spearman_mean"] > 0.9
    assert subset_rank_correlation(values, prompts, 240, draws=2)["spearman_mean"] == pytest.approx(1.0)
    with pytest.raises(UsageError, match="at least 3 systems"):
        subset_rank_correlation(values[:2], prompts, 12)
    with pytest.raises(UsageError, match="same mean"):
        subset_rank_correlation(np.ones((3, 240)), prompts, 12)


def test_files_of_every_kind(tmp_path):
    prompts = generate(12)
    write_metadata(prompts, tmp_path / "p.jsonl")
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "x", "file": "a.png"}) + "\n")
    assert read_prompts(tmp_path / "plain.jsonl") == [{"prompt": "x", "file": "a.png"}]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "p.txt") == [{"prompt": "one"}, {"prompt": "two"}]
    dpg = tmp_path / "dpg"
    dpg.mkdir()
    for name, text in (("partiprompts2", "b"), ("COCOval1", "a\n")):
        (dpg / f"{name}.txt").write_text(text)
    assert read_prompts(dpg) == [{"item_id": "COCOval1", "prompt": "a"}, {"item_id": "partiprompts2", "prompt": "b"}]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("p.jsonl", "{", "line 1: not JSON"),
        ("p.jsonl", '{"text": "x"}', "line 1 has no text"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.txt", "\n", "holds no prompt"),
        ("p.jsonl", '{"tag": "colors", "include": 3}', "line 1"),
    ],
)
def test_unreadable_prompt_files_are_refused(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=named):
        read_prompts(tmp_path / name)
