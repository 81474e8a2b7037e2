"""A TrialSampler in a separate process, so that asking continues while the previous round is evaluated.

A process, not a thread: a Gaussian process holds Python's lock for most of a second, and launching a model's kernels from
the same interpreter would wait for it, which would slow the model and spoil timings. Not `multiprocessing`: its processes
import the caller's main module again, so a five-line script that calls `tune` would call it there as well.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stagevar.errors import InfrastructureError, reason_of
from tuner.config.parameters import Value

if TYPE_CHECKING:
    from tuner.proposals.trial_sampler import Proposal, TrialOutcome

_MAIN = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from tuner.proposals import sampler_process; sampler_process.serve()"
)


class SamplerLost(InfrastructureError):
    """The proposing process died; its trials are on disk."""


class SamplerProcess:
    """Has the arguments and methods of a `TrialSampler`, and one in another process does the work.

    The process yields to everything else (nice), ignores Ctrl-C and ends with its parent, however that ends. Calls from
    several threads take turns.

    Attributes:
        pid: of the process.
    """

    def __init__(self, *arguments: Any):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self._turn = threading.Lock()
        self._built, self._refused = False, None
        with contextlib.suppress(BrokenPipeError):  # the first call will say so
            self._send(sys.path)
            self._send(arguments)

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
        return self._call("proposes")

    @property
    def ask_seconds(self) -> list[float]:
        return self._call("ask_seconds")

    def close(self) -> None:
        """Ends the process after its current call."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._process.wait()
        self._output.close()

    def _send(self, message: Any) -> None:
        pickle.dump(message, self._input)
        self._input.flush()

    def _call(self, name: str, *arguments: Any) -> Any:
        """Returns or raises what a method does in the process, or returns an attribute's value there."""
        with self._turn:
            try:
                if not self._built:  # an error of the constructor is raised once it matters
                    self._refused, _ = pickle.load(self._output)
                    self._built = True
                if self._refused is not None:
                    raise self._refused
                self._send((name, arguments))
                error, result = pickle.load(self._output)
            except (EOFError, BrokenPipeError):
                raise SamplerLost("the process that proposes schedules died; the same command resumes") from None
            except KeyboardInterrupt:
                self._process.kill()  # its half-read reply would be taken for the next call's
                raise
        if error is not None:
            raise error
        return result


# ------------------------------------------------------------------------------------------------ in that process


def serve() -> None:
    """Builds a TrialSampler and answers calls until its parent closes the pipe or dies."""
    os.nice(5)
    calls, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # library output must not mix with the replies
    from tuner.proposals.trial_sampler import TrialSampler
    from tuner.results.run_dir import proposing_lock

    made: list[TrialSampler] = []

    def build(*arguments: Any) -> None:
        made.append(TrialSampler(*arguments))
        made[0].load()

    def call(name: str, arguments: tuple[Any, ...]) -> Any:
        found = getattr(made[0], name)
        return found(*arguments) if callable(found) else found

    def answer(do: Any, arguments: tuple[Any, ...]) -> None:
        """Replies with (None, what `do` returns) or (its error, None)."""
        error = result = None
        try:
            result = do(*arguments)
        except Exception as raised:
            error = _portable(raised)
        pickle.dump((error, result), replies)
        replies.flush()

    with contextlib.suppress(EOFError, BrokenPipeError):
        arguments = pickle.load(calls)
        with proposing_lock(arguments[0]):
            answer(build, arguments)
            while True:
                answer(call, pickle.load(calls))


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or an equivalent one of ours if it cannot be pickled."""
    error.add_note(f"In the process that proposes schedules:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return InfrastructureError(f"the process that proposes schedules: {reason_of(error)}")
    return error
