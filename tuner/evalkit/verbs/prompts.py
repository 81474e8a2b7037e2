"""`stagevar-eval prompts`: GenEval-style prompt sets and stratified subsets."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stagevar.cli.arguments import existing_file, existing_path, file_value, name_value, positive_int, whole_number
from stagevar.errors import UsageError
from stagevar.sections import shown
from tuner.evalkit.delivery import Verbs, add_verb, deliver

_HELP = """\
Without --from: COCO classes, GenEval's six tasks, always the same for a seed. With --from: every tag keeps its share.
--check RESULT.json ... (three or more systems on the prompts of --from, one image each) says how well subsets of
--count prompts reproduce the ranking by all prompts (Spearman)."""


def add(verbs: Verbs) -> None:
    """The options of the verb."""
    verb = add_verb(verbs, "prompts", "make a GenEval-style prompt set, or a stratified subset of one", _HELP)
    verb.add_argument("--count", type=positive_int, help="number of prompts (with --from: all of them)")
    verb.add_argument(
        "--from",
        dest="source",
        type=existing_path,
        metavar="FILE",
        help="take a stratified subset of these prompts (.jsonl, .json, .csv, .txt, or a folder of .txt, one prompt each)",
    )
    verb.add_argument("--tags", type=_tags, metavar="TAG,...", help="tasks to generate (default: all six)")
    verb.add_argument("--seed", type=whole_number, default=0, help="seed (default %(default)s)")
    verb.add_argument("--to", type=file_value, metavar="FILE.jsonl", help="write the prompts here, as GenEval metadata")
    verb.add_argument(
        "--check", type=existing_file, nargs="+", metavar="RESULT.json", help="results of `images`, one per system"
    )
    verb.add_argument("--metric", type=name_value, default="geneval", help="metric of --check (default %(default)s)")
    verb.set_defaults(run=run, inputs=("source", "check"), outputs=("to", "out"))


def run(options: argparse.Namespace) -> int:
    """Makes or subsets prompts, and judges subsets where results are given."""
    from tuner.metrics.prompt_sets import (
        generate,
        read_prompts,
        stratified_subset,
        subset_rank_correlation,
        write_metadata,
    )

    results: dict[str, object] = {}
    subset: dict[str, float] = {}
    if options.source is None:
        if options.check:
            raise UsageError("--check needs --from: the prompts that the results were made with")
        if options.count is None:
            raise UsageError("give --count N, how many prompts to make, or --from FILE")
        prompts = generate(options.count, options.seed, **({"tags": options.tags} if options.tags else {}))
    else:
        if options.tags:
            raise UsageError(
                "--tags says which prompts to make, but --from takes those of a file: leave one of them out"
            )
        whole = read_prompts(options.source)
        if options.check and options.count is None:
            raise UsageError("--check needs --count N: how many prompts its subsets have")
        indices = stratified_subset(whole, len(whole) if options.count is None else options.count, options.seed)
        prompts = [whole[index] for index in indices]
        results["indices"] = indices
        if options.check:
            subset = results["subset"] = subset_rank_correlation(
                _values_of(options.check, options.metric, len(whole)), whole, options.count, seed=options.seed
            )
    if options.to is not None:
        write_metadata(prompts, options.to)
    by_tag: dict[str, int] = {}
    for prompt in prompts:
        tag = str(prompt.get("tag", ""))
        by_tag[tag] = by_tag.get(tag, 0) + 1
    results |= {"count": len(prompts), "tags": by_tag, "prompts": prompts}
    lines = [str(prompt["prompt"]) for prompt in prompts] if options.to is None and not options.check else []
    lines += [f"{name:<16} {value:.4f}" for name, value in subset.items()]
    lines += [f"{tag or 'prompts':<16} {count}" for tag, count in by_tag.items()]
    return deliver(options, results, lines)


def _tags(text: str) -> list[str]:
    """GenEval's tasks with commas between them."""
    from stagevar.prompts.geneval import TAGS

    tags = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [tag for tag in tags if tag not in TAGS]
    if unknown or not tags:
        named = shown(unknown[0] if unknown else text)
        raise argparse.ArgumentTypeError(f"{named} is not a task; use {', '.join(TAGS)}, separated by commas")
    return tags


def _values_of(paths: Sequence[Path], metric: str, count: int) -> np.ndarray:
    """One row per result file: the metric's value per image, which must be one per prompt."""
    from stagevar.text_files import read_json

    rows = []
    for path in paths:
        try:
            values = [float(row["value"]) for row in read_json(path)["results"]["metrics"][metric]["rows"]]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UsageError(f"{path} has no rows of {shown(metric)}; make it with stagevar-eval images") from None
        if not all(map(math.isfinite, values)):
            raise UsageError(f"{path}: a value of {shown(metric)} is too large for floating point")
        if len(values) != count:
            raise UsageError(
                f"{path}: {len(values)} rows of {shown(metric)} for {count} prompts; one image per prompt needed"
            )
        rows.append(values)
    return np.asarray(rows)
