"""What production calls: one prompt is one prompt, seeds of every kind, and the call of diffusers."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from benchmarks.relaunch import RelaunchRecorder
from stagevar.engine import GraphEngine
from stagevar.errors import UsageError
from stagevar.profile.pipeline import Pipeline
from stagevar.prompts.requests import check_seeds
from stagevar.sampling.sampler import Sampler
from tests.fakes.late_text import LateText
from tests.stagevar.profile.test_profile import MODEL, make

TEXT = "a photo of a red circle"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(make(), Sampler(MODEL))


def same(a, b):
    return [np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)]


def test_one_text_is_one_prompt(pipeline):
    assert same(pipeline.generate(TEXT), pipeline.generate([TEXT], [0])) == [True]
    assert same(pipeline.generate(TEXT, 7), pipeline.generate([TEXT], [7])) == [True]
    assert same(pipeline.generate(np.str_(TEXT), 7), pipeline.generate(np.array([TEXT]), [7])) == [True]
    assert len(pipeline.generate(prompt for prompt in (TEXT, TEXT))) == 2


@pytest.mark.parametrize(
    "seeds",
    [
        [3, 4], (3, 4), range(3, 5), np.array([3, 4]), torch.tensor([3, 4]), np.array([3, 4], np.uint8), 3, [3.0, 4],
        [np.int32(3), torch.tensor(4)], pytest.param(iter([3, 4]), id="an iterator"), np.array(3), torch.tensor(3), np.int64(3),
    ],
    ids=str,
)  # fmt: skip
def test_seeds_of_every_kind(pipeline, seeds):
    assert same(pipeline.generate([TEXT, TEXT], seeds), pipeline.generate([TEXT, TEXT], [3, 4])) == [True, True]


@pytest.mark.parametrize(
    "make_generator",
    [
        lambda: torch.Generator().manual_seed(5), lambda: np.random.default_rng(5), lambda: np.random.RandomState(5),
        lambda: random.Random(5),
    ],
    ids=["torch", "numpy", "numpy legacy", "random"],
)  # fmt: skip
def test_generators_are_drawn_from_and_move_on(make_generator):
    generator = make_generator()
    first, second = check_seeds(generator, 3), check_seeds(generator, 3)
    assert first == check_seeds(make_generator(), 3) and len({*first, *second}) == 6
    assert check_seeds([make_generator(), make_generator()], 2)[0] == check_seeds(make_generator(), 1)[0]


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ([], {}, "no prompts were given"),
        (None, {}, "prompts None must be text or a list of texts"),
        (3, {}, "prompts 3 must be text"),
        ([None], {}, "prompt 0 is None; it must be text"),
        ([TEXT, 3], {}, "prompt 1 is 3; it must be text"),
        ([{"prompt": TEXT}], {}, "prompt 0 is .*it must be text"),
        ({"prompt": TEXT}, {}, "must be text or a list"),
        (TEXT.encode(), {}, "must be text or a list"),
        ([TEXT.encode()], {}, "prompt 0 is b'a photo"),
        (["a photo \ud83d"], {}, "half a character"),
        ([[TEXT]], {}, "prompt 0 is"),
        (TEXT, {"seeds": [1, 2]}, "one per prompt: 1, not more"),
        ([TEXT, TEXT], {"seeds": [1]}, "one per prompt: 2, not 1"),
        ([TEXT], {"seeds": []}, "one per prompt: 1, not 0"),
        ([TEXT], {"seeds": [1.5]}, "seed 0 is 1.5; it must be a whole number"),
        ([TEXT], {"seeds": float("nan")}, "seed is nan"),
        ([TEXT], {"seeds": ["7"]}, "seed 0 is '7'"),
        ([TEXT], {"seeds": "7"}, "seeds '7' must be"),
        ([TEXT], {"seeds": True}, "seeds True must be"),
        ([TEXT], {"seeds": [None]}, "seed 0 is None"),
        ([TEXT], {"seeds": np.ones((1, 2), int)}, r"seed 0 is \[1, 1\]"),
        ([TEXT, TEXT], {"negative": ["blurry"]}, "one text or one per prompt: 2, not 1"),
        ([TEXT], {"negative": ["a", "b"]}, "one text or one per prompt: 1, not 2"),
        ([TEXT], {"negative": [3]}, "negative prompt 0 is 3"),
        ([TEXT], {"negative": 3}, "negative prompts 3 must be text"),
    ],
)
def test_unusable_requests_are_one_line(pipeline, prompts, options, match):
    with pytest.raises(UsageError, match=match) as caught:
        pipeline.generate(prompts, **options)
    assert "\n" not in str(caught.value)


def test_one_negative_text_is_for_every_prompt(pipeline):
    def drawn(negative):
        return pipeline.generate([TEXT] * 2, [7, 8], negative=negative)

    whole = drawn("blurry and dark")
    assert same(whole, drawn(["blurry and dark"] * 2)) == [True, True]
    assert same(whole, drawn(["b", "l"])) != [True, True] and same(whole, drawn(None)) != [True, True]


def test_batches_of_the_profile_draw_the_same_images(pipeline):
    texts = [TEXT, "a photo of two blue stars", TEXT]
    together = Pipeline(make(envelope=dataclasses.replace(make().envelope, batch=2)), pipeline.sampler)
    sizes = []
    begin = pipeline.sampler.begin
    pipeline.sampler.begin = lambda prompts, *rest, **options: (
        sizes.append(len(prompts)) or begin(prompts, *rest, **options)
    )
    try:
        one_by_one, by_two = pipeline.generate(texts, 5), together.generate(texts, 5)
    finally:
        del pipeline.sampler.begin
    assert sizes == [1, 1, 1, 2, 1]
    worst = max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(one_by_one, by_two, strict=True))
    assert worst <= 1


def test_threads_are_the_profiles_for_the_length_of_a_call(pipeline):
    before, during = torch.get_num_threads(), []
    decode = pipeline.sampler.decode
    pipeline.sampler.decode = lambda generation: during.append(torch.get_num_threads()) or decode(generation)
    torch.set_num_threads(2)
    try:
        pipeline.generate(TEXT)
        assert during == [1] and torch.get_num_threads() == 2
    finally:
        del pipeline.sampler.decode
        torch.set_num_threads(before)


def test_it_is_called_as_pipelines_of_diffusers_are(pipeline):
    out = pipeline(prompt=TEXT, num_images_per_prompt=2, seed=7, height=24, width=24)
    assert same(out.images, pipeline.generate([TEXT, TEXT], [7, 8])) == [True, True] and out.seeds == [7, 8]
    two = pipeline([TEXT, "a star"], negative_prompt=["x", "y"], num_images_per_prompt=2, seed=[1, 2, 3, 4])
    expected = pipeline.generate([TEXT, TEXT, "a star", "a star"], [1, 2, 3, 4], ["x", "x", "y", "y"])
    assert same(two.images, expected) == [True] * 4
    first = pipeline(TEXT, generator=torch.Generator().manual_seed(3)).images
    assert same(first, pipeline(TEXT, generator=torch.Generator().manual_seed(3)).images) == [True]
    generators = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)]
    assert same(first, pipeline(TEXT, num_images_per_prompt=2, generator=generators).images[:1]) == [True]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 512}, "height 512: the profile draws 24 pixels"),
        ({"width": "24"}, "width '24': the profile draws 24"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0 must be at least 1"),
        ({"num_images_per_prompt": 1.0}, "num_images_per_prompt 1.0 must be a whole number"),
        ({"num_inference_steps": 4}, "num_inference_steps is not an option of this pipeline"),
        ({"seed": 1, "generator": torch.Generator()}, "either generator= or seed="),
        ({"prompt": None}, "prompts None must be text"),
    ],
)
def test_what_a_call_cannot_do_is_refused(pipeline, options, match):
    with pytest.raises(UsageError, match=match):
        pipeline(**{"prompt": TEXT, **options})


def test_the_sampler_checks_what_it_is_given_too():
    sampler = Sampler(MODEL)
    steps = make().expand(MODEL)
    assert np.array_equal(sampler.generate(TEXT, 7, steps), sampler.generate([TEXT], [7], steps))
    with pytest.raises(UsageError, match="one per prompt: 2, not 1"):
        sampler.begin([TEXT, TEXT], [1])
    with pytest.raises(UsageError, match="one text or one per prompt: 2, not 1"):
        sampler.begin([TEXT, TEXT], [1, 2], negative=["x"])


def test_after_warming_no_image_waits_for_a_recording():
    """Each text bucket is recorded once; a prompt of any length in it replays."""
    engine = GraphEngine(RelaunchRecorder())
    pipeline = Pipeline(make(), Sampler(MODEL, engine=engine))
    assert pipeline.warm(lengths=(3, 33), batches=(1, 2)) > 0
    recorded = engine.recorded
    (rows_TC,) = MODEL.text.encode([TEXT])
    long_TC = torch.randn(60, rows_TC.shape[1], generator=torch.Generator().manual_seed(0))
    image = pipeline.generate(TEXT, 1)
    pipeline.generate("long", 2, encoded=[long_TC])
    assert engine.recorded == recorded > 0, "prompts of a length that was warmed were recorded again"
    pipeline.generate("longer", 2, encoded=[torch.cat([long_TC, long_TC])])
    assert engine.recorded > recorded
    assert same(image, Pipeline(make(), Sampler(MODEL, engine=GraphEngine(RelaunchRecorder()))).generate(TEXT, 1)) == [
        True
    ]


def test_warming_loads_the_text_encoder_even_if_its_prompts_are_cached(tmp_path):
    """At the second start on one machine, when every prompt of the warm-up is on disk."""
    (rows_TC,) = MODEL.text.encode([TEXT])
    for _ in range(2):
        text = LateText(rows_TC.shape[1], tmp_path)
        Pipeline(make(), Sampler(dataclasses.replace(MODEL, text=text))).warm()
        assert text.loaded


@pytest.mark.parametrize(("options", "says"), [
    ({"lengths": (0,)}, "warm: length 0 must be"), ({"batches": (True,)}, "warm: batch True must be"),
])  # fmt: skip
def test_warming_wants_whole_numbers(pipeline, options, says):
    with pytest.raises(UsageError, match=says):
        pipeline.warm(**options)
