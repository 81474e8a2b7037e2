"""`--store` and `--from`: what a study takes over instead of measuring it, and what it reports about that."""

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
    from tuner.study.earlier_verifications import EarlierStudy
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


def earlier_study(
    args: argparse.Namespace, space: SearchSpace, evaluator: Any, prompts: Mapping[str, PromptSet], progress: Any
) -> EarlierStudy:
    """What the study of --from proved on the same held-out prompts; reports it, or why nothing is reused."""
    from tuner.evaluation.store import quality_context
    from tuner.study.earlier_verifications import EarlierStudy, read_earlier_study

    if args.start_from is None or args.effort == "instant" or evaluator.facts.random_weights:
        return EarlierStudy()
    context, limits = quality_context(evaluator.facts, space, "heldout"), quality_limits(space.quality, args.max_drop)
    found, line = read_earlier_study(args.start_from, context, prompts["heldout"], limits, space.floors)
    if line:
        progress.say(line)
    return found


def say_reuse(study: Study, progress: Any) -> None:
    """Reports how much of a study came from its store, if it has one."""
    counts = getattr(study.executor, "counts", None)
    if counts is not None and counts.reused + counts.made:
        share = counts.made / (counts.reused + counts.made)
        progress.say(
            f"store: {counts.made:,} of {counts.reused + counts.made:,} images drawn ({share:.0%}), the others reused"
        )
