"""The checker reads scenes back from their pixels."""

import numpy as np
import pytest

from stagevar.models.nano import drawing, scenes
from stagevar.models.nano.checker import check, check_batch, detect


@pytest.fixture(scope="module")
def world():
    world = scenes.sample(300, np.random.default_rng(77))
    return world, drawing.draw(world)


def test_right_on_fresh_scenes(world):
    scene, image = world
    assert check_batch(image, scene.metadata).mean() >= 0.99


def test_reads_every_object_with_its_box(world):
    scene, image = world
    for b in range(60):
        found = sorted((d.class_name, d.color, d.texture) for d in detect(image[b]))
        count = range(scene.count_B[b])
        true = sorted(
            (
                scenes.SHAPES[scene.shape_BK[b, k]],
                scenes.COLORS[scene.color_BK[b, k]],
                scenes.TEXTURES[scene.texture_BK[b, k]],
            )
            for k in count
        )
        assert found == true
        centers = sorted(((d.box_xyxy[0] + d.box_xyxy[2]) / 2) for d in detect(image[b]))
        assert np.allclose(centers, sorted(scene.center_BK2[b, k, 0] * 64 for k in count), atol=1.0)


def test_wrong_on_another_prompt_of_the_same_task(world):
    scene, image = world
    rng = np.random.default_rng(0)
    right = []
    for b, meta in enumerate(scene.metadata):
        others = [m for m in scene.metadata if m["tag"] == meta["tag"] and m["prompt"] != meta["prompt"]]
        right.append(check(image[b], others[int(rng.integers(len(others)))]).correct)
    assert np.mean(right) <= 0.2


def test_works_at_the_gpu_presets_size():
    scene = scenes.sample(60, np.random.default_rng(8))
    assert check_batch(drawing.draw(scene, 96), scene.metadata).mean() >= 0.98


def test_nothing_found_in_background_and_noise():
    assert detect(np.full((3, 48, 48), 0.2, dtype=np.float32)) == []
    noise = np.random.default_rng(0).random((3, 48, 48)).astype(np.float32)
    assert all(d.score < 0.9 for d in detect(noise))


def test_every_color_and_texture_of_every_shape():
    rng = np.random.default_rng(1)
    for texture in scenes.TEXTURES:
        for shape in scenes.SHAPES:
            metas = [
                scenes.metadata_of("texture", [scenes.clause(shape, 1, color, texture)]) for color in scenes.COLORS
            ]
            scene = scenes.arrange(metas, rng)
            assert check_batch(drawing.draw(scene), metas).all(), (shape, texture)
