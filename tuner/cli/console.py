"""What a study prints at the end: its verdict, what it means, what to do next, and the files that it wrote."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tuner.config.quality import limited
from tuner.results.candidate import Candidate, Finalist

if TYPE_CHECKING:
    from tuner.results.result import StudyResult


class MetricRow(TypedDict):
    """What is printed about one metric.

    "change" is paired, [estimate, low, high]; "drop_upper" and "status" are those of its verification, if any.
    """

    metric: str
    unit: str
    change: list[float]
    prompts: int
    drop_upper: float | None
    max_drop: float | None
    status: str | None


def write_derived(result: StudyResult, run_dir: Path) -> list[Path]:
    """Writes everything that is derived from study.json; returns the paths."""
    from tuner.report.export import export
    from tuner.report.page import write_report

    return [*export(result, run_dir), write_report(result, run_dir)]


def announce(result: StudyResult, run_dir: Path, written: Sequence[Path], args: argparse.Namespace) -> int:
    """Prints the verdict: one line each for speed, quality, time and files, then what it means and what to do next."""
    from tuner.report.next_steps import next_steps
    from tuner.report.words import describe
    from tuner.results.codec import to_plain

    pick, following = result.pick, next_steps(result, run_dir, shlex.split(result.command))
    if args.json:
        summary = {
            "verdict": result.verdict,
            "exit_code": result.exit_code,
            "reason": result.reason,
            "picks": result.picks,
            "nearest": list(result.nearest),
            "speedup": _bounds(pick, "speedup") if pick is not None else None,
            "quality_change": _bounds(pick, "quality") if pick is not None else None,
            "metrics": [] if pick is None else _metrics(result, pick),
            "baseline_ms": result.baseline.latency.median_ms if result.baseline.latency else None,
            "budget_ms": None if result.budget_ms != result.budget_ms else result.budget_ms,
            "schedules": len(result.candidates),
            "sampled": result.sampled,
            "phases_s": result.phases_s,
            "files": [str(path) for path in written],
            "next": dataclasses.asdict(following),
        }
        print(json.dumps(to_plain(summary), indent=2))
        return result.exit_code
    print(f"{result.verdict.replace('_', ' ')}: {result.reason}")
    if result.baseline.latency:
        full_ms = result.baseline.latency.median_ms  # what a budget in percent refers to, and what the report shows
        budget = f"budget {result.budget} = {result.budget_ms:.1f} ms"
        print(f"full schedule    {full_ms:.1f} ms, {budget} ({result.engine} engine)")
        print(f"latency covers   {result.includes}")
    if result.engine_choice is not None and result.engine_choice.tried:
        print(f"engine           {result.engine}: {result.engine_choice.reason}")
    if pick is not None and pick is not result.baseline:
        print(f"schedule         {describe(pick.steps)}")
        print(f"speed-up         {_speedup(pick)}")
        for metric in _metrics(result, pick):
            mean, low, high = metric["change"]
            limit = f", limit -{metric['max_drop']:g}" if metric["max_drop"] is not None else ""
            bound = f"; drop at most {metric['drop_upper']:.3g}" if metric["drop_upper"] is not None else ""
            what = (
                f"{mean:+.3g} [{low:+.3g}, {high:+.3g}] {metric['unit']} on {metric['prompts']} prompts{bound}{limit}"
            )
            print(f"{metric['metric']:<16} {what}")
    whole = result.picks.get("no_skip")
    if whole and whole != result.picks.get("pick"):
        best = result.candidate(whole)
        print(f"without skips    {_speedup(best)}, {_change(result, best)}")
    for key in result.nearest:
        near = result.candidate(key)
        print(f"nearest          {_speedup(near)}, {_change(result, near)}: {describe(near.steps)}")
    tried = f"{len(result.candidates)} evaluated, {result.sampled} of them proposed by the search"
    print(f"schedules        {tried}; {result.stop_reason}")
    print("seconds          " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.phases_s.items()))
    for path in written:
        print(f"file             {path}")
    if following.lines:
        print()
    for line in following.lines:
        print(line)
    return result.exit_code


def _bounds(candidate: Candidate, what: str) -> list[float] | None:
    """[estimate, low, high] of the speed-up or the quality change; None for the full schedule itself."""
    latency, change = candidate.final_latency, candidate.final_differences.get("quality")
    if what == "speedup":
        change = latency.speedup if latency is not None else None
    return [change.mean, change.low, change.high] if change is not None else None


def _speedup(candidate: Candidate) -> str:
    return candidate.final_latency.speedup_text if candidate.final_latency is not None else "latency not measured"


def _metrics(result: StudyResult, candidate: Candidate) -> list[MetricRow]:
    """Per metric: unit, paired change [estimate, low, high], bound of the drop if it was verified, and limit."""
    verdicts = {v.name: v for v in candidate.final_verdicts} if isinstance(candidate, Finalist) else {}
    rows: list[MetricRow] = []
    for limit in result.limits:
        change, verdict = candidate.final_differences.get(limit.metric), verdicts.get(limit.name)
        if change is None:
            continue
        rows.append(
            {
                "metric": limit.metric,
                "unit": limit.unit,
                "change": [change.mean, change.low, change.high],
                "prompts": change.n,
                "drop_upper": None if verdict is None else verdict.bound,
                "max_drop": limit.max_drop,
                "status": None if verdict is None else verdict.status,
            }
        )
    return rows


def _change(result: StudyResult, candidate: Candidate) -> str:
    changes = [
        f"{m.metric} {d.signed_text} on {d.n} prompts"
        for m in limited(result.limits)
        if (d := candidate.final_differences.get(m.metric)) is not None
    ]
    return ", ".join(changes) or "quality not measured"
