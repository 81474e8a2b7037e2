"""What `stagevar-eval --metric list` says about each metric. Imports plug-ins' modules, but no model library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagevar import plugins
from stagevar.plugins import PluginError
from tuner.metrics import registry
from tuner.metrics.base import Metric, SetMetric
from tuner.metrics.declarations import DECLARATIONS, Compares
from tuner.metrics.downloads import metric_downloads
from tuner.metrics.quality_spec import QualitySpec


@dataclass(frozen=True)
class Listed:
    """One metric.

    Attributes:
        unit: of its mean.
        better: "higher" or "lower".
        compares: what an image is compared with, "" for nothing.
        packages: what it needs beyond the base installation, by import names; for a plug-in, its distribution.
        missing: those that are not installed.
        weights: what it fetches with its default options.
        weights_bytes: about how much that is, 0 for a metric without weights, None if unknown.
    """

    name: str
    unit: str
    better: str
    compares: str
    packages: tuple[str, ...]
    missing: tuple[str, ...]
    weights: tuple[str, ...]
    weights_bytes: int | None


def listed_metrics() -> list[Listed]:
    """All metrics, the built-in ones first. A plug-in that fails to load is left out: `stagevar-tune doctor` says why."""
    found = []
    for name in registry.metric_names():
        try:
            found.append(_listed(name))
        except PluginError:
            continue
    return found


def _listed(name: str) -> Listed:
    declaration = registry.declaration_of(name)
    plugin = None if name in DECLARATIONS else plugins.find(registry.METRICS, name, DECLARATIONS)
    downloads = metric_downloads({name: QualitySpec()})
    sizes = [download.about_bytes for download in downloads]
    known = plugin is None and None not in sizes
    compares = (
        declaration.compares if plugin is None else declaration.compares or _compares(registry.metric_class(name))
    )
    return Listed(
        name,
        declaration.unit,
        "higher" if declaration.higher_is_better else "lower",
        compares,
        registry.packages_of(name) if plugin is None else (plugin.package,),
        tuple(registry.missing_packages(name)),
        tuple(download.source for download in downloads),
        sum(size for size in sizes if size is not None) if known else None,
    )


def _compares(cls: type[Metric]) -> Compares:
    """What a plug-in's class says it compares an image with."""
    if cls.needs_reference:
        return "reference set" if issubclass(cls, SetMetric) else "reference"
    return "prompt" if cls.needs_prompt else ""


def table(metrics: Sequence[Listed]) -> list[str]:
    """The metrics as lines of a table; packages that are not installed have a star."""
    rows = [("metric", "unit", "better", "compares with", "packages", "weights")]
    for metric in metrics:
        packages = " ".join(name + "*" * (name in metric.missing) for name in metric.packages)
        rows.append(
            (
                metric.name,
                metric.unit,
                metric.better,
                metric.compares or "-",
                packages or "-",
                _size(metric.weights_bytes),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(metric.missing for metric in metrics):
        lines.append("* not installed")
    return lines


def _size(count: int | None) -> str:
    if count is None:
        return "not known"
    if count == 0:
        return "none"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
