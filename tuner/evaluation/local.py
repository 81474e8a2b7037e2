"""The executor in this process: one task after another on one evaluator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from stagevar.errors import InfrastructureError, OutOfDeviceMemory, first_line
from tuner.evaluation.evaluator import Evaluator
from tuner.evaluation.executor import Executor, Failed, NotMeasured, Outcome, QualityTask


class LocalExecutor(Executor):
    """Evaluates in this process. If a tree of schedules fails, each is tried alone, so that only the culprit is lost."""

    name: ClassVar[str] = "local"

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator

    def run(self, tasks: Sequence[QualityTask]) -> Iterator[tuple[QualityTask, list[Outcome]]]:
        for task in tasks:
            yield task, evaluate_task(self.evaluator, task)


def evaluate_task(evaluator: Evaluator, task: QualityTask) -> list[Outcome]:
    """The outcomes of one task. Model errors become `Failed`; an InfrastructureError, no schedule's fault, is passed on.

    If memory runs out, each schedule is tried alone; one that still does not fit is `NotMeasured`.
    """
    try:
        return list(evaluator.quality(task.schedules, task.split, task.batch))
    except OutOfDeviceMemory as error:
        if len(task.schedules) == 1:
            return [NotMeasured(str(error))]
    except InfrastructureError:
        raise
    except Exception as error:
        if len(task.schedules) == 1:
            return [Failed(first_line(error))]
    return [
        outcome
        for steps in task.schedules
        for outcome in evaluate_task(evaluator, QualityTask((steps,), task.split, task.batch))
    ]
