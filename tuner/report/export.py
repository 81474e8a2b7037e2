"""The files a run leaves for others: profile.yaml (deploy it), pareto.yaml (choose again), trials.csv (look closer).

All three come from a StudyResult alone. The only module that imports pandas, and only when the table is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from stagevar.errors import UsageError
from stagevar.files import write_text_atomically
from stagevar.profile import PROFILE_JSON_SCHEMA, Envelope, Profile, card_section, plain
from stagevar.profile.sections import BaselineSection, ConstraintsSection, LatencySection, QualitySection, TextSection
from stagevar.schedule import StageSchedule
from stagevar.sections import read_section, section_data
from tuner.config.quality import MetricLimit, limited
from tuner.report.words import PICK_ORDER, describe, latency_of, name_of
from tuner.results.candidate import (
    Candidate,
    Failed,
    Interval,
    LatencyStats,
    Measured,
    Pruned,
    Unmeasured,
    Verdict,
    verification_of,
)
from tuner.results.result import StudyResult

if TYPE_CHECKING:
    import pandas as pd

PROFILE_FILE, PARETO_FILE, TRIALS_FILE = "profile.yaml", "pareto.yaml", "trials.csv"
#: The JSON Schema of profile.yaml, stored beside it so that editors find it wherever the directory goes.
JSON_SCHEMA_FILE = "profile.schema.json"
PARETO_SCHEMA = "stagevar-pareto/1"


def export(result: StudyResult, run_dir: Path | str) -> list[Path]:
    """Writes the files that the result allows and returns their paths: pareto.yaml and trials.csv always, and for a pick
    profile.yaml with its JSON Schema.

    A profile.yaml of an earlier, different outcome is removed: a run directory never offers a schedule that its own
    study did not pick. Raises UsageError if the folder cannot be written.
    """
    run_dir = Path(run_dir)
    profile_path = run_dir / PROFILE_FILE
    try:
        paths = [write_pareto(result, run_dir / PARETO_FILE), write_trials(result, run_dir / TRIALS_FILE)]
        if result.pick is None:
            profile_path.unlink(missing_ok=True)
            return paths
        write_text_atomically(run_dir / JSON_SCHEMA_FILE, PROFILE_JSON_SCHEMA.read_text(encoding="utf-8"))
        profile_of(result, result.pick).save(profile_path, json_schema=JSON_SCHEMA_FILE)
    except OSError as error:
        raise UsageError(f"{run_dir} cannot be written: {error.strerror or error}; choose another --out") from None
    return [profile_path, *paths]


# ---------------------------------------------------------------- profile.yaml


def profile_of(result: StudyResult, candidate: Candidate) -> Profile:
    """The deployment profile of one candidate (any front member can be deployed, verified or not).

    Raises ValueError for a candidate that was never measured.
    """
    latency = latency_of(result, candidate)
    if latency is None:
        raise ValueError(f"candidate {candidate.key} was not measured")
    check = verification_of(candidate)
    is_full = candidate.key == result.baseline.key
    wanted = ("verified", "baseline") if is_full else ("verified",)
    proved = check is not None and check.status in wanted and all(v.status == "met" for v in check.verdicts)
    model = {
        "name": result.model,
        "pixels": list(result.pixels),
        "random_weights": result.random_weights,
        "weights": result.provenance.get("weights", {}),
    }
    if result.provenance.get("load"):
        model["load"] = result.provenance["load"]
    if text := result.provenance.get("text"):
        model["text"] = section_data(TextSection.of(cast(Any, text)))
    full = latency_of(result, result.baseline)
    return Profile(
        model=plain(model),
        schedule=StageSchedule.from_dict(candidate.schedule),
        steps=[plain(step) for step in candidate.steps],
        sampling=plain(result.provenance.get("sampling", {})),
        envelope=_envelope(result, latency),
        verified=proved and not result.random_weights,
        verdict=f"{result.verdict}: {result.reason}" if candidate is result.pick else describe(candidate.steps),
        latency=read_section(LatencySection, {"includes": result.includes, "batch": 1, **_latency(latency)}, "latency"),
        quality=read_section(QualitySection, _quality(result, candidate), "quality"),
        baseline=read_section(BaselineSection, _baseline(full, latency), "baseline"),
        constraints=read_section(ConstraintsSection, _constraints(result, candidate), "constraints"),
        reproduce=result.command,
        engine=result.engine_choice,
        provenance=plain(
            {
                "created": result.created,
                "study": {
                    "trials": result.trials,
                    "sampled": result.sampled,
                    "seed": result.seed,
                    "key": candidate.key,
                },
                "skipped_scales": candidate.skipped_scales,
                "source": candidate.source,
                "versions": result.versions,
                "hashes": result.hashes,
                "device": result.device,
            }
        ),
    )


def _envelope(result: StudyResult, latency: LatencyStats) -> Envelope:
    states = latency.card or (result.baseline.latency.card if result.baseline.latency else ())
    device = result.device
    gpu = device.get("kind") == "cuda"
    return Envelope(
        device=str(device.get("name")) if gpu else str(device.get("kind", "cpu")),
        dtype=str(device.get("dtype", "float32")),
        batch=1,
        engine=cast(Any, result.engine),  # checked, like every field of an envelope
        threads=threads if isinstance(threads := device.get("threads"), int) and not gpu else None,
        torch=str(result.versions.get("torch", "unknown")),
        card=card_section(states[-1]) if states else None,
    )


def _latency(latency: LatencyStats) -> dict[str, object]:
    if latency.predicted:
        return {
            "ms": _round(latency.drift_corrected_ms),
            "predicted": True,
            "interval_ms": [_round(latency.low_ms), _round(latency.high_ms)],
            "ratio": _interval(latency.against_full),
        }
    data: dict[str, object] = {
        "ms": _round(latency.drift_corrected_ms),
        "median_ms": _round(latency.median_ms),
        "p90_ms": None if latency.p90_ms is None else _round(latency.p90_ms),
        "interval_ms": [_round(latency.low_ms), _round(latency.high_ms)],
        "runs": len(latency.samples_ms),
        "warmed": latency.settled,
    }
    if latency.ratio is not None:
        data["ratio"] = _interval(latency.ratio)
    if latency.disturbed:
        data["disturbed"] = list(latency.disturbed)
    if latency.scale_ms:
        data["scale_ms"] = [_round(v) for v in latency.scale_ms]
    return data


def _baseline(full: LatencyStats | None, own: LatencyStats) -> dict[str, object]:
    data: dict[str, object] = {} if full is None else {"schedule": "full", **_latency(full)}
    gain = own.speedup
    if gain is not None and math.isfinite(gain.high):
        data["speedup"] = {"mean": _round(gain.mean), "interval": [_round(gain.low), _round(gain.high)]}
    return data


def _quality(result: StudyResult, candidate: Candidate) -> dict[str, object]:
    if result.random_weights:
        return {"measured": False, "why": "random weights"}
    check = verification_of(candidate)
    held = check is not None and bool(check.values)
    values = candidate.values if isinstance(candidate, Measured) else {}
    values = check.values if check is not None and held else values
    if not values:
        unjudged = "no image was judged (--effort instant)"
        return {"measured": False, "why": unjudged if result.verdict == "unverified" else "no metric was run"}
    data: dict[str, object] = {
        "measured": True,
        "prompt_set": "held-out prompts" if held else "search prompts",
        "prompts": len(next(iter(values.values()))),
        **({} if result.heldout_engine is None else {"engine": result.heldout_engine if held else "eager"}),
        "composite": dict(result.quality_weights),
        "metrics": {m.metric: _metric(m, candidate) for m in result.limits},
        "difference_from_full": {name: _interval(i) for name, i in candidate.final_differences.items()},
        "mean": {name: _round(sum(v) / len(v)) for name, v in values.items() if v},
    }
    if check is not None and check.drop_upper is not None:
        data["drop_upper"] = _round(check.drop_upper)
    return plain(data)


def _metric(limit: MetricLimit, candidate: Candidate) -> dict[str, object]:
    """One metric's declaration, limit, and, if verified, the bound that decided."""
    data: dict[str, object] = {"unit": limit.unit, "kind": limit.kind, "weight": _round(limit.weight)}
    if limit.max_drop is not None:
        data["max_drop"] = _round(limit.max_drop)
    check = verification_of(candidate)
    bounds = [v for v in check.verdicts if v.name == limit.name] if check is not None else []
    return data | ({"drop_upper": _round(bounds[0].bound), "status": bounds[0].status} if bounds else {})


def _max_drop(result: StudyResult) -> dict[str, float]:
    return {m.metric: _round(m.max_drop) for m in result.limits if m.max_drop is not None}


def _constraints(result: StudyResult, candidate: Candidate) -> dict[str, object]:
    data: dict[str, object] = {"budget": result.budget, "budget_ms": _round(result.budget_ms)}
    if limits := _max_drop(result):
        data["max_drop"] = limits
    if result.floors:
        data["floors"] = dict(result.floors)
    check, full = verification_of(candidate), candidate.key == result.baseline.key
    # A finalist that was only timed proves nothing about quality.
    proved = check is not None and (full or result.random_weights or check.prompts > 0)
    return plain({**data, "proved": proved, "verdicts": [_verdict(v) for v in candidate.final_verdicts]})


def _verdict(verdict: Verdict) -> dict[str, object]:
    return {
        "name": verdict.name,
        "status": verdict.status,
        "limit": _round(verdict.limit),
        "value": _round(verdict.value),
        "bound": _round(verdict.bound),
        "unit": verdict.unit,
    }


def _interval(interval: Interval) -> dict[str, object]:
    return {
        "mean": _round(interval.mean),
        "interval": [_round(interval.low), _round(interval.high)],
        "level": interval.level,
        "n": interval.n,
    }


def _round(value: float) -> float:
    """Six significant digits: more than any measurement here has, few enough to read."""
    return float(f"{value:.6g}")


# ---------------------------------------------------------------- pareto.yaml


def write_pareto(result: StudyResult, path: Path) -> Path:
    """The front, fastest first, each member with everything a deployment needs, and the named picks by key."""
    members: dict[str, object] = {}
    for key in dict.fromkeys([*result.front, *result.picks.values()]):
        candidate = result.candidate(key)
        if latency_of(result, candidate) is not None:
            members[key] = _member(result, candidate)
    data = {
        "schema": PARETO_SCHEMA,
        "model": result.model,
        "verdict": result.verdict,
        "reason": result.reason,
        "budget": result.budget,
        "budget_ms": _round(result.budget_ms),
        "max_drop": _max_drop(result),
        "picks": {role: result.picks[role] for role in PICK_ORDER if role in result.picks},
        "front": [key for key in result.front if key in members],
        "members": members,
        "reproduce": result.command,
    }
    text = yaml.safe_dump(plain(data), sort_keys=False, allow_unicode=True, width=120)
    write_text_atomically(path, text)
    return path


def _member(result: StudyResult, candidate: Candidate) -> dict[str, object]:
    profile = profile_of(result, candidate).to_dict()
    return {
        "name": name_of(result, candidate),
        "does": describe(candidate.steps),
        "verified": profile["verified"],
        "latency": profile["latency"],
        "speedup": profile["baseline"].get("speedup", {"mean": 1.0}),
        "quality": profile["quality"],
        "constraints": profile["constraints"].get("verdicts", []),
        "skipped_scales": candidate.skipped_scales,
        "schedule": dict(candidate.schedule),
    }


# ---------------------------------------------------------------- trials.csv


def to_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV; columns in the order of their first use, gaps empty."""
    import pandas as pd

    columns = list(dict.fromkeys(column for row in rows for column in row))
    # As objects, so that a gap does not turn a column's whole numbers into floats.
    return pd.DataFrame(list(rows), columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")


def trials_frame(result: StudyResult) -> pd.DataFrame:
    """trials.csv as a table: one row per distinct schedule, numbers as numbers, empty cells as missing values."""
    import pandas as pd

    return pd.DataFrame(_trial_rows(result))


def write_trials(result: StudyResult, path: Path) -> Path:
    """Writes `trials_frame` as CSV."""
    write_text_atomically(path, to_csv(_trial_rows(result)))
    return path


def _trial_rows(result: StudyResult) -> list[dict[str, object]]:
    """One row per distinct schedule, the full one first, then failures that left no schedule; columns are grouped.

    Columns: identity, outcome, latency_*, quality and metrics with low and high, verified_*, param.*, schedule.*.
    Sequences are JSON in their cell; cells that do not apply are empty.
    """
    candidates = (result.baseline, *result.candidates)
    rows = [_row(result, c) for c in candidates]
    known = {c.trial for c in candidates}
    rows += [
        {"trial": f.trial, "state": "failed", "error": f.error, **_cells("param", f.params)}
        for f in result.failures
        if f.trial not in known
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    first = [c for c in columns if not c.startswith(("param.", "schedule."))]
    rest = sorted(c for c in columns if c.startswith("param.")) + [c for c in columns if c.startswith("schedule.")]
    ordered = dict.fromkeys([*first, *rest])
    return [{**ordered, **row} for row in rows]


def _row(result: StudyResult, candidate: Candidate) -> dict[str, object]:
    row: dict[str, object] = {
        "trial": candidate.trial,
        "key": candidate.key,
        "name": name_of(result, candidate),
        "source": candidate.source,
        "state": candidate.state,
        "feasible": isinstance(candidate, Measured) and candidate.feasible,
        "on_front": candidate.key in result.front,
        "picks": " ".join(role for role in PICK_ORDER if result.picks.get(role) == candidate.key),
        "accelerator": candidate.accelerator,
        "skipped_scales": candidate.skipped_scales,
        "processed_tokens": float(candidate.processed_tokens),
    }
    latency = candidate.latency if isinstance(candidate, Measured | Failed) else None
    if latency is not None:
        row |= {
            "latency_ms": _round(latency.drift_corrected_ms),
            "latency_source": "predicted" if latency.predicted else "measured",
            "latency_median_ms": _round(latency.median_ms),
            "latency_p90_ms": None if latency.p90_ms is None else _round(latency.p90_ms),
            "latency_runs": len(latency.samples_ms),
        }
        if latency.ratio:
            row |= _triple("latency_ratio", latency.ratio)
    if isinstance(candidate, Measured) and candidate.values:
        row["search_prompts"] = len(next(iter(candidate.values.values())))
    row["stopped_early"] = candidate.stopped_early if isinstance(candidate, Pruned) else None
    if isinstance(candidate, Measured):
        for name, interval in candidate.differences.items():
            row |= _triple(name if name == "quality" else f"metric.{name}", interval)
    check = verification_of(candidate)
    if check:
        row |= {"verified": check.status, "verified_prompts": check.prompts}
        row |= {"verified_latency_ms": _round(check.latency.drift_corrected_ms)}
        row |= {"verified_latency_upper_ms": _round(check.latency_upper_ms)}
        if "quality" in check.differences:
            row |= _triple("verified_quality", check.differences["quality"])
        if check.drop_upper is not None:
            row["verified_drop_upper"] = _round(check.drop_upper)
        for limit in limited(result.limits):
            for verdict in (v for v in check.verdicts if v.name == limit.name):
                row |= _triple(f"verified_metric.{limit.metric}", check.differences[limit.metric])
                row |= {f"verified_metric.{limit.metric}_drop_upper": _round(verdict.bound)}
                row |= {f"verified_metric.{limit.metric}_max_drop": limit.max_drop}
    row["error"] = candidate.error if isinstance(candidate, Failed | Unmeasured) else None
    return row | _cells("param", candidate.params) | _cells("schedule", candidate.schedule)


def _triple(name: str, interval: Interval) -> dict[str, float]:
    return {name: _round(interval.mean), f"{name}_low": _round(interval.low), f"{name}_high": _round(interval.high)}


def _cells(prefix: str, values: Mapping[str, object]) -> dict[str, object]:
    """One cell per value; lists and mappings as JSON, so that the table reads back."""
    return {
        f"{prefix}.{name}": json.dumps(plain(value)) if isinstance(value, list | tuple | dict) else value
        for name, value in values.items()
    }
