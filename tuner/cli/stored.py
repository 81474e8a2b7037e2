"""`--store`: a study that asks the store first, and what it reports about that."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tuner.config.quality import quality_limits
from tuner.config.space import SearchSpace

if TYPE_CHECKING:
    from tuner.config.prompts import PromptSet
    from tuner.evaluation.executor import Executor
    from tuner.evaluation.store import StoredCosts, StoredExecutor
    from tuner.study.study import Study


def with_store(
    args: argparse.Namespace,
    space: SearchSpace,
    evaluator: Any,
    prompts: Mapping[str, PromptSet],
    executor: Executor | None,
    progress: Any,
) -> tuple[StoredExecutor, StoredCosts]:
    """Executor and evaluator that ask the store first; reports what it has for this study."""
    from tuner.evaluation.local import LocalExecutor
    from tuner.evaluation.store import Store, StoredCosts, StoredExecutor

    store, limits = Store(args.store), quality_limits(space.quality, args.max_drop)
    inner = executor or LocalExecutor(evaluator)
    stored = StoredExecutor(inner, store, evaluator.facts, space, prompts, limits)
    for line in stored.reasons():
        progress.say(f"store: {line}")
    return stored, StoredCosts(evaluator, store)


def say_reuse(study: Study, progress: Any) -> None:
    """Reports how much of a study came from its store, if it has one."""
    counts = getattr(study.executor, "counts", None)
    if counts is not None and counts.reused + counts.made:
        share = counts.made / (counts.reused + counts.made)
        progress.say(
            f"store: {counts.made:,} of {counts.reused + counts.made:,} images drawn ({share:.0%}), the others reused"
        )
