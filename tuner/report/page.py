"""report.html: did tuning help, which schedule, how much to trust it. One file, rebuilt from a run directory alone.

Everything comes from study.json and the images beside it. Drawings are inline SVG, images are embedded, styles are
inline; there is no script and nothing is fetched, so the file can be mailed and opened anywhere. Everything that a user
typed (prompts, commands, error texts) is escaped.
"""

from __future__ import annotations

import math
from html import escape
from importlib.resources import files
from pathlib import Path

from stagevar.errors import UsageError
from stagevar.files import write_text_atomically
from tuner.config.quality import COMPOSITE, limited
from tuner.report.sections.history import history_section
from tuner.report.sections.images import images_section
from tuner.report.sections.importances import importances_section
from tuner.report.sections.metric_notes import metric_notes_section
from tuner.report.sections.published import published_section
from tuner.report.sections.run import failures_section, run_section
from tuner.report.sections.scales import scales_section
from tuner.report.sections.schedules import schedules_section
from tuner.report.sections.space import space_section
from tuner.report.sections.table import table_section
from tuner.report.sections.tradeoff import tradeoff_section
from tuner.report.words import (
    budget_text,
    find,
    has_quality,
    interval_text,
    latency_of,
    latency_span_ms,
    limits_text,
    ms,
    quality_change,
    signed,
    speedup,
)
from tuner.results.candidate import Candidate, Finalist, LatencyStats, Verdict, verification_of
from tuner.results.result import StudyResult

REPORT_FILE = "report.html"
MAX_BYTES = 5_000_000
_IMAGE_ROWS = 8
_BADGES = {
    "verified": ("Verified", "good"),
    "baseline_meets_budget": ("Nothing to gain", "good"),
    "latency_only": ("Latency only", "neutral"),
    "unverified": ("Unverified", "neutral"),
    "dry_run": ("Dry run", "neutral"),
    "infeasible": ("Infeasible", "poor"),
    "failed": ("Failed", "poor"),
    "inconclusive": ("Inconclusive", "fair"),
    "partial": ("Stopped early", "fair"),
}


def write_report(result: StudyResult, run_dir: Path | str) -> Path:
    """Writes report.html into the run directory and returns its path.

    Raises UsageError if the folder cannot be written. Missing or unreadable images are left out and counted.
    """
    path = Path(run_dir) / REPORT_FILE
    try:
        write_text_atomically(path, render(result, Path(run_dir)))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another --out") from None
    return path


def render(result: StudyResult, run_dir: Path) -> str:
    """The whole page. Shrinks the images until it fits MAX_BYTES."""
    style = (files("tuner.report") / "report.css").read_text(encoding="utf-8")
    for side, rows in ((384, _IMAGE_ROWS), (256, _IMAGE_ROWS), (192, 4), (0, 0)):
        sections = [
            ("Schedule", schedules_section(result)),
            ("Trade-off", tradeoff_section(result)),
            ("Images", images_section(result, run_dir, side, rows)),
            ("Time per scale", scales_section(result)),
            ("Candidates", table_section(result)),
            ("Search", history_section(result)),
            ("Parameters", importances_section(result)),
            ("Space", space_section(result)),
            ("Published figures", published_section(result)),
            ("Reading the metrics", metric_notes_section(result)),
            ("Failures", failures_section(result)),
            ("Run", run_section(result)),
        ]
        shown = [(name, body) for name, body in sections if body]
        menu = "".join(f'<a href="#{_slug(name)}">{name}</a>' for name, _ in shown)
        body = "".join(f'<section id="{_slug(name)}"><h2>{name}</h2>{html}</section>' for name, html in shown)
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{escape(result.model)} under {escape(result.budget)}: stagevar-tune</title>"
            f"<style>{style}</style></head>"
            f"<body><main>{_head(result)}<nav>{menu}</nav>{body}</main></body></html>\n"
        )
        if len(page.encode()) <= MAX_BYTES:
            return page
    return page


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _answer(result: StudyResult) -> str:
    """Did tuning help, which schedule, how sure: one sentence, plain text."""
    full = latency_of(result, result.baseline)
    pick: Candidate | None = result.pick
    if pick is None and result.verdict in ("inconclusive", "partial") and result.nearest:
        pick = find(result, result.nearest[0])
    full_ms = full.median_ms if full else None
    model, budget = result.model, budget_text(result)
    if result.verdict == "dry_run":
        return f"Nothing was run: this is the plan for a study of {model} under {result.budget}."
    if result.verdict == "failed":
        return f"No answer: none of the {result.trials} trials of {model} could be evaluated; see the failures below."
    if result.verdict == "baseline_meets_budget":
        shown = f" at {ms(full_ms)}" if full_ms is not None else ""
        return f"No tuning needed: the full schedule of {model} meets the budget of {budget}{shown}, so it is the pick."
    if result.verdict == "infeasible" or pick is None or (latency := latency_of(result, pick)) is None:
        quality = f" within {limits_text(result)}" if has_quality(result) else ""
        if result.smallest_budget_ms is not None:
            count = len(result.measured)
            tried = f"none of {count} measured schedules of {model} meets"
            if count == 1:
                tried = f"the only measured schedule of {model} does not meet"
            share = f" ({result.smallest_budget_ms / full_ms:.0%} of the full schedule)" if full_ms else ""
            return (
                f"No: {tried} {budget}{quality}; "
                f"the smallest reachable budget is {ms(result.smallest_budget_ms)}{share}."
            )
        return f"No schedule found for {model} that meets {budget}{quality}: {result.reason}."
    speed = speedup(latency)
    faster = (
        f"{speed[0]:.2f}× faster (95 % interval {speed[1]:.2f} to {speed[2]:.2f})"
        if speed
        else f"{ms(latency.drift_corrected_ms)} per image"
    )
    times = f", {ms(latency.drift_corrected_ms)} instead of {ms(full_ms)} per image" if full_ms and speed else ""
    difference = quality_change(pick)
    if result.random_weights or difference is None:
        return f"{model} runs {faster}{times}; the weights are random, so this says nothing about quality."
    held = isinstance(pick, Finalist) and bool(pick.verification.values)
    where = f"{difference.n} {'held-out' if held else 'search'} prompts"
    changes = ", ".join(
        f"{m.metric} changed by {signed(d.mean)} ({interval_text(d)})"
        for m in limited(result.limits)
        if (d := pick.final_differences.get(m.metric)) is not None
    )
    sentence = f"{model} runs {faster}{times}, with {changes} on {where}"
    if result.verdict == "verified":
        return f"Tuning helped: {sentence}; all limits are proved."
    if result.verdict == "partial":
        return f"Stopped before verification: so far {sentence}; nothing is proved yet."
    if all(_on_the_right_side(v) for v in pick.final_verdicts):
        return f"Promising, not proved: {sentence}; an interval still straddles a limit."
    return f"Not proved: {sentence}; the estimate misses a limit that its interval still reaches."


def _on_the_right_side(verdict: Verdict) -> bool:
    """Whether the point estimate keeps the limit."""
    return verdict.value >= verdict.limit if verdict.name.startswith("floor:") else verdict.value <= verdict.limit


def _head(result: StudyResult) -> str:
    label, css = _BADGES.get(result.verdict, (result.verdict, "neutral"))
    device = escape(str(result.device.get("name", "unknown device")))
    date = escape(result.created.replace("T", " ").rstrip("Z")[:16]) + " UTC"
    warning = ""
    if result.random_weights:
        warning = (
            '<p class="banner">Random weights: the real architecture with seeded noise for parameters. '
            "Latencies are real, images are not, and no quality figure is given anywhere.</p>"
        )
    where = f"{escape(result.model)} · {device} · {escape(result.engine)} · {date}"
    return (
        f'<header><p class="over"><b>stagevar-tune</b> {where}</p>'
        f'<h1><span class="badge {css}">{escape(label)}</span> {escape(_answer(result))}</h1>{warning}'
        f"{_tiles(result)}{_trust(result)}</header>"
    )


def _tiles(result: StudyResult) -> str:
    pick = result.pick
    shown = pick or (find(result, result.nearest[0]) if result.nearest else None)
    tiles: list[tuple[str, str, str]] = []
    full = latency_of(result, result.baseline)
    if shown is not None and (latency := latency_of(result, shown)) is not None:
        prefix = "" if pick else "Undecided: " if result.verdict == "inconclusive" else "Nearest: "
        speed = speedup(latency)
        if speed:
            tiles.append((f"{prefix}speed-up", f"{speed[0]:.2f}×", f"{speed[1]:.2f} to {speed[2]:.2f}"))
        low, high = latency_span_ms(latency)
        tiles.append((f"{prefix}latency", ms(latency.drift_corrected_ms), f"{ms(low)} to {ms(high)}"))
    elif full is not None:
        tiles.append(("Full schedule", ms(full.median_ms), f"p90 {ms(full.p90_ms or full.median_ms)}"))
    typed = f"{result.budget} as asked" if result.budget.strip() != f"{result.budget_ms:g}ms" else "as asked"
    if math.isfinite(result.budget_ms):
        tiles.append(("Budget", ms(result.budget_ms), escape(typed)))
    difference = quality_change(shown) if shown is not None and not result.random_weights else None
    if difference is not None and shown is not None:
        for limit in limited(result.limits):
            if (change := shown.final_differences.get(limit.metric)) is None:
                continue
            note = f"{interval_text(change)} {limit.unit}; limit −{limit.max_drop:g}"
            tiles.append((f"Change of {escape(limit.metric)}", signed(change.mean), escape(note)))
    elif not result.random_weights and shown is result.baseline:
        tiles.append(("Quality change", "none", "the full schedule is the pick"))
    body = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><dd>{note}</dd></div>" for name, value, note in tiles)
    return f'<dl class="tiles">{body}</dl>'


def _trust(result: StudyResult) -> str:
    """What supports the answer and what weakens it, one line each."""
    lines: list[tuple[str, str]] = []
    pick = result.pick or (find(result, result.nearest[0]) if result.nearest else None)
    if result.pick is None and result.reason and result.verdict != "infeasible":
        lines.append(("no", escape(result.reason[0].upper() + result.reason[1:]) + "."))
    if pick is not None and (latency := latency_of(result, pick)) is not None:
        check = verification_of(pick)
        for verdict in pick.final_verdicts:
            lines.append(_verdict_line(verdict, proved=check is not None))
        if result.limits and result.limits[0].metric == COMPOSITE:
            lines.append(
                (
                    "no",
                    "This study is from an earlier version, whose bound on the quality drop took the observed range for "
                    "the possible one: on few prompts it proves less than it says. Run the command again, or verify.",
                )
            )
        if check and check.values and pick.key != result.baseline.key:
            held = f"Quality was judged on {check.prompts} held-out prompts that the search never saw, image by image"
            lines.append(("yes", f"{held} against the full schedule with the same seed."))
        elif not check and has_quality(result):
            lines.append(
                (
                    "no",
                    "Quality was judged only on the search prompts, which make the winner look better than it is.",
                )
            )
        lines.append(_timing_line(latency))
        lines += _drift(result)
        if pick.skipped_scales:
            count = f"{pick.skipped_scales} scale{'s' if pick.skipped_scales > 1 else ''}"
            look = "" if result.random_weights else " Look at the images."
            lost = "fine detail is lost, which prompt-following scores hardly notice"
            lines.append(("no", f"This schedule does not run {count}: {lost}.{look}"))
    device = [str(result.device.get(key, "?")) for key in ("name", "dtype")]
    where = escape(", ".join([*device, f"{result.engine} engine"]))
    threads = result.device.get("threads")
    where += (
        f", {threads} thread{'s' if threads != 1 else ''}" if threads and result.device.get("kind") == "cpu" else ""
    )
    lines.append(("info", f"Valid for {where}, one image at a time; a figure covers {escape(result.includes)}."))
    items = "".join(f'<li class="{css}">{text}</li>' for css, text in lines)
    return f'<ul class="trust">{items}</ul>'


def _timing_line(latency: LatencyStats) -> tuple[str, str]:
    """How the latency was obtained."""
    if latency.predicted:
        return "no", "Latency is predicted from the measured costs of its steps; the schedule was not timed end to end."
    beside = " interleaved with the full schedule" if latency.ratio else ""
    spread = latency.p90_ms / latency.median_ms - 1 if latency.median_ms and latency.p90_ms else 0.0
    settled = "" if latency.settled else "; warm-up never settled within 2 %"
    if latency.disturbed:
        settled += f"; the card was disturbed, even when timed again ({', '.join(latency.disturbed)})"
    return (
        "yes" if latency.settled and not latency.disturbed and spread < 0.15 else "no",
        f"Latency is the median of {len(latency.samples_ms)} runs{beside}, p90 {spread:.0%} above it{settled}.",
    )


def _drift(result: StudyResult) -> list[tuple[str, str]]:
    """A warning if the full schedule's own latency changed between its two measurements."""
    full = result.baseline
    if not isinstance(full, Finalist) or not full.latency.median_ms:
        return []
    change = full.verification.latency.median_ms / full.latency.median_ms - 1
    if abs(change) < 0.1:
        return []
    moved = f"{abs(change):.0%} {'slower' if change > 0 else 'faster'}"
    return [("no", f"The full schedule itself was {moved} when it was verified: the machine was not quiet. "
                   "Interleaved ratios still hold; milliseconds are less certain.")]  # fmt: skip


def _verdict_line(verdict: Verdict, proved: bool) -> tuple[str, str]:
    word = {"met": "met", "broken": "broken", "open": "not decided"}.get(verdict.status, verdict.status)
    if verdict.unit == "ms":
        value, limit, bound = ms(verdict.value), ms(verdict.limit), ms(verdict.bound)
    else:
        value, limit, bound = f"{verdict.value:.3f}", f"{verdict.limit:.3f}", f"{verdict.bound:.3f}"
        value, limit, bound = (v.replace("-", "−") for v in (value, limit, bound))
    if not math.isfinite(verdict.bound):
        bound = "unknown"
    if verdict.name.startswith("drop:"):
        limit = f"{limit} {escape(verdict.unit)}"
    names = {
        "latency": "Latency budget",
        "gain": "Ratio to the full schedule's latency, at most",
    }
    kind, _, metric = verdict.name.partition(":")
    name = names.get(verdict.name, f"{'Allowed drop' if kind == 'drop' else 'Floor'} of {escape(metric)}")
    how = f"95 % bound {bound}, estimate {value}" if proved else f"estimate {value} only"
    joined = f"{name} {limit}" if verdict.name == "gain" else f"{name} of {limit}"
    return {"met": "yes" if proved else "info"}.get(verdict.status, "no"), f"{escape(joined)} {word}: {how}."
