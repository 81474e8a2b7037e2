"""The model behind the desk: Infinity's ratio templates over one set of weights, graphs' fixed batches, guidance, memory."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.relaunch import RelaunchRecorder
from stagevar.engine import GraphEngine
from stagevar.engine.recorder import RecordingFailed
from stagevar.errors import DeviceBroken, OutOfDeviceMemory
from stagevar.models import fused
from stagevar.models.base import Sampling
from stagevar.models.registry import load_model
from stagevar.models.request import ModelRequest
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import paper
from stagevar.serving import drawing
from stagevar.serving.answers import models_data
from stagevar.serving.desk import Order, Shape
from stagevar.serving.drawing import Loading, guided, load_artist
from tests.fakes.late_text import LateText

pytestmark = pytest.mark.filterwarnings("ignore:infinity-tiny uses made-up text")
PROMPT = "a photo of two blue stars"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """infinity-tiny's random weights as files: a profile of weights that are drawn anew would be refused."""
    folder, model = tmp_path_factory.mktemp("weights"), load_model("infinity-tiny", weights="random", device="cpu")
    for name, module in (("transformer", model.transformer), ("vae", model.tokenizer)):
        state = {key: value.contiguous().clone() for key, value in module.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    return {"weights": str(folder / "transformer.safetensors"), "tokenizer": str(folder / "vae.safetensors")}


def load(weights, **options):
    return load_model("infinity-tiny", device="cpu", **weights, **options)


@pytest.fixture(scope="module")
def artist(weights):
    model = load(weights)
    schedule = paper(model.grids)
    profile = Profile(
        model={"name": model.name, "weights": model.provenance["weights"], "load": model.provenance["load"]},
        schedule=schedule,
        steps=steps_to_data(schedule.expand(model.grids, len(model.transformer.chunk_layers))),
        sampling={},
        envelope=present_envelope(model, batch=2, threads=1),
        verified=False,
        verdict="made by a test",
    )
    return load_artist(Loading(ModelRequest(model.name, device="cpu", **weights), profile))


def orders(artist, size, *seeds, **shape):
    return [Order(PROMPT, seed, Shape(size, artist.served[0].id, **shape)) for seed in seeds]


def test_the_sizes_are_infinitys_templates_at_the_profiles_resolution(artist):
    sizes = artist.offer.sizes
    assert sizes[0] == (256, 256) and len(set(sizes)) == 15
    assert (256, 256) in sizes and all(0.04e6 < width * height < 0.09e6 for width, height in sizes)
    assert {(height, width) for width, height in sizes} == set(sizes), "upright and lying"


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5])
def test_an_image_of_a_template_is_that_of_a_model_loaded_for_it(artist, weights, ratio):
    model = load(weights, ratio=ratio)
    height, width = model.pixels
    steps = artist.served[0].schedule.expand(model.grids, len(model.transformer.chunk_layers))
    expected = Sampler(model).generate([PROMPT], [3], steps)[0]
    [drawn] = artist.draw(orders(artist, (width, height), 3))
    assert drawn.pixels.shape == (height, width, 3) and np.array_equal(drawn.pixels, expected)
    assert len(drawn.scale_ms) == len(model.grids) and sum(drawn.scale_ms) > 0 and drawn.text_ms > 0 < drawn.decode_ms


def test_weights_are_shared_and_caches_of_few_sizes_are_kept(artist):
    for size in artist.offer.sizes[:4]:
        artist.draw(orders(artist, size, 1))
    assert len(artist._samplers) == drawing.SIZES_KEPT
    one, other = (sampler.model for sampler, _ in artist._samplers.values())
    shared = {parameter.data_ptr() for parameter in one.transformer.parameters()}
    assert shared == {parameter.data_ptr() for parameter in other.transformer.parameters()}


# ------------------------------------------------------------------------------------------------ nano


@pytest.fixture
def nano():
    return load_artist(Loading(ModelRequest("nano", device="cpu"), batch=4))


class Recording(drawing.TimedSampler):
    """The sampler over a recorder that needs no card; notes the batches."""

    made: list[int]

    def __init__(self, model, engine):
        super().__init__(model, "eager")
        self.engine = GraphEngine(RelaunchRecorder())

    def begin(self, prompts, *args, **options):
        self.made.append(len(prompts))
        return super().begin(prompts, *args, **options)


def test_recorded_graphs_are_of_one_image_or_the_whole_batch(nano, monkeypatch):
    plain = [nano.draw(orders(nano, (64, 64), seed))[0].pixels for seed in range(4)]
    monkeypatch.setattr(Recording, "made", [], raising=False)
    monkeypatch.setattr(drawing, "TimedSampler", Recording)
    nano.engine, nano._samplers = "graph", {}
    for count in (1, 2, 3, 4):
        drawn = nano.draw(orders(nano, (64, 64), *range(count)))
        assert len(drawn) == count and {one.batch for one in drawn} == {count}
        for one, expected in zip(drawn, plain, strict=False):
            assert np.abs(one.pixels.astype(int) - expected.astype(int)).max() <= 2
    assert Recording.made == [1, 4, 4, 4]
    assert nano.offer.guidance == 3.0, "another guidance would need recordings of its own"


class Refusing(RelaunchRecorder):
    """A card that records nothing."""

    def record(self, run, reset, separate_pool=False):
        raise RecordingFailed("operation not permitted")


class NotRecording(Recording):
    def __init__(self, model, engine):
        super().__init__(model, engine)
        self.engine = GraphEngine(Refusing())


@pytest.mark.filterwarnings("ignore:CUDA graph capture failed")
def test_recording_that_fails_while_warming_up_is_told_once(nano, monkeypatch, caplog):
    monkeypatch.setattr(Recording, "made", [], raising=False)
    monkeypatch.setattr(drawing, "TimedSampler", NotRecording)
    nano.engine = "graph"
    with caplog.at_level("WARNING", "stagevar.serving"):
        nano.warm()
        nano.draw(orders(nano, (64, 64), 1))
    assert sum("engine graph fell back: operation not permitted" in line for line in caplog.messages) == 1
    [told] = [one["stagevar"] for one in models_data(nano).values()]
    assert told["engine_fell_back"] == "operation not permitted" and not told["inside_envelope"]
    assert told["outside_envelope"] == ["engine graph fell back: operation not permitted"]


class SaidToBeCompiled(drawing.TimedSampler):
    """Draws plainly on an engine that is said to be compiled."""

    def __init__(self, model, engine):
        super().__init__(model, "eager")
        self.engine.compiled = True


def test_pieces_that_do_not_compile_are_told(nano, monkeypatch):
    monkeypatch.setattr(drawing, "TimedSampler", SaidToBeCompiled)
    monkeypatch.setattr(fused, "_plain_because", {})
    nano.warm()
    assert nano.fell_back is None and nano.served[0].differences == ()
    monkeypatch.setattr(fused, "_plain_because", {"modulated_norm": "no C++ compiler"})
    nano.draw(orders(nano, (64, 64), 1))
    assert nano.fell_back == "modulated_norm is not compiled: no C++ compiler"
    assert nano.served[0].differences == ("engine eager fell back: modulated_norm is not compiled: no C++ compiler",)


def test_guidance_is_stretched_over_the_scales():
    ramp = Sampling(guidance=(1.0, 2.0, 5.0), temperature=(1.0,) * 3)
    assert guided(ramp, 3.0).guidance == (1.0, 1.5, 3.0)
    assert guided(ramp, 5.0) == ramp and guided(ramp, 1.0).guidance == (1.0,) * 3
    assert guided(Sampling((1.0, 1.0), (1.0, 1.0)), 2.0).guidance == (2.0, 2.0)


def test_memory_that_runs_out_is_freed_and_the_next_image_is_drawn(nano, monkeypatch):
    nano.warm()
    before = nano.draw(orders(nano, (64, 64), 1))[0].pixels

    def run_out(self, generation):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(drawing.TimedSampler, "decode", run_out)
        patch.setattr(Sampler, "generate", lambda self, *args, **options: run_out(self, None))
        with pytest.raises(OutOfDeviceMemory, match="drawing 2 images at once needs more memory"):
            nano.draw(orders(nano, (64, 64), 1, 2))
    assert all(not sampler._caches for sampler, _ in nano._samplers.values())
    assert np.array_equal(nano.draw(orders(nano, (64, 64), 1))[0].pixels, before)


def test_a_broken_device_is_told_apart(nano, monkeypatch):
    def break_down(self, *args, **options):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Sampler, "generate", break_down)
    with pytest.raises(DeviceBroken, match="is broken"):
        nano.draw(orders(nano, (64, 64), 1))


def test_prompts_of_users_are_not_kept_on_disk_and_only_few_in_memory(weights, tmp_path, monkeypatch):
    model = load(weights)
    text = LateText(model.text.dim, tmp_path)
    monkeypatch.setattr(drawing, "load_model", lambda request, **options: dataclasses.replace(model, text=text))
    monkeypatch.setattr(drawing, "TEXTS_KEPT", 2)
    artist = load_artist(Loading(ModelRequest(model.name, device="cpu", **weights)))
    artist.warm()
    before = sorted(tmp_path.rglob("*"))
    shape = Shape((256, 256), artist.served[0].id)
    for prompt in ("one", "two", "three", "three", "one"):
        artist.draw([Order(prompt, 1, shape)])
    assert sorted(tmp_path.rglob("*")) == before
    assert text.encoded[-4:] == ["one", "two", "three", "one"], "the last two were kept"
