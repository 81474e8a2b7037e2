"""Checkpoints as trainers write them: every nesting of wrappers loads the same weights, what cannot be a weight is named."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from stagevar.errors import WeightsError
from stagevar.models.checkpoint import tensor_files, weights
from stagevar.models.checkpoint.key_rules import INFINITY_RULES
from stagevar.models.checkpoint.kinds import kind_in_safetensors, kind_of
from stagevar.models.checkpoint.names import bare_names, without_wrappers
from stagevar.models.checkpoint.state_dicts import find_state_dict
from tests.stagevar.models.checkpoint.conftest import on_meta

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "base_model.model.", "_forward_module.", "net.")


def inside(state: dict, wrapper: str) -> dict:
    """Every block wrapped, as activation checkpointing and FSDP do it: the part stands in the middle of names."""
    return {key.replace("block_chunks.0.module.", f"block_chunks.0.module.{wrapper}."): v for key, v in state.items()}


def prefixed(state: dict, *prefixes: str) -> dict:
    return {"".join(prefixes) + key: value for key, value in state.items()}


def checkpoints(state: dict) -> dict[str, dict]:
    """The same weights as trainers leave them."""
    average = {key: value + 1 for key, value in state.items()}
    found = {"".join(pair): prefixed(state, *pair) for pair in itertools.permutations(PREFIXES, 2)}
    for wrapper in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "0._fpw_module"):
        if not wrapper.startswith("0."):
            found[f"inside {wrapper}"] = prefixed(inside(state, wrapper), "module._fsdp_wrapped_module.")
    return found | {
        "an epoch beside": {**state, "epoch": 3, "lr": 0.1, "name": "run", "done": None},
        "a counter beside": {"n_averaged": torch.tensor(4), **prefixed(state, "module.")},
        "Lightning": {"state_dict": prefixed(state, "model."), "epoch": 1, "hyper_parameters": {"x": torch.zeros(2)}},
        "DeepSpeed": {"module": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        "accelerate": {"model": {"state_dict": prefixed(state, "_orig_mod.")}, "step": torch.tensor(3)},
        "an average beside": {"ema": average, "model": state},
        "averages first": {"model_ema": {"module": average}, "model": {"module": state}},
        "unusual key": {"args": {"depth": 2}, "my_gpt": state},
        "the trainer's": {"trainer": {"gpt_fsdp": state, "gpt_ema_fsdp": average}},
        "another model beside": {"vae": {"decoder.conv_in.weight": torch.zeros(3)}, "gpt": prefixed(state, "module.")},
    }


def test_every_wrapper_and_nesting_gives_the_same_module(state, tmp_path):
    path, made = tmp_path / "w.pth", checkpoints(state)
    assert len(made) > 50
    for name, content in made.items():
        torch.save(content, path)
        model = on_meta()
        weights.load_into(model, path, what="tiny", rules=INFINITY_RULES)
        loaded = model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items()), name


@pytest.mark.parametrize("layout", ["file", "index", "bin", "only file", "hidden file beside"])
def test_diffusers_folders_and_folders_with_one_file_load(state, tmp_path, layout):
    clones = {key: value.clone() for key, value in state.items()}
    if layout == "file":
        save_file(clones, tmp_path / "diffusion_pytorch_model.safetensors")
    elif layout == "bin":
        torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    elif layout == "index":
        shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
        save_file(clones, tmp_path / shard)
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(state, shard)})
        )
    else:
        torch.save(state, tmp_path / "epoch9.ckpt")
        if layout == "hidden file beside":
            (tmp_path / "._epoch9.ckpt").write_bytes(b"\x00\x05")
    model = on_meta()
    weights.load_into(model, tmp_path, what="tiny", rules=INFINITY_RULES)
    assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])


def test_a_folder_with_two_weights_files_asks_which(state, tmp_path):
    for name in ("a.pth", "b.pth"):
        torch.save(state, tmp_path / name)
    with pytest.raises(WeightsError, match=r"holds 2 weights files \(a\.pth, \.\.\.\); name one of them"):
        tensor_files.open_weights(tmp_path)


def not_weights() -> dict[str, torch.Tensor]:
    """One tensor of every kind that cannot be a weight, by the word that its refusal has."""
    dense = torch.ones(2, 2)
    return {
        "sparse": dense.to_sparse(),
        "quantized": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "complex64": dense.to(torch.complex64),
        "bool": dense.bool(),
        "whole numbers": dense.to(torch.int8),
        "meta": dense.to("meta"),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    }


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_weights_are_refused_in_one_line(state, tmp_path):
    assert kind_of(torch.ones(2, dtype=torch.bfloat16)) == "floating point"
    for word, value in not_weights().items():
        assert word in kind_of(value), word
    shape = state["head.weight"].shape
    kinds = {
        "sparse": torch.ones(shape).to_sparse(),
        "complex64": torch.ones(shape, dtype=torch.complex64),
        "bool": torch.ones(shape, dtype=torch.bool),
        "whole numbers": torch.ones(shape, dtype=torch.int8),
    }
    for word, value in kinds.items():
        torch.save({**state, "head.weight": value}, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=rf"of the wrong kind .head\.weight is {word}, not floating") as caught:
            weights.load_into(on_meta(), tmp_path / "w.pth", what="tiny", rules=INFINITY_RULES)
        assert "\n" not in str(caught.value)
        if word != "sparse":
            save_file({k: v.clone() for k, v in {**state, "head.weight": value}.items()}, tmp_path / "w.safetensors")
            with pytest.raises(WeightsError, match=r"of the wrong kind .head\.weight is "):
                weights.load_into(on_meta(), tmp_path / "w.safetensors", what="tiny", rules=INFINITY_RULES)


def test_kinds_of_safetensors():
    floats = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
    assert {kind_in_safetensors(name) for name in floats} == {"floating point"}
    assert {kind_in_safetensors(name) for name in ("I64", "I8", "U8", "U16")} == {"whole numbers"}
    assert [kind_in_safetensors(name) for name in ("BOOL", "C64")] == ["bool", "c64"]


def test_two_tensors_for_one_weight_are_refused(state, tmp_path):
    torch.save({**state, "module.head.weight": state["head.weight"] + 1}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 there twice \(head\.weight\)"):
        weights.load_into(on_meta(), tmp_path / "w.pth", what="tiny", rules=INFINITY_RULES)


def test_names_without_wrappers():
    assert without_wrappers("module._orig_mod.a.0._checkpoint_wrapped_module.weight") == "a.0.weight"
    assert bare_names({"model.a": (1,), "model.b": (1,)}, ("a", "b")) == {"model.a": "a", "model.b": "b"}
    # A module whose own names share a beginning keeps it.
    assert bare_names({"model.a": (1,)}, ("model.a",)) == {"model.a": "model.a"}
    assert find_state_dict([1]) is None and find_state_dict({"a": 1}) is None
