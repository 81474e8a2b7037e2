"""The memory estimate: checked term by term against what loading really allocates, and the refusal."""

import dataclasses

import pytest
import torch

from stagevar.errors import UsageError, WeightsError
from stagevar.models import hub, memory
from stagevar.models.memory import MIB, MemoryEstimate, estimate_model
from stagevar.models.memory_plan import CARD_SHARE, TimedBytes, timed_beside_full, timed_bytes
from stagevar.models.registry import load_model, model_parts, published, resolve
from stagevar.models.request import ModelRequest
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact, preset
from stagevar.schedule.grids import square
from stagevar.tensors.cache import KV_CACHES, KVCache, step_lengths
from tuner.metrics.quality_spec import QualitySpec


def state_bytes(module: torch.nn.Module) -> int:
    storages = {value.data_ptr(): value.nbytes for value in module.state_dict().values()}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_cache_are_what_loading_allocates(dtype):
    estimate = estimate_model(ModelRequest("infinity-tiny", dtype=dtype, batch=2, device="cpu"))
    model = load_model("infinity-tiny", weights="random", dtype=dtype, device="cpu")
    assert estimate.weights == state_bytes(model.transformer)
    assert estimate.tokenizer == state_bytes(model.tokenizer)
    steps = exact(len(model.grids)).expand(model.grids, len(model.transformer.chunk_layers))
    capacity = step_lengths(steps, model.transformer.chunk_layers)
    cache = KVCache(2, model.transformer.heads, model.transformer.head_dim, capacity, "cpu", model.dtype)
    assert estimate.kv_cache == cache.memory_bytes


def test_infinity_8b_in_bfloat16():
    """8.376 B parameters of which 8.2 B in two bytes; 10521 tokens, 40 layers of 3584, two branches."""
    estimate = estimate_model(ModelRequest("infinity-8b", dtype="bfloat16", device="cpu"))
    assert estimate.weights / 2**30 == pytest.approx(15.9, abs=0.1)
    assert estimate.kv_cache == 2 * 2 * 40 * 3584 * 10521 * 2
    assert estimate.text_encoder == pytest.approx(1.22e9 * 4, rel=0.01)
    assert estimate.peak == max(estimate.sampling, estimate.encoding)


def test_more_images_and_pixels_need_more():
    def peak(**options):
        return estimate_model(ModelRequest("infinity-2b", dtype="bfloat16", device="cpu", **options))

    one = peak()
    assert peak(batch=4).kv_cache == 4 * one.kv_cache
    assert peak(resolution="0.25M").kv_cache == one.kv_cache * 2521 // 10521
    assert peak(batch=4).weights == one.weights
    # Large batches are decoded two megapixels at a time.
    assert peak(batch=8).decoding == peak(batch=2).decoding == 2 * one.decoding
    assert estimate_model(ModelRequest("infinity-2b", weights="random", device="cpu")).text_encoder == 0


def test_the_account_names_every_term():
    lines = MemoryEstimate(100 * MIB, 10 * MIB, 50 * MIB, 5 * MIB, 7 * MIB, 20 * MIB, 0).lines()
    table = {line[:40].strip(): int(line[40:].split()[0]) for line in lines}
    assert table["peak"] == 100 + 10 + 50 + 7 and table["KV cache"] == 50 and table["image decoding"] == 7
    assert len(table) == 10


@pytest.mark.parametrize("name", ["exact", "stagevar-paper", "fastvar", "skip-2"])
@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_the_cache_of_a_schedule_is_what_the_sampler_allocates(name, kv_cache):
    options = {"weights": "random", "dtype": "bfloat16", "device": "cpu", "kv_cache": kv_cache, "batch": 2}
    model = load_model("infinity-tiny", **options)
    schedule = preset(name, model.grids, published(model.name))
    sampler = Sampler(model)
    generation = sampler.begin(["a", "b"], [1, 2], steps=schedule.expand(model.grids, sampler.chunks))
    estimate = estimate_model(ModelRequest("infinity-tiny", schedule=schedule, **options))
    assert estimate.kv_cache == generation.cache.memory_bytes


def test_infinity_8b_on_a_card_of_24_gib():
    """Text encoder unloaded. In bfloat16 the paper's preset fits and the full schedule does not; with 8-bit K/V it does."""
    grids = square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))

    def needed(name: str, kv_cache: str) -> float:
        schedule = preset(name, grids, published("infinity-8b"))
        request = ModelRequest("infinity-8b", dtype="bfloat16", device="cpu", schedule=schedule, kv_cache=kv_cache)
        estimate = estimate_model(request)
        return estimate.generating / 2**30

    assert needed("exact", "model") > 28
    assert 23 < needed("exact", "int8") < 24
    assert needed("stagevar-paper", "model") == pytest.approx(20.4, abs=0.1)
    assert needed("stagevar-paper", "int8") == pytest.approx(19.0, abs=0.1)


def test_restoring_and_pruning_keep_outputs():
    """float32 rows of earlier scales: of two at a time while a projected scale is restored, of one for FastVAR."""
    grids = square((1, 2, 4, 6, 8, 12, 16))
    tiny = {"weights": "random", "device": "cpu"}
    row = 256 * 4

    def restoration(schedule) -> int:
        return estimate_model(ModelRequest("infinity-tiny", schedule=schedule, **tiny)).restoration

    assert restoration(StageSchedule(len(grids))) == 0
    # Eight chunks of both branches: side 12 while side 8 goes; side 16, the last scale, keeps nothing.
    projected = StageSchedule(6, rank_ratios=(0.5,))
    assert restoration(projected) == 8 * 2 * (8 * 8 + 12 * 12) * row
    assert restoration(dataclasses.replace(projected, site="trunk")) == 2 * (8 * 8 + 12 * 12) * row
    # Three sublayers in each of layers 3 to 7.
    pruned = StageSchedule(6, rank_ratios=(0.5,), accelerator="fastvar", layers=(3, 28))
    assert restoration(pruned) == 3 * 5 * 2 * 12 * 12 * row


def test_the_text_encoder_counts_where_it_is_the_most():
    assert MemoryEstimate(100, 10, 5, 5, 5, 200, 0).peak == 310


def test_what_does_not_fit_is_refused_with_figures(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 300 * MIB)
    with pytest.raises(UsageError, match=r"infinity-tiny needs about \d+ MiB on cpu, but only 300 MiB are free"):
        load_model("infinity-tiny", weights="random", device="cpu")


def test_a_damaged_file_is_reported_before_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    (tmp_path / "w.pth").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="cannot read weights"):
        load_model("infinity-2b", weights=tmp_path / "w.pth", tokenizer=tmp_path / "w.pth", device="cpu")


def test_memory_is_checked_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    monkeypatch.setattr(hub, "fetch", lambda file: pytest.fail(f"{file} was fetched"))
    with pytest.raises(UsageError, match="infinity-2b needs about"):
        load_model("infinity-2b", device="cpu")


def test_an_unknown_amount_of_free_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    memory.require(MemoryEstimate(2**60, 0, 0, 0, 0, 0), torch.device("cpu"), "huge")


def test_this_machine_tells_how_much_is_free():
    free = memory.available_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


def test_the_largest_batch_that_fits_goes_by_halves():
    from stagevar.models.memory import largest_batch

    tiny = ModelRequest("infinity-tiny", weights="random", device="cpu")
    needs = {batch: estimate_model(dataclasses.replace(tiny, batch=batch)).peak for batch in (1, 2, 4, 8)}
    assert largest_batch(tiny, 8, needs[8]) == 8
    assert largest_batch(tiny, 8, needs[8] - 1) == 4
    assert largest_batch(tiny, 8, needs[2]) == 2
    assert largest_batch(tiny, 8, 0) == 1


@pytest.mark.parametrize(("name", "card"), [("infinity-8b", 80), ("infinity-2b", 24)])
@pytest.mark.parametrize("engine", ["eager", "graph-compiled"])
def test_what_a_study_keeps_alive_fits_the_card(name, card, engine):
    """The full schedule and six finalists; with recorded graphs they do not fit together, so they are timed in groups."""
    card_bytes = card * 1024 * MIB
    request = resolve(name, dtype="bfloat16", device="cpu")
    parts = model_parts(request)
    transformer = parts.transformer.module
    steps = {
        key: preset(key, parts.grids, published(name)).expand(parts.grids, len(transformer.chunk_layers))
        for key in ("exact", "skip-1")
    }
    schedules = {"full": steps["exact"], **{f"finalist {i}": steps["skip-1"] for i in range(6)}}
    needed = timed_bytes(transformer, parts.tokenizer.module, schedules, parts.pixels, 2, "model", engine)
    held = memory.estimate(parts, request).held
    room = int(0.9 * (card_bytes - held))
    groups = needed.groups(room, "full")
    assert sorted(n for group in groups for n in group if n != "full") == sorted(schedules.keys() - {"full"})
    assert all(group[0] == "full" and needed.together(group) <= room for group in groups)
    assert (len(groups) > 1) == (needed.together(list(schedules)) > room)
    if engine != "eager":
        assert len(groups) > 1
    beside = timed_beside_full(ModelRequest(name, dtype="bfloat16", device="cpu"), "skip-1", engine, card_bytes)
    assert min(beside, 6) == len(groups[0]) - 1


def test_what_does_not_fit_beside_the_full_schedule_is_tried_alone():
    needed = TimedBytes({"full": 5, "a": 4, "b": 9, "c": 1}, working=2)
    assert needed.groups(12, "full") == [["full", "a"], ["full", "b"], ["full", "c"]]
    assert needed.groups(13, "full") == [["full", "a"], ["full", "b"], ["full", "c"]]
    assert needed.groups(21, "full") == [["full", "a", "b", "c"]]
    assert needed.groups(1, None) == [["full", "a", "b", "c"]]


def test_a_study_leaves_room_for_the_models_of_its_metrics(monkeypatch):
    from tuner.evaluation.model_evaluator import fitting_micro_batch

    model = ModelRequest("infinity-2b", device="cpu", weights="folder")
    needed = estimate_model(ModelRequest("infinity-2b", batch=4, device="cpu")).peak
    monkeypatch.setattr(memory, "total_bytes", lambda device: int(needed / CARD_SHARE) + MIB)
    assert fitting_micro_batch(model, 4, {"ssim": QualitySpec()}) == 4
    assert fitting_micro_batch(model, 4, {"geneval": QualitySpec(), "clip_score": QualitySpec()}) < 4
    assert fitting_micro_batch(dataclasses.replace(model, weights="random"), 4, {"geneval": QualitySpec()}) == 4
