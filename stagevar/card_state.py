"""What a card was doing while something was timed: clocks, temperature, power, throttling, and who else was on it.

Read through NVML (nvidia-ml-py) where it is installed; without it nothing is known and nothing is claimed. Ratios of
schedules that were timed in turn survive a drifting clock, milliseconds do not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Reasons for lower clocks that disturb a timing, by NVML's bit; being idle and a clock that a user asked for do not.
_THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
#: Clock of the multiprocessors below which, against the state before, a timing counts as throttled.
LEAST_CLOCK = 0.9


@dataclass(frozen=True)
class CardState:
    """One reading.

    Attributes:
        throttles: reasons for lowered clocks, in words.
        other_processes: how many have compute contexts on the card, apart from this one.
        mig: whether it is a slice of a card.
    """

    driver: str
    sm_mhz: int
    memory_mhz: int
    temperature_c: int
    power_w: float
    power_limit_w: float
    throttles: tuple[str, ...]
    other_processes: int
    mig: bool

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {**vars(self), "throttles": list(self.throttles)}


def read_card(device: torch.device | str) -> CardState | None:
    """The state of a CUDA device now; None for other devices, or where NVML is missing or does not answer."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = _handle(pynvml, device)
        return CardState(
            driver=_text(pynvml.nvmlSystemGetDriverVersion()),
            sm_mhz=pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            memory_mhz=pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            temperature_c=pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            power_w=pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            power_limit_w=pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            throttles=_reasons(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            other_processes=sum(p.pid != os.getpid() for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
            mig=_mig(pynvml, handle),
        )
    except pynvml.NVMLError:
        return None


def disturbed_by(before: CardState | None, after: CardState | None) -> tuple[str, ...]:
    """Why figures taken between two readings may be wrong, in words; empty if a reading is missing."""
    if before is None or after is None:
        return ()
    found = [f"throttled: {reason}" for reason in dict.fromkeys((*before.throttles, *after.throttles))]
    if after.sm_mhz < LEAST_CLOCK * before.sm_mhz:
        found.append(f"clock fell from {before.sm_mhz} to {after.sm_mhz} MHz")
    others = max(before.other_processes, after.other_processes)
    if others:
        found.append(f"{others} other process{'es' if others > 1 else ''} on the card")
    return tuple(found)


def _handle(pynvml: Any, device: torch.device) -> Any:
    """By UUID: NVML numbers all cards, CUDA those that are visible."""
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}".encode())
    except pynvml.NVMLError:  # a slice: clocks, power and driver are those of the card that it is cut from
        part = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}".encode())
        return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)


def _reasons(bits: int) -> tuple[str, ...]:
    return tuple(words for bit, words in _THROTTLES.items() if bits & bit)


def _mig(pynvml: Any, handle: Any) -> bool:
    try:
        return pynvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except pynvml.NVMLError:  # cards that cannot be sliced do not answer
        return False


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
