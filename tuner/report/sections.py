"""The sections of the report below its headline, each a function from a StudyResult to HTML (empty: left out)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tuner.config.quality import factors, limited
from tuner.report.charts import Point, Rule, StripCell, bars, paired_bars, scatter, strip
from tuner.report.words import (
    PICK_ORDER,
    budget_text,
    describe,
    find,
    has_quality,
    interval_text,
    kept_share,
    latency_of,
    latency_span_ms,
    limits_text,
    measured,
    ms,
    ms_span,
    name_of,
    quality_change,
    roles_of,
    shown_ms,
    side,
    signed,
    speedup,
)
from tuner.results import published
from tuner.results.candidate import Candidate, LatencyStats, Sample, Verdict
from tuner.results.importance import LEAST, Importance, importance
from tuner.results.result import StudyResult

DIFFERENCE_GAIN = 4
WIDE, NARROW = 960, 358
_SPEEDS = (
    1,
    2,
    1.5,
    1.2,
    3,
    1.3,
    1.1,
    1.7,
    2.5,
    4,
    1.4,
    1.6,
    1.8,
    5,
    6,
    8,
    10,
)  # labels of the upper axis, dearest first


def _both(draw: Callable[[float], str], caption: str = "") -> str:
    """A chart at desktop and at phone width; the stylesheet shows one."""
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>{note}</figure>'


def _legend(*entries: tuple[str, str]) -> str:
    return (
        '<p class="legend">'
        + "".join(f'<span><i class="key {css}"></i>{name}</span>' for css, name in entries)
        + "</p>"
    )


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table in a scrolling box; cells are HTML already, numeric columns are right-aligned."""
    align = [' class="n"' if i in numeric else "" for i in range(len(header))]
    head = "".join(f"<th{a}>{h}</th>" for a, h in zip(align, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{a}>{c}</td>" for a, c in zip(align, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown_schedules(result: StudyResult) -> list[tuple[str, Candidate]]:
    """Full schedule, picks and nearest, each once."""
    entries = [("Full schedule", result.baseline)]
    keys = [*(result.picks[r] for r in PICK_ORDER if r in result.picks), *result.nearest]
    for key in dict.fromkeys(keys):
        candidate = find(result, key)
        if candidate is None or key == result.baseline.key:
            continue
        roles = ", ".join(roles_of(result, key)) or _nearest_word(result)
        entries.append((f"{roles.capitalize()} ({name_of(result, candidate)})", candidate))
    return entries


def _nearest_word(result: StudyResult) -> str:
    return "undecided" if result.verdict == "inconclusive" else "nearest to feasible"


def schedules_section(result: StudyResult) -> str:
    if not result.baseline.steps:
        return ""
    out = []
    shown = _shown_schedules(result)
    # The full schedule has no stages of its own: it is colored by those of the schedule it is compared with.
    stages = [step.get("stage") for step in shown[-1 if len(shown) == 1 else 1][1].steps]
    for title, candidate in shown:
        steps = candidate.steps
        if candidate is result.baseline and len(stages) == len(steps):
            steps = tuple({**step, "stage": stage} for step, stage in zip(steps, stages, strict=True))
        cells = [_cell(step) for step in steps]
        weights = [math.sqrt(step["grid"][0] * step["grid"][1]) for step in candidate.steps]
        share = (
            candidate.processed_tokens / result.baseline.processed_tokens if result.baseline.processed_tokens else 1.0
        )
        out.append(
            f'<div class="plan"><h3>{escape(title)}<small>{escape(describe(candidate.steps))} · '
            f"{share:.0%} of the token rows</small></h3>"
            + _both(
                lambda width, cells=cells, weights=weights, title=title: strip(
                    width, cells, weights, f"Schedule: {title}"
                )
            )
            + "</div>"
        )
    legend = _legend(("semantic", "semantic stage"), ("structure", "structure stage"), ("fidelity", "fidelity stage"))
    note = (
        '<p class="note">One cell per scale, labelled with its side in tokens. The upper half is the '
        "conditional branch, the lower half the null-prompt branch; color is work done, pale is "
        "work saved, a slash is a scale that is not run.</p>"
    )
    return legend + "".join(out) + note


def _cell(step: Mapping[str, Any]) -> StripCell:
    branches = tuple(step.get("branches", ()))
    skipped = bool(step.get("skipped"))
    kept = kept_share(step)
    what = (
        "not run" if skipped else f"{kept:.0%} of {step['grid'][0] * step['grid'][1]} tokens, {' and '.join(branches)}"
    )
    stage = step.get("stage", "fidelity")
    stage = stage if stage in ("semantic", "structure", "fidelity") else "fidelity"
    return StripCell(
        side(step), stage, kept, branches, skipped, f"scale {step['scale']} ({side(step)}), {stage}: {what}"
    )


def _kind(result: StudyResult, candidate: Candidate) -> tuple[str, str]:
    """Marker class and shape."""
    if candidate.key == result.baseline.key:
        return "baseline", "square"
    kind = "feasible" if candidate.feasible else "infeasible"
    if candidate.key == result.picks.get("pick"):
        return "pick", "star"
    return kind, "diamond" if candidate.source.startswith("enqueued") else "circle"


def _title(result: StudyResult, candidate: Candidate) -> str:
    parts = [name_of(result, candidate), *roles_of(result, candidate.key)]
    if latency_of(result, candidate):
        parts.append(ms(shown_ms(result, candidate)))
    difference = quality_change(candidate)
    if difference:
        parts.append(f"quality {signed(difference.mean)} ({interval_text(difference)})")
    return " · ".join([*parts, describe(candidate.steps)])


def _label(result: StudyResult, candidate: Candidate) -> str:
    roles = roles_of(result, candidate.key)
    if candidate.key == result.baseline.key or candidate.source.startswith("enqueued"):
        return ", ".join([name_of(result, candidate), *roles])
    return ", ".join(roles)


def _points(result: StudyResult) -> list[Point]:
    points = []
    for candidate in (*measured(result), result.baseline):
        latency, difference = latency_of(result, candidate), quality_change(candidate)
        if latency is None or (difference is None and candidate is not result.baseline):
            continue
        kind, shape = _kind(result, candidate)
        points.append(
            Point(
                latency.drift_corrected_ms,
                difference.mean if difference else 0.0,
                kind,
                shape,
                _finite(latency_span_ms(latency)),
                _finite((difference.low, difference.high)) if difference else None,
                _label(result, candidate),
                _title(result, candidate),
            )
        )
    return points


def _finite(span: tuple[float, float]) -> tuple[float, float] | None:
    """A span that can be drawn: one sample has none."""
    return span if all(map(math.isfinite, span)) else None


def tradeoff_section(result: StudyResult) -> str:
    if latency_of(result, result.baseline) is None or not measured(result):
        return ""
    if not has_quality(result):
        return _latency_bars(result)
    points = _points(result)
    full_ms = shown_ms(result, result.baseline)
    reference = published.methods_for(result.model)
    speeds = [full_ms / row.speedup for row in reference[1:] if row.speedup]
    xs = [v for p in points for v in (p.x_span or (p.x, p.x))] + [result.budget_ms, *speeds]
    x_pad = 0.06 * (max(xs) - min(xs) or full_ms)
    x_range = (max(0.0, min(xs) - x_pad), max(xs) + x_pad)
    # The picture is about the trade-off near the limit: one terrible schedule must not flatten everything else.
    core = [v for p in points if p.kind != "infeasible" or p.label for v in (p.y_span or (p.y, p.y))]
    core += [1.6 * result.composite_floor, -0.25 * result.composite_floor]
    spread = max(core) - min(core)
    rest = [v for p in points for v in (p.y_span or (p.y, p.y)) if v > min(core) - spread]
    y_pad = 0.05 * spread
    y_range = (min(core + rest) - y_pad, max(core + rest) + y_pad)
    on_front = [c for key in result.front if (c := find(result, key)) is not None and latency_of(result, c) is not None]
    # Finalists are drawn at their held-out figures, where a point of the search's front may turn out dominated.
    path: list[tuple[float, float]] = []
    for candidate in sorted(on_front, key=lambda c: shown_ms(result, c)):
        difference = quality_change(candidate)
        height = difference.mean if difference else 0.0
        if not path or height > path[-1][1]:
            path.append((shown_ms(result, candidate), height))
    failed = [f"trial {f.trial}: {f.error}" for f in result.failures]
    several = len(limited(result.limits)) > 1
    comparable = set(result.quality_weights) == {"geneval"}
    unit = factors(result.limits)["geneval"] if comparable else 0.0
    lane = y_range[1] + 0.08 * (y_range[1] - y_range[0])
    if reference and not comparable:
        y_range = (y_range[0], lane + 0.05 * (y_range[1] - y_range[0]))
    for row in reference[1:]:
        if row.speedup is None or row.geneval is None or reference[0].geneval is None:
            continue
        height = (row.geneval - reference[0].geneval) * unit if comparable else lane
        title = (
            f"{row.name} as published: {row.speedup:g}×, GenEval {row.geneval:.2f} against {reference[0].geneval:.2f}"
        )
        points.append(
            Point(full_ms / row.speedup, height, "published", "diamond", label=f"{row.name}, paper", title=title)
        )
    chart = _both(
        lambda width: scatter(
            width,
            points,
            label="Quality change against latency of every schedule tried",
            x_title="latency of one image, ms",
            y_title="quality change against the full schedule, in allowed drops",
            x_range=x_range,
            y_range=y_range,
            x_rule=Rule(result.budget_ms, "budget", "right"),
            y_rule=Rule(result.composite_floor, "allowed drops" if several else "allowed drop", "below"),
            path=path,
            top=("speed-up", [(full_ms / times, f"{times:g}×") for times in _SPEEDS]),
            gutter=(f"{len(failed)} failed", failed) if failed else None,
        ),
        f"Each mark is one distinct schedule: mean paired difference on {_prompt_words(result)}, with 95 % intervals. "
        "The line joins schedules that nothing beats on both axes. Shaded: outside the limits. Hover to read a mark.",
    )
    words = {
        "pick": "pick",
        "baseline": "full schedule",
        "feasible": "within both limits",
        "infeasible": "outside a limit",
        "published": "published: GenEval and speed-up"
        if comparable
        else "published speed-up, placed at the top: its quality is on another scale",
        "failed": "failed",
    }
    kinds = {p.kind for p in points} | ({"failed"} if failed else set())
    entries = [(kind, word) for kind, word in words.items() if kind in kinds]
    if any(p.shape == "diamond" and p.kind != "published" for p in points):
        entries.append(("preset", "diamond: an enqueued preset"))
    return _legend(*entries) + chart


def _prompt_words(result: StudyResult) -> str:
    search = len(result.search_prompts)
    verified = [c for c in result.candidates if c.verification and c.verification.values]
    held = verified[0].verification.prompts if verified and verified[0].verification else 0
    return f"{search} search prompts" + (f" (finalists: {held} held-out prompts)" if held else "")


def _latency_bars(result: StudyResult) -> str:
    shown = sorted(measured(result), key=lambda c: shown_ms(result, c))
    kept = [c for i, c in enumerate(shown) if i < 12 or _label(result, c)]
    rows = []
    for candidate in (*kept, result.baseline):
        latency = latency_of(result, candidate)
        if latency is None:
            continue
        low, high = latency_span_ms(latency)
        speed = speedup(latency)
        after = f"{ms(latency.drift_corrected_ms)} ({ms_span(low, high)})" + (f"  {speed[0]:.2f}×" if speed else "")
        name = ", ".join([name_of(result, candidate), *roles_of(result, candidate.key)])
        rows.append((name, latency.drift_corrected_ms, f"bar {_kind(result, candidate)[0]}", after))
    left_out = len(shown) - len(kept)
    note = f" {left_out} slower ones are in trials.csv." if left_out else ""
    words = {"pick": "pick", "baseline": "full schedule", "feasible": "within the budget", "infeasible": "over it"}
    kinds = {row[2].split()[1] for row in rows}
    return _legend(*((kind, word) for kind, word in words.items() if kind in kinds)) + _both(
        lambda width: bars(width, rows, label="Latency of the fastest schedules"),
        "No quality was measured, so there is no trade-off to draw: latency of one image with 95 % intervals, "
        f"fastest first.{note}",
    )


def scales_section(result: StudyResult) -> str:
    full = result.baseline
    other = result.pick if result.pick is not None and result.pick.key != full.key else None
    if other is None:
        nearest = [c for key in result.nearest if (c := find(result, key)) is not None and c.key != full.key]
        other = nearest[0] if nearest else None
    shown = [("full schedule", "bar baseline", full)]
    if other is not None:
        role = "pick" if result.pick is not None and other.key == result.pick.key else _nearest_word(result)
        shown.append((role, "bar pick", other))
    latencies = [_timed_by_scale(c) for _, _, c in shown]
    timed = all(lat is not None and len(lat.scale_ms) == len(full.steps) for lat in latencies) and bool(full.steps)
    if not full.steps:
        return ""
    names = [side(step) for step in full.steps]
    if timed:
        series = [(name, css, lat.scale_ms) for (name, css, _), lat in zip(shown, latencies, strict=True) if lat]
        unit, note = "ms", "Median time of each scale, by its side in tokens; text encoding and decoding come on top."
    else:
        series = [(name, css, [_token_rows(step) for step in c.steps]) for name, css, c in shown]
        unit = "token rows"
        note = (
            "Scales were not timed one by one: these are the token rows that run through the model, over both branches."
        )
    saved = [""] * len(names)
    if len(series) == 2:
        for i, (before, after) in enumerate(zip(series[0][2], series[1][2], strict=True)):
            skipped = shown[1][2].steps[i].get("skipped")
            saved[i] = (
                "not run" if skipped else (f"−{1 - after / before:.0%}" if before and after < 0.98 * before else "")
            )
    legend = _legend(*(("full" if c is full else "pick", name) for name, _, c in shown))
    chart = _both(
        lambda width: paired_bars(width, names, series, label=f"{unit} per scale", unit=unit, notes=saved), note
    )
    return legend + chart


def _timed_by_scale(candidate: Candidate) -> LatencyStats | None:
    """The measurement that has times per scale, the latest one first; without any, the latest."""
    both = [candidate.verification.latency if candidate.verification else None, candidate.latency]
    return next((lat for lat in both if lat is not None and lat.scale_ms), candidate.final_latency)


def _token_rows(step: Mapping[str, Any]) -> float:
    return (
        0.0
        if step.get("skipped")
        else kept_share(step) * step["grid"][0] * step["grid"][1] * len(step.get("branches", ()))
    )


def table_section(result: StudyResult) -> str:
    keys = [
        result.baseline.key,
        *(result.picks[r] for r in PICK_ORDER if r in result.picks),
        *result.front,
        *result.nearest,
    ]
    keys += [c.key for c in result.candidates if c.source.startswith("enqueued") and c.state == "complete"]
    chosen = [
        c for key in dict.fromkeys(keys) if (c := find(result, key)) is not None and latency_of(result, c) is not None
    ]
    if not chosen:
        return ""
    chosen.sort(key=lambda c: shown_ms(result, c))
    metrics = [] if result.random_weights else [m for m in result.quality_weights if m != "quality"]
    with_quality = has_quality(result)
    header = ["Schedule", "Latency", "Speed-up"]
    header += ["Composite", *(escape(m) for m in metrics)] if with_quality else []
    header += ["Limits", "Status"]
    rows = []
    for candidate in chosen:
        latency = latency_of(result, candidate)
        assert latency is not None
        low, high = latency_span_ms(latency)
        speed = speedup(latency)
        roles = "".join(f'<span class="tag">{role}</span>' for role in roles_of(result, candidate.key))
        row = [
            f"<b>{escape(name_of(result, candidate))}</b>{roles}<small>{escape(describe(candidate.steps))}</small>",
            f"{'≈ ' if latency.predicted else ''}{ms(latency.drift_corrected_ms)}<small>{ms_span(low, high)}</small>",
            f"{speed[0]:.2f}×<small>{speed[1]:.2f} to {speed[2]:.2f}</small>" if speed else "1×",
        ]
        if with_quality:
            for metric in ("quality", *metrics):
                d = candidate.final_differences.get(metric)
                row.append(
                    f"{signed(d.mean)}<small>{interval_text(d)}</small>"
                    if d
                    else "0"
                    if candidate is result.baseline
                    else ""
                )
        check = candidate.verification
        verdicts = check.verdicts if check else candidate.verdicts
        row.append(" ".join(f'<span class="dot {_dot(v)}">{escape(v.name)}</span>' for v in verdicts))
        row.append(escape(check.status) if check else _search_status(candidate))
        rows.append(row)
    others = len(measured(result)) + 1 - len(chosen)
    note = (
        f"{others} more schedules are in trials.csv." if others > 0 else "These are all schedules that were measured."
    )
    numeric = range(1, len(header) - 2)
    intro = (
        '<p class="note">Differences are against the full schedule on the same prompts and seeds; above zero is '
        f"better, whatever the metric's own direction. Intervals: 95 %. ≈: predicted from its steps, not timed. {note}</p>"
    )
    return _rows(header, rows, list(numeric)) + intro


def _search_status(candidate: Candidate) -> str:
    """What the search knows of a schedule that was not verified."""
    if candidate.stopped_early is None:
        return "search only"
    prompts = len(next(iter(candidate.values.values()), ()))
    return f'stopped<small title="{escape(candidate.stopped_early)}">after {prompts} prompts</small>'


def _dot(verdict: Verdict) -> str:
    return {"met": "good", "broken": "poor"}.get(verdict.status, "fair")


def history_section(result: StudyResult) -> str:
    done = [c for c in measured(result) if c.trial is not None]
    if not done or latency_of(result, result.baseline) is None:
        return ""
    done.sort(key=lambda c: c.trial if c.trial is not None else 0)
    told = f"{result.trials} trials, {result.sampled} distinct schedules beyond the enqueued ones"
    stop = f"{told}. Ended: {escape(result.stop_reason)}.{_savings(result)}"
    if len(done) < 2:
        return f'<p class="note">{stop} One measured trial makes no history to draw.</p>'
    points, staircase, best = [], [], math.inf
    for candidate in done:
        latency = candidate.latency or latency_of(result, candidate)
        assert latency is not None and candidate.trial is not None
        kind, shape = _kind(result, candidate)
        value = latency.drift_corrected_ms
        points.append(Point(candidate.trial, value, kind, shape, title=_title(result, candidate)))
        if candidate.feasible and value < best:
            best = value
            staircase.append((float(candidate.trial), value))
    last = max(p.x for p in points)
    if staircase:
        staircase.append((last, best))
    full_ms = shown_ms(result, result.baseline)
    values = [p.y for p in points] + [result.budget_ms, full_ms]
    pad = 0.06 * (max(values) - min(values) or 1)
    failed = [f"trial {f.trial}: {f.error}" for f in result.failures]
    chart = _both(
        lambda width: scatter(
            width,
            points,
            label="Latency of each trial in the order they were tried",
            x_title="trial",
            y_title="latency, ms",
            x_range=(-0.5, last + 0.5),
            y_range=(max(0.0, min(values) - pad), max(values) + pad),
            y_rule=Rule(result.budget_ms, "budget", "above"),
            step_path=staircase,
            gutter=(f"{len(failed)} failed", failed) if failed else None,
            height=300,
        ),
        f"{stop} The line is the fastest schedule within both limits so far."
        if staircase
        else f"{stop} No trial kept both limits.",
    )
    return chart


def _savings(result: StudyResult) -> str:
    """What the search did not do, in sentences."""
    facts, found = result.search, []
    if facts.get("stopped_early"):
        found.append(f"{facts['stopped_early']} were stopped after a part of the search prompts, being clearly worse.")
    if facts.get("dropped"):
        found.append(f"{facts['dropped']} further proposals were predicted to be over the budget and not tried.")
    if facts.get("predicted"):
        line = f"Latency of {facts['predicted']} was predicted from the costs of their steps"
        if facts.get("table_error") is not None:  # a study that went on only to verify timed no steps again
            line += (
                f", with an error of {100 * facts['table_error']:.1f} % over {facts['table_checks']} that were timed"
            )
        found.append(f"{line}.")
    if facts.get("ask_seconds"):
        found.append(f"An ask took {np.median(facts['ask_seconds']):.2f} s in the median.")
    return " " + " ".join(found) if found else ""


def importances_section(result: StudyResult) -> str:
    done = [c for c in measured(result) if c.params]
    if not done:
        return ""
    if len(done) < LEAST:
        return (
            f'<p class="note">Only {len(done)} measured trial{"s" if len(done) != 1 else ""} carry search parameters; '
            f"importance is not estimated below {LEAST}.</p>"
        )
    names = sorted({name for c in done for name in c.params})
    outcomes: list[tuple[str, Callable[[Candidate], float | None]]] = [
        (
            "latency",
            lambda c: c.latency.drift_corrected_ms if c.latency else None,
        )
    ]
    if has_quality(result):
        outcomes.append(("quality", lambda c: c.differences["quality"].mean if "quality" in c.differences else None))
    charts = []
    for outcome, read in outcomes:
        found: list[Importance] = []
        for name in names:
            pairs = [(c.params[name], value) for c in done if name in c.params and (value := read(c)) is not None]
            if len(pairs) >= LEAST:
                found.append(importance(name, [p for p, _ in pairs], [v for _, v in pairs]))
        found.sort(key=lambda i: -i.share)
        rows = [
            (
                i.parameter,
                i.share,
                "bar feasible" if i.p < 0.05 else "bar faint",
                f"{i.share:.0%}  p {i.p:.3f}, n {i.n}",
            )
            for i in found
        ]
        if rows:
            drawn = _both(
                lambda width, rows=rows, outcome=outcome: bars(width, rows, label=f"Importance for {outcome}", span=1.0)
            )
            charts.append(f"<h3>For {outcome}</h3>{drawn}")
    if not charts:
        return ""
    return (
        "".join(charts)
        + '<p class="note">Share of the rank variance of the outcome that one parameter explains by itself, above what '
        "random grouping gives; pale bars are within chance (p ≥ 0.05). Interactions are not seen, and a search that "
        "settles on one value early leaves little to see.</p>"
    )


def published_section(result: StudyResult) -> str:
    rows = published.methods_for(result.model)
    if not rows:
        return ""

    def cells(row: published.Published, own: bool) -> list[str]:
        show = lambda v, f: "" if v is None else format(v, f)  # noqa: E731
        name = f"<b>{escape(row.name)}</b>" if own else escape(row.name)
        speed = show(row.speedup, ".2f") + ("×" if row.speedup else "")
        return [name, row.parameters, show(row.latency_s, ".2f"), speed, show(row.geneval, ".2f"), show(row.dpg, ".2f")]

    table = [cells(row, True) for row in rows]
    pick = result.pick
    latency = latency_of(result, pick) if pick is not None else None
    speed = speedup(latency) if latency else None
    if speed and latency:
        name = '<b>this run\'s pick</b><span class="tag">measured here</span>'
        seconds = f"{latency.drift_corrected_ms / 1e3:.2f}"
        table.append([name, "", seconds, f"{speed[0]:.2f}×", "", ""])
    table += [cells(row, False) for row in published.GENERATORS]
    return _rows(["Method", "Parameters", "Latency, s", "Speed-up", "GenEval", "DPG"], table, [1, 2, 3, 4, 5]) + (
        f'<p class="note">Rows of {escape(published.SOURCE)}, except the one measured here. The paper does not name '
        "its GPU, so only speed-ups compare across rows; its other generators are listed for orientation. Whether "
        "its 3.4× skipped the last two scales, as the released code does, is not stated.</p>"
    )


def failures_section(result: StudyResult) -> str:
    if not result.failures:
        return ""
    rows = [
        [str(f.trial), f"<code>{escape(', '.join(f'{k}={v}' for k, v in f.params.items()))}</code>", escape(f.error)]
        for f in result.failures[:40]
    ]
    more = (
        f'<p class="note">{len(result.failures) - 40} more are in trials.csv.</p>' if len(result.failures) > 40 else ""
    )
    return _rows(["Trial", "Parameters", "Error"], rows, [0]) + more


def run_section(result: StudyResult) -> str:
    total = sum(result.phases_s.values())
    phases = ""
    if total > 0:
        rows = [(name, s, "bar feasible", f"{s:,.1f} s  {s / total:.0%}") for name, s in result.phases_s.items()]
        phases = f"<h3>Where {total:,.0f} s went</h3>" + _both(
            lambda width: bars(width, rows, label="Seconds per phase")
        )
    facts: list[tuple[str, Any]] = [
        ("command", result.command),
        ("made", result.created),
        ("verdict", f"{result.verdict} (exit code {result.exit_code}): {result.reason}"),
        ("limits", f"budget {result.budget} = {budget_text(result)}, {limits_text(result)}"
                   + "".join(f", {m} at least {v:g}" for m, v in result.floors.items())),
        ("quality", " + ".join(f"{w:g} × {m}" for m, w in result.quality_weights.items()) or "not measured"),
        *_engine_facts(result),
        ("seed", result.seed),
        ("prompts", f"{len(result.search_prompts)} in the search, {len(result.heldout_prompts)} held out, "
                    f"{result.micro_batch} images per batch"),
        ("scales", ", ".join(str(h) if h == w else f"{h}×{w}" for h, w in result.grids)
                   + f" tokens a side; {result.chunks} chunks; {result.pixels[0]}×{result.pixels[1]} pixels"),
        *((f"device {k}", v) for k, v in result.device.items()),
        *((f"version {k}", v) for k, v in result.versions.items()),
        *((f"model {k}", v) for k, v in result.provenance.items()),
        *((f"hash {k}", v) for k, v in result.hashes.items()),
    ]  # fmt: skip
    rows_html = "".join(f"<tr><th>{escape(k)}</th><td><code>{escape(_fact(v))}</code></td></tr>" for k, v in facts)
    return (
        phases + f'<h3>Provenance</h3><div class="scroll"><table class="facts"><tbody>{rows_html}</tbody></table></div>'
    )


def _engine_facts(result: StudyResult) -> list[tuple[str, str]]:
    """Which engine, why, and what was found of the others."""
    choice = result.engine_choice
    drawn = [] if result.heldout_engine is None else [("held-out images drawn by", f"engine {result.heldout_engine}")]
    if choice is None:
        return [("engine", result.engine), *drawn]
    facts = [("engine", f"{choice.name}: {choice.reason}"), *drawn]
    if choice.tried:
        found = (
            f"{one.engine} {one.refused}" if one.latency_ms is None else f"{one.engine} {one.latency_ms:.1f} ms"
            for one in choice.tried
        )
        facts.append(("engines tried", "; ".join(found)))
    return facts


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_fact(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    return str(value)


def images_section(result: StudyResult, run_dir: Path, pixels: int, rows: int) -> str:
    """Full schedule, one tuned schedule and their difference, per prompt."""
    if result.random_weights or not rows:
        return ""
    by_key: dict[str, dict[tuple[str, int], Sample]] = {}
    for sample in result.samples:
        by_key.setdefault(sample.key, {})[(sample.prompt, sample.seed)] = sample
    full = by_key.get(result.baseline.key, {})
    wanted = [*(result.picks[r] for r in PICK_ORDER if r in result.picks), *result.nearest, *by_key]
    other = next((k for k in wanted if k != result.baseline.key and by_key.get(k)), None)
    if not full:
        return ""
    out, missing = [], 0
    for identity, sample in full.items():
        if len(out) == rows:
            break
        before = _open(run_dir, sample.path)
        tuned = by_key[other].get(identity) if other else None
        after = _open(run_dir, tuned.path) if tuned else None
        if before is None or (other is not None and after is None):
            missing += 1
            continue
        cells = [("full schedule", before)]
        psnr = ""
        if after is not None and after.shape == before.shape:
            change = after.astype(np.int16) - before
            cells += [
                ("tuned", after),
                ("difference", np.clip(128 + DIFFERENCE_GAIN * change, 0, 255).astype(np.uint8)),
            ]
            error = float((change.astype(np.float64) ** 2).mean())
            psnr = "identical" if error == 0 else f"PSNR {10 * math.log10(255**2 / error):.1f} dB"
        figures = "".join(
            f'<img src="{_embed(image, pixels)}" alt="{escape(what)}: {escape(sample.prompt)}" loading="lazy"'
            f"{' class=pixels' if max(image.shape[:2]) < 128 else ''}>"
            for what, image in cells
        )
        small = " · ".join(filter(None, [f"seed {sample.seed}", psnr]))
        out.append(
            f'<figure class="trio n{len(cells)}"><figcaption>{escape(sample.prompt)}<small>{small}</small></figcaption>'
            f"{figures}</figure>"
        )
    if not out:
        return f'<p class="note">{missing} images named in study.json could not be read.</p>' if missing else ""
    who = ""
    if other is not None:
        candidate = find(result, other)
        roles = ", ".join(roles_of(result, other)) or (_nearest_word(result) if other in result.nearest else "")
        name = name_of(result, candidate) if candidate else other
        who = (
            f"Left the full schedule, middle {escape(name)}{f' ({escape(roles)})' if roles else ''}, right their "
            f"difference, {DIFFERENCE_GAIN} times amplified around grey. Same prompt, same seed."
        )
    else:
        who = "Images of the full schedule; there is no other schedule to compare with."
    lost = f" {missing} more could not be read." if missing else ""
    return f'<p class="note">{who}{lost}</p><div class="gallery">{"".join(out)}</div>'


def _open(run_dir: Path, name: str) -> np.ndarray | None:
    """uint8 (H, W, 3) of a file inside the run directory; None when it is elsewhere, missing or no image."""
    path = (run_dir / name).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        return None
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _embed(pixels_HW3: np.ndarray, side: int) -> str:
    """A data URI: small images exactly (PNG), large ones reduced to `side` (JPEG)."""
    image = Image.fromarray(pixels_HW3)
    exact = max(image.size) <= min(side, 128)
    if not exact:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if exact else "JPEG", **({"optimize": True} if exact else {"quality": 86}))
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
