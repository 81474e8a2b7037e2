"""The memory estimate: checked term by term against what loading really allocates, and the refusal."""

import pytest
import torch

from stagevar.cache import KVCache, step_lengths
from stagevar.errors import UsageError, WeightsError
from stagevar.models import hub, memory
from stagevar.models.memory import MIB, MemoryEstimate, estimate_model
from stagevar.models.registry import load_model
from stagevar.schedule import exact


def state_bytes(module: torch.nn.Module) -> int:
    storages = {value.data_ptr(): value.nbytes for value in module.state_dict().values()}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_cache_are_what_loading_allocates(dtype):
    estimate = estimate_model("infinity-tiny", dtype=dtype, batch=2, device="cpu")
    model = load_model("infinity-tiny", weights="random", dtype=dtype, device="cpu")
    assert estimate.weights == state_bytes(model.transformer)
    assert estimate.tokenizer == state_bytes(model.tokenizer)
    steps = exact(len(model.grids)).expand(model.grids, len(model.transformer.chunk_layers))
    capacity = step_lengths(steps, model.transformer.chunk_layers)
    cache = KVCache(2, model.transformer.heads, model.transformer.head_dim, capacity, "cpu", model.dtype)
    assert estimate.kv_cache == cache.memory_bytes


def test_infinity_8b_in_bfloat16():
    """8.376 B parameters of which 8.2 B in two bytes; 10521 tokens, 40 layers of 3584, two branches."""
    estimate = estimate_model("infinity-8b", dtype="bfloat16", device="cpu")
    assert estimate.weights / 2**30 == pytest.approx(15.9, abs=0.1)
    assert estimate.kv_cache == 2 * 2 * 40 * 3584 * 10521 * 2
    assert estimate.text_encoder == pytest.approx(1.22e9 * 4, rel=0.01)
    assert estimate.peak == max(estimate.sampling, estimate.encoding)


def test_more_images_and_pixels_need_more():
    def peak(**options):
        return estimate_model("infinity-2b", dtype="bfloat16", device="cpu", **options)

    one = peak()
    assert peak(batch=4).kv_cache == 4 * one.kv_cache
    assert peak(resolution="0.25M").kv_cache == one.kv_cache * 2521 // 10521
    assert peak(batch=4).weights == one.weights
    # Large batches are decoded two megapixels at a time.
    assert peak(batch=8).decoding == peak(batch=2).decoding == 2 * one.decoding
    assert estimate_model("infinity-2b", weights="random", device="cpu").text_encoder == 0


def test_the_account_names_every_term():
    lines = MemoryEstimate(100 * MIB, 10 * MIB, 50 * MIB, 5 * MIB, 7 * MIB, 20 * MIB, 0).lines()
    table = {line[:36].strip(): int(line[36:].split()[0]) for line in lines}
    assert table["peak"] == 100 + 10 + 50 + 7 and table["KV cache"] == 50 and table["image decoding"] == 7
    assert len(table) == 8


def test_the_text_encoder_counts_where_it_is_the_most():
    assert MemoryEstimate(100, 10, 5, 5, 5, 200, 0).peak == 310


def test_what_does_not_fit_is_refused_with_figures(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 300 * MIB)
    with pytest.raises(UsageError, match=r"infinity-tiny needs about \d+ MiB on cpu, 300 MiB are free"):
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
