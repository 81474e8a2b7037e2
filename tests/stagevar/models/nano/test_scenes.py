"""The scenes are seeded, obey their prompts, keep their splits apart and never show an unseen pair in training."""

import itertools

import numpy as np
import pytest

from stagevar.errors import UsageError
from stagevar.models.nano import drawing, scenes
from stagevar.prompts.geneval import check_metadata, relations


def test_same_seed_same_scenes():
    draws = [drawing.draw(scenes.sample(16, np.random.default_rng(3))) for _ in range(2)]
    assert np.array_equal(*draws)
    assert not np.array_equal(draws[0], drawing.draw(scenes.sample(16, np.random.default_rng(4))))


@pytest.mark.parametrize("size", [64, 128])
def test_drawing_scales_with_the_image_size(size):
    world = scenes.sample(8, np.random.default_rng(0))
    image = drawing.draw(world, size)
    assert image.shape == (8, 3, size, size)
    assert image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    coarse = image.reshape(8, 3, 64, size // 64, 64, size // 64).mean((3, 5))
    assert np.abs(coarse - drawing.draw(world, 64)).mean() < 0.01


def test_wording_follows_geneval():
    texts = {m["prompt"] for tag in scenes.TASKS for c in (False, True) for m in scenes.all_captions(tag, c)}
    assert "a photo of two red rings" in texts
    assert "a photo of a blue square left of a green star" in texts
    assert "a photo of an orange circle and a red star" in texts
    assert "a photo of a striped purple ring" in texts
    assert max(len(text.split()) for text in texts) == scenes.LONGEST_CAPTION


def test_metadata_is_geneval_metadata():
    for split in scenes.SPLITS:
        for meta in scenes.prompts(split, 70, seed=2):
            check_metadata(meta)
            if meta["tag"] == "counting":
                assert meta["exclude"][0]["count"] == meta["include"][0]["count"] + 1


def test_scenes_hold_exactly_what_the_prompt_names():
    world = scenes.sample(400, np.random.default_rng(1))
    for b, meta in enumerate(world.metadata):
        assert world.count_B[b] == sum(item["count"] for item in meta["include"]) <= scenes.MAX_OBJECTS
        k = 0
        for item in meta["include"]:
            for _ in range(item["count"]):
                assert scenes.SHAPES[world.shape_BK[b, k]] == item["class"]
                assert item.get("color", (c := scenes.COLORS[world.color_BK[b, k]])) == c
                assert item.get("texture", (t := scenes.TEXTURES[world.texture_BK[b, k]])) == t
                k += 1


def test_objects_stay_apart_inside_the_image_and_in_relation():
    world = scenes.sample(400, np.random.default_rng(2))
    low, high = world.center_BK2 - world.radius_BK[..., None], world.center_BK2 + world.radius_BK[..., None]
    for b, meta in enumerate(world.metadata):
        count = world.count_B[b]
        assert (low[b, :count] > 0).all() and (high[b, :count] < 1).all()
        for i, j in itertools.combinations(range(count), 2):
            gap = np.maximum(low[b, i] - high[b, j], low[b, j] - high[b, i]).max()
            assert gap > 2 / scenes.LATTICE
        if meta["tag"] == "position":
            boxes = [(*low[b, k] * 48, *high[b, k] * 48) for k in (1, 0)]
            relation = meta["include"][1]["position"][0]
            assert relation in relations(*boxes)
            along = 0 if relation in ("left of", "right of") else 1
            places = world.center_BK2[b, :2] - 0.5
            assert places[0, along] * places[1, along] < 0 and abs(places[:, 1 - along].mean()) < 0.1


def test_unseen_pairs_are_a_tenth_and_never_drawn_in_training():
    assert len(scenes.UNSEEN_PAIRS) == 5  # of 48
    world = scenes.sample(3000, np.random.default_rng(5))
    pairs = {
        (scenes.SHAPES[world.shape_BK[b, k]], scenes.COLORS[world.color_BK[b, k]])
        for b in range(len(world))
        for k in range(world.count_B[b])
    }
    assert not pairs & scenes.UNSEEN_PAIRS
    assert len(pairs) == 43
    assert all(m["unseen"] for m in scenes.prompts("unseen", 60))
    assert not any(m["unseen"] for split in ("train", "search", "heldout") for m in scenes.prompts(split, 200))


def test_splits_share_no_text_of_a_cut_family():
    for tag in ("counting", "position", "color_attr", "texture"):
        texts = [{m["prompt"] for m in scenes.split_captions(tag, True, split)} for split in scenes.SPLITS]
        assert all(texts)
        for a, b in itertools.combinations(texts, 2):
            assert not a & b


def test_prompts_are_stratified_seeded_and_indexed():
    found = scenes.prompts("heldout", 512, seed=0)
    counts = {t: sum(m["tag"] == t for m in found) for t in scenes.TASKS}
    assert set(counts.values()) <= {73, 74}
    assert [m["index"] for m in found] == list(range(512))
    assert found == scenes.prompts("heldout", 512, seed=0)
    assert found != scenes.prompts("heldout", 512, seed=1)
    assert scenes.prompts("heldout", 100, seed=0) == found[:100]
    # A family is used up before it repeats.
    singles = [m["prompt"] for m in found if m["tag"] == "single_object"]
    assert len(set(singles[:6])) == 6


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: scenes.prompts("test", 3), "'test'"),
        (lambda: scenes.prompts("search", 3, tasks=("colours",)), "'colours'"),
        (lambda: scenes.prompts("unseen", 3, tasks=("single_object",)), "unseen"),
    ],
)
def test_bad_requests_are_named(call, word):
    with pytest.raises(UsageError, match=word):
        call()


def test_texture_marks_repeat_every_patch():
    """Every patch of an object carries the same marks, so coarse scales can say which."""
    for name in scenes.TEXTURES:
        marks = drawing.marks(scenes.TEXTURES.index(name), 64)
        assert np.array_equal(marks, np.tile(marks[:4, :4], (16, 16)))


def test_cells_share_out_what_covers_them():
    world = scenes.sample(64, np.random.default_rng(3))
    fine = scenes.cells(world, 64).reshape(64, 64, 64, -1)
    for group in np.split(fine, np.cumsum(scenes.NAMES)[:-1], axis=-1):
        assert np.allclose(group.sum(-1), 1.0, atol=1e-5)
    for b in range(64):
        for k in range(world.count_B[b]):
            x, y = (int(v * 64) for v in world.center_BK2[b, k])
            shape, color, texture = np.split(fine[b, y, x], np.cumsum(scenes.NAMES)[:-1])
            assert shape.argmax() == 1 + world.shape_BK[b, k]
            assert color.argmax() == 1 + world.color_BK[b, k]
            assert texture.argmax() == 1 + world.texture_BK[b, k]
    # A coarse grid holds the averages of a fine one.
    halves = fine.reshape(64, 2, 32, 2, 32, -1).mean((2, 4)).reshape(64, 4, -1)
    assert np.allclose(halves, scenes.cells(world, 2), atol=1e-5)
