"""What an executor is: it runs quality tasks, here or elsewhere, and returns each result once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stagevar.errors import InfrastructureError
from stagevar.schedule import Steps


class WorkersLost(InfrastructureError):
    """No worker is left to evaluate on."""


@dataclass(frozen=True)
class QualityTask:
    """Several schedules on one micro-batch of one prompt set ("search" or "heldout"), walked together as a tree."""

    schedules: tuple[Steps, ...]
    split: str
    batch: int


@dataclass(frozen=True)
class Failed:
    """Why a schedule gave no values, in one line."""

    error: str


@dataclass(frozen=True)
class NotMeasured(Failed):
    """There was too little memory for a schedule here, even alone and in the smallest parts; not the schedule's fault."""


#: Values per metric (and "quality"), one per prompt of the micro-batch, or why there are none.
Outcome = Mapping[str, np.ndarray] | Failed


class Executor(ABC):
    """Runs tasks. Gives one result per task, in any order; a failing schedule affects no other."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, tasks: Sequence[QualityTask]) -> Iterator[tuple[QualityTask, list[Outcome]]]:
        """Yields every task once with one outcome per schedule."""

    def close(self) -> None:  # noqa: B027  nothing to free is the common case
        """Frees what the executor holds; it cannot be used afterwards."""
