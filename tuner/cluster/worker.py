"""What runs in a worker's process: one evaluator, built there from a recipe and called by the driver."""

from __future__ import annotations

import functools
import gc
import os
import pkgutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stagevar import logs
from stagevar.errors import DeviceBroken
from stagevar.schedule import Steps
from tuner.evaluation.evaluator import EvaluationInfo, Evaluator
from tuner.evaluation.executor import Outcome, QualityTask
from tuner.evaluation.local import evaluate_task

#: Exit status of a worker whose CUDA context is broken beyond repair.
BROKEN_CUDA = 86


@dataclass(frozen=True)
class Recipe:
    """How a worker builds its evaluator.

    Attributes:
        function: "module:function".
        arguments: its keyword arguments, plain data with absolute paths.
    """

    function: str
    arguments: Mapping[str, object] = field(default_factory=dict)

    def build(self) -> Evaluator:
        return pkgutil.resolve_name(self.function)(**self.arguments)


@dataclass(frozen=True)
class Place:
    """Where a worker runs; `node` is Ray's id, `gpu` the GPU's UUID, empty on a CPU."""

    node: str
    host: str
    process: int
    gpu: str = ""


@dataclass(frozen=True)
class Answer:
    """What a call returned, and the messages that its worker logged since the last one."""

    value: Any
    messages: tuple[tuple[str, int, str], ...]


def _with_messages(method: Callable[..., Any]) -> Callable[..., Answer]:
    """Makes a worker's method return its process's messages along with its value."""

    @functools.wraps(method)
    def answer(self: Worker, *arguments: Any) -> Answer:
        value = method(self, *arguments)
        return Answer(value, self.messages.take())

    return answer


class Worker:
    """One evaluator in one process, built once; Ray runs its calls one at a time."""

    def __init__(self, node: str, own_gpu: bool = True):
        if not own_gpu:  # Ray shows every GPU of the node to a process that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.node = node
        self.evaluator: Evaluator
        self.messages = logs.Kept()
        logs.listening(self.messages).__enter__()  # until the process ends

    @_with_messages
    def started(self) -> None:
        """Answers as soon as this process runs, so that the driver knows that Ray had room for it."""

    @_with_messages
    def load(self, recipe: Recipe) -> tuple[EvaluationInfo, Place]:
        """Builds the evaluator, with models from disk; must be the first call but `started`.

        Only now is the recipe given: another worker may have chosen the engine since this process was asked for.
        """
        self.evaluator = recipe.build()
        return self.evaluator.facts, self._place()

    @_with_messages
    def quality(self, task: QualityTask) -> list[Outcome]:
        with _leaving_when_broken():
            return evaluate_task(self.evaluator, task)

    @_with_messages
    def timed(self, method: str, *arguments: Any) -> tuple[Any, Place]:
        """What a timing method of the evaluator measured, and where."""
        with _leaving_when_broken():
            return getattr(self.evaluator, method)(*arguments), self._place()

    @_with_messages
    def images(self, steps: Steps, split: str, batch: int) -> np.ndarray:
        with _leaving_when_broken():
            return self.evaluator.images(steps, split, batch)

    def _place(self) -> Place:
        gpu = ""
        if self.evaluator.facts.device.get("kind") == "cuda":
            import torch

            gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return Place(self.node, socket.gethostname(), os.getpid(), gpu)


@contextmanager
def _leaving_when_broken() -> Iterator[None]:
    """Ends this process if no kernel can run in it any more: only a new process helps, and the driver builds one."""
    try:
        yield
    except DeviceBroken:
        os._exit(BROKEN_CUDA)


def free_memory() -> None:
    """Frees what an ended study held, for the next one in this process; ends a process that cannot run another."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        from stagevar.device_faults import is_broken

        if is_broken(RuntimeError("an ended study"), torch.device("cuda")):
            os._exit(BROKEN_CUDA)
        torch.cuda.empty_cache()
