"""Loading weights: every file layout gives the same module, every defect gives one line that names it."""

import argparse
import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stagevar.errors import WeightsError
from stagevar.models import hub
from stagevar.models.checkpoint import random_weights, tensor_files, weights
from stagevar.models.checkpoint.key_rules import BSQVAE_RULES, INFINITY_RULES
from stagevar.models.infinity.config import InfinityConfig
from stagevar.models.infinity.tokenizer import BSQVAE
from stagevar.models.infinity.transformer import Infinity
from tests import DATA
from tests.stagevar.models.checkpoint.conftest import TINY, on_meta

GRIDS = ((1, 1), (2, 2))


def load(path: Path, model: Infinity | None = None, **options) -> Infinity:
    model = model or on_meta()
    weights.load_into(model, path, what="tiny", rules=INFINITY_RULES, **options)
    return model


def refusal(path: Path, model: torch.nn.Module | None = None, rules=INFINITY_RULES) -> str:
    with pytest.raises(WeightsError) as caught:
        weights.load_into(model or on_meta(), path, what="tiny", rules=rules)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_shards(folder: Path, state: dict, safe: bool) -> Path:
    """Two shards and an index, as the hub's folders have them."""
    folder.mkdir()
    keys = sorted(state)
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    weight_map = {}
    for i, half in enumerate(halves, 1):
        part = {key: state[key].clone() for key in half}
        name = f"model-0000{i}-of-00002.safetensors" if safe else f"pytorch_model-0000{i}-of-00002.bin"
        save_file(part, folder / name) if safe else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(half, name)
    index = "model.safetensors.index.json" if safe else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def layouts(state: dict, folder: Path) -> dict[str, Path]:
    """The same weights in every layout that is read."""
    saves = {
        "plain.pth": state,
        "trainer.pth": {
            "args": argparse.Namespace(pn="1M"),
            "epoch": 3,
            "trainer": {"gpt_fsdp": state, "vae_local": {"x": torch.zeros(1)}, "config": {"depth": 2}},
        },
        "wo_ddp.pth": {"trainer": {"gpt_wo_ddp": state}},
        "ddp.pth": {f"module.{key}": value for key, value in state.items()},
        "compiled.pth": {f"_orig_mod.{key}": value for key, value in state.items()},
        "buffers.pth": {**state, "lvl_1L": torch.zeros(1, 5), "attn_bias_for_masking": torch.zeros(1, 1, 5, 5)},
    }
    for name, content in saves.items():
        torch.save(content, folder / name)
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file({key: value.clone() for key, value in state.items()}, folder / "one.safetensors")
    paths = {name: folder / name for name in (*saves, "legacy.pth", "one.safetensors")}
    paths["safe shards"] = write_shards(folder / "safe", state, True)
    paths["torch shards"] = write_shards(folder / "torch", state, False)
    paths["index itself"] = folder / "safe" / "model.safetensors.index.json"
    return paths


def test_every_layout_gives_the_same_module(state, tmp_path):
    for layout, path in layouts(state, tmp_path).items():
        loaded = load(path).state_dict()
        assert loaded.keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(loaded[key], value), (layout, key)


def test_a_loaded_model_runs_like_the_one_that_was_saved(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    plain = Infinity(TINY)
    plain.load_state_dict(state)
    text = [torch.randn(3, 128, generator=torch.Generator().manual_seed(0))]
    a, b = plain.condition(text), load(tmp_path / "w.pth").condition(text)
    assert torch.equal(a.pooled_RC, b.pooled_RC) and torch.equal(a.head_modulation[0], b.head_modulation[0])


def test_blocks_take_the_low_precision_and_the_rest_stays_float32(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    model = load(tmp_path / "w.pth", precision=weights.block_precision(torch.bfloat16))
    for key, value in model.state_dict().items():
        wanted = torch.bfloat16 if key.startswith("block_chunks.") else torch.float32
        assert value.dtype == wanted, key
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def mapped_file(tensor: torch.Tensor) -> str:
    """The file whose memory mapping a tensor lies in, empty for ordinary memory."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5) if line.count(" ") >= 5 else (line.split()[0], "")
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return name if name.startswith("/") else ""
    return ""


@pytest.mark.parametrize("layout", ["plain.pth", "one.safetensors"])
def test_weights_of_the_files_precision_are_views_of_the_mapped_file(state, tmp_path, layout):
    path = layouts(state, tmp_path)[layout]
    model = load(path, precision=weights.block_precision(torch.float32))
    large = model.text_proj_for_ca[0].weight
    assert mapped_file(large).endswith(layout)
    halved = load(path, precision=weights.block_precision(torch.bfloat16))
    assert mapped_file(halved.block_chunks[0].module[0].ffn.fc1.weight) == ""
    assert mapped_file(halved.text_proj_for_ca[0].weight).endswith(layout)


@pytest.mark.parametrize("rows", [5, 8, 11])
def test_null_text_is_cut_or_padded_from_the_references_initialization(state, tmp_path, rows):
    trained = torch.randn(rows, 128)
    torch.save({**state, "cfg_uncond": trained}, tmp_path / "w.pth")
    loaded = load(tmp_path / "w.pth").cfg_uncond
    kept = min(rows, 8)
    assert torch.equal(loaded[:kept], trained[:kept])
    # The reference draws the whole table at seed 0 with standard deviation 1.2 and divides by the root of the width.
    fresh = torch.nn.init.trunc_normal_(torch.empty(8, 128), std=1.2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded[kept:], (fresh / 128**0.5)[kept:])


@pytest.mark.parametrize("wrapped", [True, False])
def test_tokenizer_files_with_and_without_wrappers(tmp_path, wrapped):
    vae = BSQVAE(4, GRIDS, base_ch=32)
    with torch.device("meta"):
        target = BSQVAE(4, GRIDS, base_ch=32)
    content = dict(vae.state_dict())
    if not wrapped:
        content = {
            k.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias").replace(".norm.", "."): v
            for k, v in content.items()
            if "lfq" not in k
        }
        assert "decoder.up.1.upsample.conv.weight" in content and "decoder.mid.block_1.norm1.weight" in content
    ema = {key: value + 1 for key, value in content.items()}
    torch.save({"vae": content, "ema": ema, "optimizer": {"lr": 1e-4}}, tmp_path / "vae.pth")
    weights.load_into(target, tmp_path / "vae.pth", what="vae", rules=BSQVAE_RULES)
    for key, value in vae.state_dict().items():
        if "lfq" not in key:
            assert torch.equal(target.state_dict()[key], value), key


# ------------------------------------------------------------------------------------------------ refusals


def test_missing_unknown_and_misshaped_keys_are_named(state, tmp_path):
    broken = {**state, "surprise.weight": torch.zeros(1), "head.bias": torch.zeros(3)}
    del broken["pos_start"]
    torch.save(broken, tmp_path / "w.pth")
    line = refusal(tmp_path / "w.pth")
    assert "missing (pos_start)" in line and "unknown (surprise.weight)" in line
    assert "head.bias [3] instead of [8]" in line and "w.pth" in line


def test_one_extra_key_is_enough(state, tmp_path):
    save_file({**{k: v.clone() for k, v in state.items()}, "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert "1 unknown (extra)" in refusal(tmp_path / "w.safetensors")


def test_another_models_file_is_recognized(tmp_path):
    other = on_meta(InfinityConfig(depth=3, width=96, heads=2, chunks=3, token_bits=6, text_dim=128, text_maxlen=8))
    random_weights.randomize(other, 0)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    assert "an Infinity transformer of depth 3, width 96, 6 bits per token" in refusal(tmp_path / "other.pth")
    vae = BSQVAE(4, GRIDS, base_ch=32)
    torch.save({"vae": vae.state_dict()}, tmp_path / "vae.pth")
    assert "looks like an image tokenizer with 4 latent channels" in refusal(tmp_path / "vae.pth")
    torch.save(vae.state_dict(), tmp_path / "bare.pth")
    assert "an image tokenizer with 4 latent channels" in refusal(tmp_path / "bare.pth")


def test_missing_keys_are_counted_not_listed_without_end(tmp_path):
    torch.save({"head.bias": torch.zeros(8)}, tmp_path / "w.pth")
    line = refusal(tmp_path / "w.pth")
    assert f"{len(on_meta().state_dict()) - 1} missing (" in line and "more)" in line and len(line) < 400


@pytest.mark.parametrize("layout", ["plain.pth", "legacy.pth", "one.safetensors", "safe shards", "torch shards"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_files_are_refused_in_one_line(state, tmp_path, layout, damage):
    path = layouts(state, tmp_path)[layout]
    victim = max(path.glob("*-00002-of-*")) if path.is_dir() else path
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not weights at all" * 9)
    line = refusal(path)
    assert victim.name in line and "cannot read weights" in line


def test_a_missing_shard_and_a_broken_index(state, tmp_path):
    folder = write_shards(tmp_path / "safe", state, True)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "cannot read shard index" in refusal(folder)


def test_a_shard_that_lacks_indexed_tensors(state, tmp_path):
    folder = write_shards(tmp_path / "safe", state, True)
    save_file({"head.bias": torch.zeros(8)}, folder / "model-00002-of-00002.safetensors")
    assert f"of {len(state)} tensors" in refusal(folder)


def test_python_objects_are_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with (tmp_path / "evil.pth").open("wb") as handle:
        pickle.dump({"w": Evil()}, handle, protocol=2)
    torch.save({"state_dict": {"w": torch.zeros(1)}, "hook": Evil()}, tmp_path / "evil2.pth")
    assert "evil.pth" in refusal(tmp_path / "evil.pth")
    assert "contain Python objects" in refusal(tmp_path / "evil2.pth")
    assert not (tmp_path / "ran").exists()


def test_paths_that_hold_nothing(tmp_path):
    assert "no weights at" in refusal(tmp_path / "nowhere.pth")
    assert "holds no weights" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------ random weights


def test_random_weights_depend_on_seed_and_key_alone():
    a, b, c = on_meta(), on_meta(), on_meta()
    random_weights.randomize(a, 7), random_weights.randomize(b, 7), random_weights.randomize(c, 8)
    a, b, c = a.state_dict(), b.state_dict(), c.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])
    first, second = (f"block_chunks.{i}.module.0.sa.proj.weight" for i in (0, 1))
    assert not torch.equal(a[first], a[second])
    assert not a["block_chunks.0.module.0.sa.zero_k_bias"].any()
    assert a["text_norm.weight"].mean() == pytest.approx(1, abs=0.05)
    assert a["head.weight"].std() == pytest.approx(64**-0.5, rel=0.1)


# ------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("shard_bytes", [2**30, 50_000])
def test_saved_weights_load_back(state, tmp_path, shard_bytes):
    model = Infinity(TINY)
    model.load_state_dict(state)
    paths = tensor_files.save_weights(model, tmp_path, "transformer", shard_bytes)
    assert (paths[0].name == "transformer.safetensors.index.json") == (shard_bytes == 50_000)
    loaded = load(paths[0]).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_tokenizer_saves_although_its_quantizer_has_two_names(tmp_path):
    vae = BSQVAE(4, GRIDS, base_ch=32)
    (path,) = tensor_files.save_weights(vae, tmp_path, "tokenizer")
    with torch.device("meta"):
        target = BSQVAE(4, GRIDS, base_ch=32)
    weights.load_into(target, path, what="vae", rules=BSQVAE_RULES)
    assert torch.equal(target.quantize.lfq.mask, torch.tensor([8, 4, 2, 1]))


# ------------------------------------------------------------------------------------------------ presets and hub


def test_key_tables_are_matched_by_strict_checking():
    """The checker accepts the official key table of the 2B model and names a single renamed key of it."""
    table = json.loads(gzip.decompress((DATA / "infinity_key_shapes.json.gz").read_bytes()))
    shapes = {key: tuple(shape) for key, shape in table["infinity_2b"].items()}

    class Listed(tensor_files.TensorFile):
        def read(self, key, device):
            raise AssertionError("shapes are enough")

    model = on_meta(InfinityConfig(depth=32, width=2048, heads=16, chunks=8, token_bits=32))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    source, zeros = weights.check_keys(Listed([Path("2b.pth")], shapes, {}), expected, INFINITY_RULES, "infinity-2b")
    assert len(source) == 694 and not zeros
    shapes["head.weights"] = shapes.pop("head.weight")
    with pytest.raises(WeightsError, match=r"1 missing \(head.weight\), 1 unknown \(head.weights\)"):
        weights.check_keys(Listed([Path("2b.pth")], shapes, {}), expected, INFINITY_RULES, "infinity-2b")


def test_an_offline_hub_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find the file on disk.\nOutgoing traffic is off.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for path in ("infinity_2b_reg.pth", "infinity_8b_weights/"):
        with pytest.raises(WeightsError, match="cannot fetch FoundationVision/Infinity") as caught:
            hub.fetch(hub.HubFile("FoundationVision/Infinity", path))
        assert "\n" not in str(caught.value) and "--weights" in str(caught.value)


def test_the_commit_of_a_fetched_file_is_known(monkeypatch, tmp_path):
    import huggingface_hub

    target = tmp_path / "models--a--b" / "snapshots" / "c0ffee" / "w.pth"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, path, revision: str(target))
    assert hub.fetch(hub.HubFile("a/b", "w.pth")) == (target, "c0ffee")


def test_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "w.bin"
    path.write_bytes(b"one")
    first = hub.sha256_file(path)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    monkeypatch.setattr(hub.hashlib, "file_digest", lambda *a: pytest.fail("the hash was not remembered"))
    assert hub.sha256_file(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))
    path.write_bytes(b"other")
    assert hub.sha256_files([path]) == {"w.bin": hub.sha256_file(path)} and hub.sha256_file(path) != first
