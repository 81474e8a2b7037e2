"""How long a study of nano takes to a verified profile, and how many images it draws: whole studies, variant after variant.

    python -m benchmarks.first_verified --budget 57% --seeds 3 --output first_verified.json

`quick` is the default. `together` judges all finalists at the same time instead of one after another. `before` is a study as it
was before sensitivities: 30 schedules that the sampler proposes after the known settings, finalists together. Every study
starts from nothing, in a folder of its own; seconds include loading the model and the images of the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, write_json
from stagevar.errors import StagevarError
from tuner.cli.plan import plan
from tuner.cli.tune import build_parser, build_study
from tuner.evaluation.executor import Executor, Outcome, QualityTask
from tuner.results.result import StudyResult
from tuner.results.run_dir import prepare
from tuner.study.options import FULL_TRIALS, SearchShortcuts
from tuner.study.progress import Progress
from tuner.study.study import Study

#: Changes to the options of a study, by variant.
VARIANTS: dict[str, dict[str, Any]] = {
    "quick": {},
    "together": {"one_by_one": False},
    "before": {"one_by_one": False, "trials": FULL_TRIALS, "shortcuts": SearchShortcuts()},
}


class Counting(Executor):
    """Hands tasks on and counts the images that they ask for, by split."""

    name = "counting"

    def __init__(self, study: Study):
        self.inner, self.prompts = study.executor, study.prompts
        self.images = dict.fromkeys(study.prompts, 0)

    def run(self, tasks: Sequence[QualityTask]) -> Iterator[tuple[QualityTask, list[Outcome]]]:
        for task in tasks:
            self.images[task.split] += len(task.schedules) * len(self.prompts[task.split].batch(task.batch)[1])
        yield from self.inner.run(tasks)

    def close(self) -> None:
        self.inner.close()


def run_variant(name: str, words: Sequence[str], run_dir: Path) -> dict[str, Any]:
    """One study as plain data."""
    words = [*words, "--out", str(run_dir), "--quiet"]
    checked = plan(build_parser().parse(words), words)
    prepare(checked.run_dir)
    began = time.monotonic()
    study = build_study(checked, Progress(quiet=True), lambda: False)
    study.options = dataclasses.replace(study.options, **VARIANTS[name])
    study.executor = counting = Counting(study)
    try:
        result: StudyResult = study.run()
    finally:
        counting.close()
    pick = result.pick
    return {
        "variant": name,
        "seed": result.seed,
        "verdict": result.verdict,
        "seconds": time.monotonic() - began,
        "schedules": len(result.candidates),
        "images": dict(counting.images),
        "speedup": None if pick is None else pick.final_latency.speedup_text,
        "phases_s": {name: round(value, 1) for name, value in study.progress.seconds.items()},
    }


def summary(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A line per variant: medians, and their ratio to the first one's."""
    lines, first = [], None
    for name in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == name]
        seconds = statistics.median(run["seconds"] for run in mine)
        images = statistics.median(sum(run["images"].values()) for run in mine)
        first = first or (seconds, images)
        verified = sum(run["verdict"] == "verified" for run in mine)
        lines.append(
            f"{name:<10} {seconds:7.0f} s ({seconds / first[0]:.2f}) {images:7,.0f} images ({images / first[1]:.2f}), "
            f"{verified} of {len(mine)} verified"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--budget", default="57%")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3, help="studies per variant (default: 3)")
    parser.add_argument("--output", type=Path, required=True, help="JSON, written after every study")
    parser.add_argument("further", nargs="*", help="further options of stagevar-tune, after --")
    args = parser.parse_args(argv)
    figures: dict[str, Any] = {"environment": environment(), "budget": args.budget, "runs": []}
    try:
        for seed in range(args.seeds):
            for name in args.variants:
                words = ["--model", args.model, "--budget", args.budget, "--seed", str(seed), *args.further]
                with tempfile.TemporaryDirectory() as folder:
                    run = run_variant(name, words, Path(folder) / "run")
                figures["runs"].append(run)
                print({key: value for key, value in run.items() if key != "phases_s"}, flush=True)
                write_json(args.output, figures)
    except StagevarError as error:
        print(f"first_verified: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(summary(figures["runs"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
