"""Which parameters decide latency and quality."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tuner.report.charts import bars
from tuner.report.sections.marks import both_widths
from tuner.report.words import (
    has_quality,
)
from tuner.results.candidate import Measured
from tuner.results.importance import LEAST, Importance, importance
from tuner.results.result import StudyResult


def importances_section(result: StudyResult) -> str:
    done = [c for c in result.measured if c.params]
    if not done:
        return ""
    if len(done) < LEAST:
        return (
            f'<p class="note">Only {len(done)} measured {"trials have" if len(done) != 1 else "trial has"} search '
            f"parameters; importance needs at least {LEAST}.</p>"
        )
    names = sorted({name for c in done for name in c.params})
    outcomes: list[tuple[str, Callable[[Measured], float | None]]] = [
        ("latency", lambda c: c.latency.drift_corrected_ms)
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
            drawn = both_widths(partial(bars, rows=rows, label=f"Importance for {outcome}", span=1.0))
            charts.append(f"<h3>For {outcome}</h3>{drawn}")
    if not charts:
        return ""
    return (
        "".join(charts)
        + '<p class="note">Share of the outcome\'s rank variance that one parameter explains by itself, above what '
        "random grouping gives; pale bars are within chance (p ≥ 0.05). Interactions are not visible, and a search that "
        "settles early on one value leaves little to see.</p>"
    )
