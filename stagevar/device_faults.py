"""What an error says about the device that it happened on: broken, short of memory, or nothing.

After an illegal access or a device-side assertion every call of the process fails, whatever it computes; and whether a
computation finds memory depends on what else is alive. Neither says anything about a schedule.
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
    """Lets errors of a computation pass, but for those that are the device's.

    Args:
        device: where it runs. what: it, in words, for the message.

    Raises DeviceBroken where no kernel runs any more, and OutOfDeviceMemory where memory ran out. What the error's frames
    hold is freed only once the error is gone, so whoever tries again does it outside of the `except`.
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
    """Whether no kernel runs on the device after this error. A CUDA device is tried; elsewhere the error is believed."""
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
    """Gives back what nobody holds any more, the allocator's cache included."""
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
