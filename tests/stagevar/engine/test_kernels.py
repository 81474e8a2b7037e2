"""Kernels of a card, without one: interpreted against their twins, compiled to machine code, the twins against the model."""

import collections
import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from stagevar.engine import decoder_kernels, kernels
from stagevar.models.infinity.tokenizer import BSQVAE
from stagevar.models.layers import cosine_heads, modulated_norm, turns
from tests import ROOT
from tests.stagevar.engine.kernel_cases import MODELS, Numbers

triton = pytest.importorskip("triton")

#: How far a kernel may be from its twin, in units of rounding (`kernel_cases.LEAST`): sums over a row have another order.
ULPS = {"float32": 8.0, "float16": 1.0, "bfloat16": 1.0}


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.stagevar.engine.interpreted_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kernel", "count"), [("gated_norm", 12), ("heads_into_cache", 12), ("draws", 6), ("swished", 4)]
)
def test_kernels_equal_their_twins(interpreted, kernel, count):
    cases = {name: ulps for name, ulps in interpreted.items() if name.startswith(kernel)}
    assert len(cases) == count
    far = {
        name: ulps
        for name, ulps in cases.items()
        if max(ulps) > next(most for dtype, most in ULPS.items() if f"torch.{dtype} " in name)
    }
    assert not far


def test_twins_are_what_the_model_computes():
    """Residual, gate, norm and modulation to the bit; heads up to the rounding of a rotation without complex numbers."""
    make = Numbers()
    x_RLC, update_RLC, gate, scale, shift = (
        make(2, 9, 64),
        make(2, 9, 64, dtype=torch.bfloat16),
        *(make(2, 1, 64) for _ in range(3)),
    )
    ours = kernels.gated_norm_twin(x_RLC, update_RLC, gate, scale, shift, True, torch.bfloat16)
    stream = x_RLC + update_RLC * gate
    assert torch.equal(ours[0], stream)
    assert torch.equal(ours[1], modulated_norm(stream, scale, shift, torch.bfloat16))
    weight, bias = make(64), make(64)
    _, normed = kernels.gated_norm_twin(stream, None, None, weight[None, None], bias[None, None], False, torch.float32)
    assert torch.allclose(normed, F.layer_norm(stream, (64,), weight, bias, 1e-6), atol=1e-6)

    qkv, factor = make(2, 9, 192), make(1, 4, 1, 1).exp()
    angle = make(9, 8)
    table = torch.stack([angle.cos(), angle.sin()])
    keys, values = torch.zeros(2, 2, 4, 9, 16)
    q = kernels.heads_into_cache_twin(qkv, factor.flatten(), table, keys, values)
    for one, other in zip((q, keys, values), cosine_heads(qkv, 4, factor, turns(table)), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


class _Card:
    """What Triton asks of a driver while compiling."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target


def compiled(kernel, types, constants, warps, capability, monkeypatch):
    """Triton's output for a card that is not here. types: of the arguments; pointers and strides are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", capability, 32)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Card(target), raising=False)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types.get(name, "i")[0] == "*" or name.endswith("_stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=target, options={"num_warps": warps})


def accesses(built) -> dict[str, int]:
    """Loads and stores of global memory in the PTX by width in bits."""
    found = collections.Counter()
    for kind, count, bits in re.findall(r"(ld|st)\.global(?:\.v(\d))?\.b(\d+)", built.asm["ptx"]):
        found[kind, int(count or 1) * int(bits)] += 1
    return dict(found)


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("model", MODELS)
def test_gated_norm_compiles_for_cards_with_wide_loads(model, capability, monkeypatch):
    width, _ = MODELS[model]
    types = dict.fromkeys(("x_ptr", "gate_ptr", "scale_ptr", "shift_ptr", "sum_ptr"), "*fp32")
    types |= dict.fromkeys(("update_ptr", "normed_ptr"), "*bf16")
    types |= dict.fromkeys(("tokens", "gate_stride", "scale_stride", "shift_stride"), "i32")
    block = 1 << (width - 1).bit_length()
    constants = {"C": width, "BLOCK": block, "EPS": 1e-6, "UPDATE": True, "GATE": True, "PLUS_ONE": True}
    warps = kernels.gated_norm_warps(width)
    built = compiled(kernels.gated_norm_kernel, types, constants, warps, capability, monkeypatch)
    assert built.asm["cubin"]
    assert set(accesses(built)) == {("ld", 128), ("st", 128)}


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("model", MODELS)
def test_heads_into_cache_compiles_for_cards_with_wide_loads(model, capability, monkeypatch):
    width, heads = MODELS[model]
    types = dict.fromkeys(("qkv_ptr", "q_ptr", "keys_ptr", "values_ptr"), "*bf16")
    types |= dict.fromkeys(("factor_ptr", "table_ptr"), "*fp32")
    strides = [name for name in kernels.heads_into_cache_kernel.arg_names if name.endswith("_stride")]
    types |= dict.fromkeys(("tokens", *strides), "i32")
    at_once = kernels.heads_at_once(heads)
    constants = {"HEADS": heads, "c": width // heads, "AT_ONCE": at_once, "LEAST": 1e-12, "ROTATE": True}
    built = compiled(kernels.heads_into_cache_kernel, types, constants, 1, capability, monkeypatch)
    assert built.asm["cubin"] and built.metadata.shared == 0  # pairs are turned inside a thread
    widths = accesses(built)
    # Only the angles are half as wide: a lane turns two pairs.
    assert set(widths) == {("ld", 128), ("ld", 64), ("st", 128)} and widths["ld", 64] == 2


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("normal", [False, True])
def test_draws_compile_for_cards(normal, capability, monkeypatch):
    types = {"keys_ptr": "*i64", "words_ptr": "*i64", "out_ptr": "*fp32", "count": "i32", "pairs": "i32"}
    types |= {"draw0": "i64", "draw1": "i64"}
    constants = {"NORMAL": normal, "WORDS": True, "BLOCK": kernels.DRAWS_AT_ONCE}
    built = compiled(kernels.draws_kernel, types, constants, 4, capability, monkeypatch)
    assert built.asm["cubin"] and "mul.hi.u32" in built.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("channels", [128, 512])
def test_norms_of_the_decoder_compile_for_cards_with_wide_loads(channels, capability, monkeypatch):
    rows, size = decoder_kernels.rows_at_once(channels), channels // 32
    types = dict.fromkeys(("x_ptr", "out_ptr", "weight_ptr", "bias_ptr"), "*bf16")
    types |= dict.fromkeys(("means_ptr", "squares_ptr", "factors_ptr"), "*fp32")
    types |= dict.fromkeys(("pixels", "parts"), "i32")
    tile = {"C": channels, "BLOCK_C": channels, "ROWS": rows}
    statistics, totals, swish = decoder_kernels.KERNELS
    built = compiled(statistics, types, {**tile, "TILES": 64}, 4, capability, monkeypatch)
    assert built.asm["cubin"] and {access for access in accesses(built) if access[0] == "ld"} == {("ld", 128)}
    built = compiled(swish, types, tile, 4, capability, monkeypatch)
    # Only the factors, a number per channel, are narrower: there are as few as threads.
    widths = accesses(built)
    assert built.asm["cubin"] and set(widths) <= {("ld", 128), ("ld", 32), ("st", 128)} and widths["ld", 128] >= 4
    assert widths.get(("ld", 32), 0) <= 2
    group = {"C": channels, "SIZE": size, "BLOCK": size, "PARTS": 64, "PER_PART": rows * 64, "EPS": 1e-6}
    assert compiled(totals, types, group, 4, capability, monkeypatch).asm["cubin"]


def test_a_decoder_takes_the_norm_that_it_is_given():
    """The twin in place of the plain norm: the same image up to rounding, every tensor shared, the encoder as it was."""
    torch.manual_seed(0)
    plain = BSQVAE(16, ((1, 1), (2, 2)), base_ch=32).eval()
    calls = []

    def counted(x_BCHW, norm):
        calls.append(norm)
        assert x_BCHW.is_contiguous(memory_format=torch.channels_last), "a map whose pixels are adjacent is copied"
        return decoder_kernels.swished_norm_twin(x_BCHW, norm)

    ours = plain.decoding_with(counted)
    codes = torch.randn(2, 16, 2, 2)
    with torch.inference_mode():
        assert torch.allclose(ours.decode(codes), plain.decode(codes), atol=1e-4)
    norms = [module for module in plain.decoder.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(calls) == len(norms) and {id(one.weight) for one in calls} == {id(norm.weight) for norm in norms}
    assert {id(p) for p in ours.parameters()} == {id(p) for p in plain.parameters()}


def test_kernels_say_why_they_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.available() == "there is no CUDA device"
    monkeypatch.setattr(kernels, "triton", None)
    assert "Triton is not installed" in kernels.available()
