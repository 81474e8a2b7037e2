"""A TrialSampler in a process of its own, so that asking goes on beside the evaluation of the round before.

A process and not a thread: a Gaussian process holds Python's lock for most of a second, and launching a model's kernels from
the same interpreter would wait for it, which would slow the model and spoil timings.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from stagevar.errors import InfrastructureError
from tuner.config.space import Value

if TYPE_CHECKING:
    from tuner.proposals.trial_sampler import Proposal, TrialOutcome, TrialSampler


class SamplerLost(InfrastructureError):
    """The proposing process died; its trials are on disk."""


class SamplerProcess:
    """Takes the arguments of a `TrialSampler` and offers its methods; the one in the other process does the work.

    The process yields to everything else (nice), ignores Ctrl-C and ends with its parent, however that ends.
    """

    def __init__(self, *arguments: Any):
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._built = self._pool.submit(_build, arguments)

    def enqueue(self, presets: Mapping[str, Mapping[str, Value]]) -> None:
        self._call("enqueue", presets)

    def again(self, proposals: Sequence[Proposal]) -> None:
        self._call("again", proposals)

    def recover(self, evidence: Mapping[int, TrialOutcome | None]) -> list[Proposal]:
        return self._call("recover", evidence)

    def ask(self, random: bool = False) -> Proposal:
        return self._call("ask", random)

    def begin(self, numbers: Sequence[int]) -> None:
        self._call("begin", numbers)

    def tell(self, number: int, outcome: TrialOutcome) -> None:
        self._call("tell", number, outcome)

    def fail(self, number: int) -> None:
        self._call("fail", number)

    def withdraw(self, number: int) -> None:
        self._call("withdraw", number)

    def hand_over(self) -> None:
        self._call("hand_over")

    def completed(self) -> set[int]:
        return self._call("completed")

    @property
    def proposes(self) -> str:
        return self._get("proposes")

    @property
    def ask_seconds(self) -> list[float]:
        return self._get("ask_seconds")

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._result(_call, method, arguments)

    def _get(self, name: str) -> Any:
        return self._result(_get, name)

    def _result(self, function: Any, *arguments: Any) -> Any:
        try:
            self._built.result()  # an error of the construction is raised once it matters
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise SamplerLost("the process that proposes schedules died; the same command resumes") from None


# ------------------------------------------------------------------------------------------------ in that process

_trial_sampler: TrialSampler | None = None


def _build(arguments: tuple[Any, ...]) -> None:
    global _trial_sampler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from tuner.proposals.trial_sampler import TrialSampler

    _trial_sampler = TrialSampler(*arguments)
    _trial_sampler.load()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_trial_sampler, method)(*arguments)


def _get(name: str) -> Any:
    return getattr(_trial_sampler, name)
