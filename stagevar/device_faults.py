"""What an error says about its device: broken, out of memory, or nothing.

After an illegal access or a device-side assertion, every call of the process fails, whatever it computes; and whether a
computation finds enough memory depends on what else is alive. Neither says anything about a schedule.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from stagevar.errors import DeviceBroken, InfrastructureError, OutOfDeviceMemory, reason_of


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is an allocator's on any device."""
    return any(
        isinstance(one, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate" in str(one)
        for one in _chain(error)
    )


@contextlib.contextmanager
def told_apart(device: torch.device, what: str) -> Iterator[None]:
    """Passes a computation's errors through, except for the device's own.

    What the error's frames hold is freed only once the error is gone, so any retry belongs outside the `except`.

    Args:
        device: where the computation runs.
        what: the computation in words, for the message.

    Raises:
        DeviceBroken: if no kernel runs any more.
        OutOfDeviceMemory: if memory ran out.
    """
    try:
        yield
    except InfrastructureError:
        raise
    except Exception as error:
        line = reason_of(_telling(error))
        if is_broken(error, device):
            raise DeviceBroken(
                f"{device} is broken ({line}): no kernel runs in this process any more; the same command resumes in a new one"
            ) from error
        if is_out_of_memory(error):
            raise OutOfDeviceMemory(
                f"{what} needs more memory than is free on {device} ({line}); free some, then the same command resumes"
            ) from error
        raise


def is_broken(error: BaseException, device: torch.device) -> bool:
    """Whether no kernel runs on the device after this error. A CUDA device is tested; elsewhere the error is believed."""
    if device.type != "cuda":
        return any(isinstance(one, torch.AcceleratorError) for one in _chain(error))
    try:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.zeros(1, device=device).add_(1).item()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def free_unused(device: torch.device) -> None:
    """Frees memory that nothing holds any more, including the allocator's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _telling(error: BaseException) -> BaseException:
    """The error of the chain that is the device's own, or the last one."""
    own = (torch.OutOfMemoryError, torch.AcceleratorError)
    return next((one for one in _chain(error) if isinstance(one, own)), error)
