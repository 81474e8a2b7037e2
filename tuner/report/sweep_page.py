"""What a sweep found: a row per study, as one table and one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from stagevar.files import write_text_atomically
from tuner.report.export import to_csv
from tuner.results.result import StudyResult

TABLE_FILE, REPORT_FILE = "sweep.csv", "sweep.html"
#: A cell's axes and figures by column.
Row = Mapping[str, object]


def summary(result: StudyResult) -> dict[str, object]:
    """The columns that a study fills: times in ms per image, quality as the primary metric's paired difference from the
    full schedule."""
    pick, full = result.pick, result.baseline.final_latency
    row: dict[str, object] = {
        "verdict": result.verdict,
        "exit_code": result.exit_code,
        "device": result.device.get("name"),
        "full_ms": full.median_ms if full else None,
        "budget_ms": result.budget_ms if full else None,
        "schedules": len(result.candidates),
    }
    if pick is not None and pick.final_latency is not None:
        primary = result.limits[0].metric if result.limits else ""
        latency, change = pick.final_latency, pick.final_differences.get(primary)
        row |= {"pick": pick.key, "pick_ms": latency.drift_corrected_ms, "skipped_scales": pick.skipped_scales}
        if (gain := latency.speedup) is not None:
            row |= {"speedup": gain.mean, "speedup_low": gain.low}
        if change is not None:
            row |= {"metric": primary, "unit": result.limits[0].unit}
            row |= {"quality": change.mean, "quality_low": change.low, "quality_high": change.high}
    return {**row, "reason": result.reason}


def write_table(rows: Sequence[Row], axes: Iterable[str], out: Path) -> list[Path]:
    """Writes sweep.csv and sweep.html; returns their paths. `axes` names the columns that distinguish cells."""
    table, report = out / TABLE_FILE, out / REPORT_FILE
    write_text_atomically(table, to_csv(rows))
    write_text_atomically(report, render(rows, axes))
    return [table, report]


def render(rows: Sequence[Row], axes: Iterable[str]) -> str:
    """One page: what each cell reached, then what did not finish and why. Everything that users typed is escaped."""
    axes = [axis for axis in axes if any(axis in row for row in rows)]
    head = [*axes, "verdict", "full schedule", "pick", "speed-up", "quality change", "files"]
    body = "".join(
        "<tr>"
        + "".join(f"<td>{cell}</td>" for cell in (*(escape(str(row.get(a, ""))) for a in axes), *_shown(row)))
        + "</tr>"
        for row in rows
    )
    failed, stopped = ([row for row in rows if row["verdict"] == verdict] for verdict in ("failed", "stopped"))
    style = (files("tuner.report") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Sweep of {len(rows)} studies: stagevar-tune</title><style>{style}</style></head><body><main>"
        f"<h1>{len(rows) - len(failed) - len(stopped)} of {len(rows)} studies finished</h1>"
        f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>{body}</tbody></table>"
        + _listed("Failed", failed)
        + _listed("Stopped; the same command continues", stopped)
        + "</main></body></html>\n"
    )


def _listed(title: str, rows: Sequence[Row]) -> str:
    lines = "".join(f"<li><b>{escape(str(row['cell']))}</b>: {escape(str(row.get('reason')))}</li>" for row in rows)
    return f"<h2>{title}</h2><ul>{lines}</ul>" if rows else ""


def _shown(row: Row) -> list[str]:
    def number(name: str, text: str) -> str:
        return text.format(row[name]) if row.get(name) is not None else ""

    quality = number("quality", "{:+.3f}")
    if quality:
        quality += f" [{row['quality_low']:+.3f}, {row['quality_high']:+.3f}]"
    links = [f'<a href="{escape(str(row[name]))}">{name}</a>' for name in ("profile", "report") if row.get(name)]
    return [
        escape(str(row["verdict"]).replace("_", " ")),
        number("full_ms", "{:.1f} ms"),
        number("pick_ms", "{:.1f} ms"),
        number("speedup", "{:.2f}x"),
        quality,
        " ".join(links),
    ]
