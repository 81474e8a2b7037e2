"""What a card was doing while something was timed, read from a stand-in for NVML."""

import sys
from types import SimpleNamespace

import pytest
import torch

from stagevar import timing as latency
from stagevar.card_state import CardState, disturbed_by, read_card
from stagevar.sampling.bench import BASELINE, format_table, time_in_turn

CUDA = torch.device("cuda", 1)
QUIET = CardState("580.1", 1980, 2619, 45, 300.0, 700.0, (), 0, False)


def changed(**fields):
    return CardState(**{**vars(QUIET), **fields})


class Nvml:
    """Answers as pynvml does; `asked` is the card."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, reasons=0, pids=(), sliced=False):
        self.reasons, self.pids, self.sliced, self.asked = reasons, pids, sliced, None

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked = uuid
        if self.sliced:
            if not uuid.startswith(b"MIG-"):
                raise self.NVMLError("not found")
            return "slice"
        return "handle"

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part):
        assert part == "slice"
        return "handle"

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle, kind):
        return 45

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetMigMode(self, handle):
        if self.sliced is None:
            raise self.NVMLError("not supported")
        return (int(self.sliced), 0)


@pytest.fixture
def nvml(monkeypatch):
    def use(**options):
        made = Nvml(**options)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        return made

    properties = SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: {1: properties}[index])
    return use


def test_a_reading_is_of_the_device_by_its_uuid(nvml):
    import os

    made = nvml(pids=(os.getpid(), 7), sliced=None)
    assert read_card(CUDA) == changed(other_processes=1)
    assert made.asked == b"GPU-1234-abcd"
    assert read_card("cpu") is None


def test_a_slice_is_read_off_its_card(nvml):
    made = nvml(sliced=True)
    assert read_card(CUDA) == changed(mig=True) and made.asked == b"MIG-1234-abcd"


def test_idle_clocks_are_no_throttling_but_heat_and_power_are(nvml):
    nvml(reasons=0x1 | 0x2)
    assert read_card(CUDA).throttles == ()
    nvml(reasons=0x4 | 0x40)
    assert read_card(CUDA).throttles == ("power cap", "hardware thermal slowdown")


def test_without_nvml_nothing_is_known(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_card(CUDA) is None and disturbed_by(None, QUIET) == ()
    made = nvml()
    made.nvmlDeviceGetTemperature = lambda *_: (_ for _ in ()).throw(made.NVMLError("lost"))
    assert read_card(CUDA) is None


def test_what_disturbs_a_timing_is_said():
    assert disturbed_by(QUIET, QUIET) == disturbed_by(QUIET, changed(sm_mhz=1800, temperature_c=80)) == ()
    assert disturbed_by(QUIET, changed(throttles=("power cap",))) == ("throttled: power cap",)
    assert disturbed_by(QUIET, changed(sm_mhz=1500)) == ("clock fell from 1980 to 1500 MHz",)
    assert disturbed_by(changed(other_processes=2), QUIET) == ("2 other processes on the card",)


@pytest.mark.parametrize(("states", "runs", "disturbed"), [
    ([QUIET] * 2, 2, ()),
    ([QUIET, changed(sm_mhz=900), QUIET, QUIET], 4, ()),
    ([changed(other_processes=1)] * 4, 4, ("1 other process on the card",)),
    ([None] * 2, 2, ()),
])  # fmt: skip
def test_a_disturbed_measurement_is_made_again_and_marked_if_that_is_no_better(monkeypatch, states, runs, disturbed):
    left, made = list(states), []
    monkeypatch.setattr(latency, "read_card", lambda device: left.pop(0))
    monkeypatch.setattr(latency, "warm_up", lambda *_: (0, True))
    timing = latency.measure({"a": lambda: made.append(1)}, 2)["a"]
    assert len(made) == runs and len(timing.samples_ms) == 2 and not left
    assert timing.disturbed == disturbed and timing.card == (() if states[0] is None else tuple(states[-2:]))


def test_a_disturbed_comparison_is_made_again_and_says_so(monkeypatch):
    class Drawing:
        model = SimpleNamespace(device=torch.device("cpu"))

        def generate(self, prompts, seeds, steps):
            made.append(steps)

    left, made = [QUIET, changed(throttles=("power cap",))] * 2, []
    monkeypatch.setattr(latency, "read_card", lambda device: left.pop(0))
    both = {BASELINE: Drawing(), "fast": Drawing()}
    timing = time_in_turn(both, dict.fromkeys(both, ()), [(["a"], [0])], 3, 0)["fast"]
    assert len(made) == 2 * 3 * 2 and len(timing.samples_ms) == len(timing.processor_ms) == 3
    assert timing.disturbed == ("throttled: power cap",)
    row = {"name": "fast", "warmed": True, "disturbed": ["throttled: power cap"]}
    assert "the card was disturbed, even on a repeat (throttled: power cap): trust only the ratios" in format_table(
        [row]
    )
