"""The run itself: what failed, and what it was measured on."""

from __future__ import annotations

from html import escape
from typing import Any

from tuner.report.charts import bars
from tuner.report.sections.marks import both_widths, table_rows
from tuner.report.words import (
    budget_text,
    limits_text,
)
from tuner.results.result import StudyResult


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
    return table_rows(["Trial", "Parameters", "Error"], rows, [0]) + more


def run_section(result: StudyResult) -> str:
    total = sum(result.phases_s.values())
    phases = ""
    if total > 0:
        rows = [(name, s, "bar feasible", f"{s:,.1f} s  {s / total:.0%}") for name, s in result.phases_s.items()]
        phases = f"<h3>Where {total:,.0f} s went</h3>" + both_widths(
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
                   + f" tokens per side; {result.chunks} chunks; {result.pixels[0]}×{result.pixels[1]} pixels"),
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
    """Which engine, why, and what was found out about the others."""
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
