"""Products in 8 bits: the kernels against plain arithmetic, whole models within bounds, schedules that carry the knob."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from stagevar.errors import ScheduleError, UsageError
from stagevar.models import precision as eight_bits
from stagevar.models.memory import estimate_model
from stagevar.models.precision import LowPrecisionLinear, low_precision, quantize
from stagevar.models.registry import load_model
from stagevar.models.request import ModelRequest
from stagevar.profile import steps_to_data
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule
from stagevar.testing.recorder import Recorder
from stagevar.testing.tiny import GRIDS, tiny_infinity
from tests.fakes.cuda import NoWaiting, begin_on_fake_cuda, fake_mode
from tests.stagevar.engine.test_graph import graph_sampler
from tuner.config.space_file import load_space, parse_space
from tuner.report.words import describe

PROMPTS, SEEDS = ["a red ring", "two stars"], [1, 2]
#: Largest error of one number, relative to the largest of its row: half a step; half of float8's last of 3 bits, below.
STEP = {"int8": 1 / 254, "fp8": 1 / 16}


@pytest.fixture(scope="module")
def model():
    return tiny_infinity()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", STEP)
def test_quantized_rows_are_near(precision):
    x = numbers(5, 64) * torch.tensor([1e-20, 1e-3, 1.0, 30.0, 1e4])[:, None]
    x[0] = 0
    values, scale = quantize(x, precision)
    assert values.element_size() == 1 and scale.shape == (5, 1)
    assert ((values.float() * scale - x).abs() <= x.abs().amax(1, keepdim=True) * STEP[precision] * 1.001).all()


@pytest.mark.parametrize("tokens", [1, 16, 33])
@pytest.mark.parametrize("bias", ["own", "given", "none"])
@pytest.mark.parametrize("precision", STEP)
def test_the_product_is_that_of_the_quantized_numbers(precision, bias, tokens):
    """What the device's 8-bit units compute against float64 on the numbers that they were given."""
    layer = torch.nn.Linear(64, 48, bias=bias == "own")
    x, given = numbers(2, tokens, 64), numbers(48, seed=1) if bias == "given" else None
    with torch.inference_mode():
        ours = LowPrecisionLinear(layer, precision)(x, given)
        (x8, sx), (w8, sw) = quantize(x.flatten(0, 1), precision), quantize(layer.weight, precision)
        exactly = (x8.double() * sx) @ (w8.double() * sw).t()
        added = layer.bias if bias == "own" else given
        exactly = exactly if added is None else exactly + added
        plain = torch.nn.functional.linear(x, layer.weight, added)
    assert ours.shape == (2, tokens, 48) and ours.dtype == torch.float32
    # float8 products come out in bfloat16.
    assert (ours.flatten(0, 1) - exactly).abs().max() < (1e-5 if precision == "int8" else 2**-8 * exactly.abs().max())
    assert 0 < (ours - plain).abs().max() < 64**0.5 * STEP[precision]


@pytest.mark.parametrize("precision", STEP)
def test_a_generation_is_near_the_plain_one_and_equal_before_its_fidelity_stage(model, precision):
    steps = StageSchedule(3).expand(GRIDS, 2)
    coarse = StageSchedule(3, precision=precision).expand(GRIDS, 2)
    assert [step.precision for step in coarse] == ["model"] * 3 + [precision] * 2
    plain = Recorder(model)
    plain.run(steps, PROMPTS, SEEDS)
    ours = Recorder(model, forced=plain.tokens)
    ours.run(coarse, PROMPTS, SEEDS)
    for scale, logits in plain.logits.items():
        error = (ours.logits[scale] - logits).abs().mean() / logits.std()
        assert error == 0 if scale < 3 else 0 < error < {"int8": 0.1, "fp8": 0.4}[precision]


@pytest.mark.parametrize("name", ["var-tiny", "star-tiny"])
def test_other_families_run_in_eight_bits(name):
    model = load_model(name, weights="random", device="cpu")
    sampler = Sampler(model)
    last = len(model.grids) - 1
    steps = StageSchedule(last, precision="int8").expand(model.grids, sampler.chunks)
    assert sampler.generate(["1"], [1], steps).shape == (1, 256, 256, 3)
    exchanged = [n for n, m in sampler._transformers["int8"].named_modules() if isinstance(m, LowPrecisionLinear)]
    assert len(exchanged) == model.transformer.depth * {"var-tiny": 4, "star-tiny": 6}[name]


def test_what_is_not_a_product_is_shared(model):
    coarse = low_precision(model.transformer, "int8")
    plain = dict(model.transformer.named_parameters())
    left = dict(coarse.named_parameters())
    assert all(left[name] is plain[name] for name in left)
    gone = {name.rpartition(".")[0].rpartition(".")[2] for name in plain.keys() - left.keys()}
    assert gone == {"mat_qkv", "mat_q", "proj", "fc1", "fc2"}
    assert not [n for n, m in model.transformer.named_modules() if isinstance(m, LowPrecisionLinear)], "untouched"


def test_eight_bit_scales_are_recorded_and_replayed(model):
    steps = StageSchedule(3, cfg_delay=0, rank_ratios=(0.5,), precision="int8").expand(GRIDS, 2)
    sampler, engine = graph_sampler(model)
    for seeds in ([1, 2], [3, 4]):
        assert np.array_equal(sampler.generate(PROMPTS, seeds, steps), Sampler(model).generate(PROMPTS, seeds, steps))
    assert engine.recorded == len(GRIDS)


@pytest.mark.parametrize("precision", STEP)
def test_a_card_accepts_the_shapes_and_need_not_be_waited_for(model, precision, monkeypatch):
    monkeypatch.setattr(eight_bits, "refused_because", lambda precision, device: None)
    steps = StageSchedule(1, cfg_delay=0, rank_ratios=(0.5,), precision=precision).expand(GRIDS, 2)
    with fake_mode(), torch.inference_mode():
        sampler, generation = begin_on_fake_cuda(model, PROMPTS, steps)
        for step in steps:
            with NoWaiting():
                sampler.advance(generation, step)


@pytest.mark.parametrize("precision", STEP)
def test_a_small_product_tells_whether_a_device_can(precision, monkeypatch):
    cpu = torch.device("cpu")
    refused = eight_bits.refused_because.__wrapped__
    assert refused(precision, cpu) is None

    def unsupported(*_, **__):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nmore")

    name, product = {"int8": ("_int_mm", torch._int_mm), "fp8": ("_scaled_mm", torch._scaled_mm)}[precision]
    monkeypatch.setattr(torch, name, unsupported)
    assert refused(precision, cpu) == "CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"
    monkeypatch.setattr(torch, name, lambda *given, **options: 2 * product(*given, **options))
    assert refused(precision, cpu) == "its products are wrong"


def test_a_card_that_cannot_multiply_in_eight_bits_is_refused(monkeypatch):
    transformer = tiny_infinity().transformer
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 5090")
    monkeypatch.setattr(eight_bits, "refused_because", lambda precision, device: f"no {precision} here")
    low_precision(transformer, "int8")  # a CPU is not asked
    parameter = type("P", (), {"device": torch.device("cuda")})
    monkeypatch.setattr(transformer, "parameters", lambda: iter([parameter]))
    with pytest.raises(UsageError, match=r"precision fp8 cannot run on RTX 5090 \(no fp8 here\); use precision model"):
        low_precision(transformer, "fp8")


def test_the_knob_is_part_of_the_schedule():
    schedule = StageSchedule(3, cfg_delay=0, skip=(4,), precision="fp8")
    assert StageSchedule.from_dict(yaml.safe_load(yaml.safe_dump(schedule.to_dict()))) == schedule
    steps = schedule.expand(GRIDS, 2)
    data = steps_to_data(steps)
    assert [step.get("precision") for step in data] == [None, None, None, "fp8", None]
    assert describe(data) == "only the unconditional branch from side 4 on; products in fp8 at side 4; side 6 not run"
    assert hash(steps) != hash(dataclasses.replace(schedule, precision="int8").expand(GRIDS, 2))
    late = StageSchedule(len(GRIDS), precision="int8")
    assert late.expand(GRIDS, 2) == StageSchedule(len(GRIDS)).expand(GRIDS, 2), "no fidelity stage, nothing to change"
    with pytest.raises(ScheduleError, match="precision 'int4' is not one of model, int8, fp8"):
        StageSchedule(3, precision="int4")


def test_the_knob_can_be_searched():
    shipped = load_space("infinity-tiny")
    assert "precision" not in [parameter.name for parameter in shipped.parameters], "off by default"
    data = {"model": "nano", "objectives": {"latency": "ms", "quality": {"psnr": 1}},
            "parameters": {"structure_end": {"low": 2, "high": 4}, "precision": ["model", "int8", "fp8"]}}  # fmt: skip
    space = parse_space(data)
    values = {"structure_end": 3, "precision": "int8"}
    schedule = space.schedule(values, GRIDS)
    assert schedule.precision == "int8" and space.nearest_values(schedule, GRIDS) == values
    assert space.schedule({"structure_end": 3}, GRIDS).precision == "model"


def test_memory_counts_the_second_copy_of_the_weights():
    def weights(precision: str) -> int:
        schedule = StageSchedule(6, precision=precision)
        return estimate_model(ModelRequest("infinity-tiny", weights="random", device="cpu", schedule=schedule)).weights

    # Per layer of width 256: qkv 3, proj, query and its proj 1 each, feed-forward 4 + 4 blocks of 256 x 256.
    channels = (3 + 1 + 1 + 1 + 4 + 1) * 256
    assert weights("int8") - weights("model") == 8 * (14 * 256 * 256 + 4 * channels)
