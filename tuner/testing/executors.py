"""The contract that every executor passes, as a class to inherit: each task runs once, values equal the evaluator's own, and
a failing task affects no other.

class TestMine(ExecutorContract):
    @pytest.fixture
    def executor(self):
        return MyExecutor(tuner.testing.formulas.build)

    @pytest.fixture
    def faulty(self):
        return MyExecutor(functools.partial(tuner.testing.formulas.build, broken_skips=True))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from tuner.evaluation.executor import Executor, Failed, Outcome, QualityTask
from tuner.testing.formulas import BATCHES, FULL, PAPER, SKIP, TREE, FormulaEvaluator


def tasks(batches: Iterable[int] = range(BATCHES), split: str = "search") -> list[QualityTask]:
    """Tasks for three schedules, one per micro-batch."""
    return [QualityTask(TREE, split, batch) for batch in batches]


def same(outcomes: Sequence[Outcome], expected: Sequence[Outcome]) -> bool:
    """Whether all values are equal, bit for bit."""
    pairs = [
        (own, other)
        for own, other in zip(outcomes, expected, strict=False)
        if not isinstance(own, Failed) and not isinstance(other, Failed) and own.keys() == other.keys()
    ]
    equal = all(np.array_equal(own[metric], other[metric]) for own, other in pairs for metric in other)
    return len(outcomes) == len(expected) == len(pairs) and equal


class ExecutorContract:
    """Tests for an executor. Subclasses provide two fixtures, whose evaluators come from `tuner.testing.formulas`:

    * `executor`: made with `build()`; its attribute `evaluator` is the study's view of it.
    * `faulty`: made with `build(broken_skips=True)`.
    """

    @pytest.fixture
    def plain(self) -> FormulaEvaluator:
        """The evaluator itself, to compare with."""
        return FormulaEvaluator()

    # ------------------------------------------------------------------ the contract

    def test_every_task_comes_back_once_with_the_evaluators_values(
        self, executor: Executor, plain: FormulaEvaluator
    ) -> None:
        found = {task.batch: outcomes for task, outcomes in executor.run(tasks())}
        assert sorted(found) == list(range(BATCHES))
        assert all(same(found[b], plain.quality(TREE, "search", b)) for b in found)

    def test_fewer_tasks_than_workers_change_nothing(self, executor: Executor, plain: FormulaEvaluator) -> None:
        [(task, outcomes)] = executor.run(tasks([3]))
        assert task == tasks([3])[0] and same(outcomes, plain.quality(TREE, "search", 3))

    def test_a_task_given_twice_is_answered_twice(self, executor: Executor, plain: FormulaEvaluator) -> None:
        task = tasks([1])[0]
        answers = list(executor.run([task, task]))
        assert [t for t, _ in answers] == [task, task]
        assert all(same(outcomes, plain.quality(TREE, "search", 1)) for _, outcomes in answers)

    def test_both_sets_of_prompts(self, executor: Executor, plain: FormulaEvaluator) -> None:
        [(_, outcomes)] = executor.run(tasks([2], split="heldout"))
        assert same(outcomes, plain.quality(TREE, "heldout", 2))

    def test_no_tasks_give_nothing(self, executor: Executor) -> None:
        assert list(executor.run([])) == []

    def test_a_task_without_schedules_is_answered_with_nothing(self, executor: Executor) -> None:
        empty, full = QualityTask((), "search", 0), tasks([1])[0]
        answers = dict(executor.run([empty, full]))
        assert answers[empty] == [] and len(answers[full]) == len(TREE)

    def test_a_call_that_was_given_up_leaves_no_trace(self, executor: Any, plain: FormulaEvaluator) -> None:
        abandoned = executor.run(tasks())
        next(abandoned)
        abandoned.close()
        found = {task.batch: outcomes for task, outcomes in executor.run(tasks([0, 5]))}
        assert sorted(found) == [0, 5]
        assert all(same(found[b], plain.quality(TREE, "search", b)) for b in found)

    def test_images_are_the_evaluators(self, executor: Any, plain: FormulaEvaluator) -> None:
        assert np.array_equal(executor.evaluator.images(PAPER, "heldout", 4), plain.images(PAPER, "heldout", 4))

    def test_timings_keep_the_ratio_to_the_full_schedule_round_by_round(
        self, executor: Any, plain: FormulaEvaluator
    ) -> None:
        """Whichever process timed it, a schedule is compared with the full one of the same process and round."""
        timings = executor.evaluator.latency({"baseline": FULL, "paper": PAPER, "skip": SKIP}, 5)
        assert list(timings) == ["baseline", "paper", "skip"]
        assert all(len(timing.samples_ms) == 5 and timing.warmed for timing in timings.values())
        full = np.array(timings["baseline"].samples_ms)
        assert len(set(full)) == 5
        for name, steps in (("paper", PAPER), ("skip", SKIP)):
            np.testing.assert_allclose(timings[name].samples_ms / full, plain.ratio(steps), rtol=1e-12)

    def test_a_schedule_that_raises_takes_no_other_with_it(self, faulty: Executor, plain: FormulaEvaluator) -> None:
        for task, (full, paper, skip) in faulty.run(tasks([0, 1, 2])):
            assert same([full, paper], plain.quality((FULL, PAPER), "search", task.batch))
            assert isinstance(skip, Failed) and skip.error == "RuntimeError: this schedule is broken"
