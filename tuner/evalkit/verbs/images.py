"""`stagevar-eval images`: a folder of images scored with metrics by name."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from stagevar import plugins
from stagevar.cli.arguments import existing_folder, existing_path, positive_int
from stagevar.errors import UsageError
from stagevar.files import check_output
from stagevar.sections import shown
from tuner.evalkit.delivery import Verbs, add_verb, deliver, files_digest

_HELP = """\
layouts: GenEval's (DIR/00000/metadata.jsonl, DIR/00000/samples/0000.png), or images anywhere below DIR with --prompts:
a .jsonl of {"file": "a.png", "prompt": "..."} or GenEval metadata in order of name, a .txt with one prompt per line, or
a folder of item_id.txt (DPG). With --out RESULT.json every finished row is kept in RESULT.json.rows.jsonl, and the same
command resumes from there. metrics and their options: docs/metrics.md."""


def add(verbs: Verbs) -> None:
    """The options of the verb."""
    verb = add_verb(verbs, "images", "score a folder of images with metrics by name", _HELP)
    verb.add_argument("--images", type=existing_folder, metavar="DIR", help="GenEval's layout, or any folder of images")
    verb.add_argument("--metric", required=True, action="append", metavar="NAME", help="repeatable; --metric list")
    verb.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METRIC.NAME=VALUE",
        help="option of a metric, such as clip_score.model=ViT-B-32; repeatable",
    )
    verb.add_argument(
        "--reference",
        type=existing_folder,
        metavar="DIR",
        help="images to compare with, with the same names (set metrics: any names)",
    )
    verb.add_argument("--prompts", type=existing_path, metavar="FILE", help="prompts, if the folder has none")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default %(default)s)")
    verb.add_argument("--batch-size", type=positive_int, default=16, help="images at once (default %(default)s)")
    verb.set_defaults(run=run, inputs=("prompts",))


def run(options: argparse.Namespace) -> int:
    """Scores the images of a folder, one row per image and metric."""
    from stagevar.models.registry import resolve_device
    from tuner.evalkit.image_folder import evaluate_folder, match_references, read_folder, reference_set
    from tuner.metrics.base import SetMetric
    from tuner.metrics.registry import (
        METRIC_NAMES,
        METRICS,
        check_name,
        check_options,
        create,
        metric_class,
    )

    if options.metric == ["list"]:
        from tuner.metrics.listing import listed_metrics, table

        metrics_there = listed_metrics()
        return deliver(options, [dataclasses.asdict(metric) for metric in metrics_there], table(metrics_there))
    if options.images is None:
        raise UsageError("give --images DIR, the folder to score (see stagevar-eval images --help)")
    progress = None
    if options.out is not None and (options.out.is_file() or not options.out.exists()):  # beside no device
        progress = check_output(options.out.with_name(options.out.name + ".rows.jsonl"), "--out")
    for name in options.metric:
        check_name(name)
    given = _metric_options(options.option, options.metric)
    images = read_folder(options.images, options.prompts)
    classes = {name: metric_class(name) for name in options.metric}  # imports torch: after all cheap checks
    for name in classes:
        check_options(name, given[name])
    paired = any(cls.needs_reference for name, cls in classes.items() if not issubclass(cls, SetMetric))
    references = None
    if options.reference is not None:
        references = match_references(images, options.reference) if paired else reference_set(options.reference)
    device = str(resolve_device(options.device))
    digest = files_digest([image.path for image in images])
    metrics = {name: create(name, device=device, **given[name]) for name in classes}
    results = evaluate_folder(
        images,
        metrics,
        references=references,
        batch_size=options.batch_size,
        progress=progress,
    )
    lines = []
    for name, result in results.items():
        lines.append(f"{name}  ({result['images']} images)")
        lines += [f"  {label:<28} {value}" for label, value in _flat(result["summary"])]
    versions: tuple[str, ...] = ("torch", "transformers", "open_clip_torch", "torchmetrics", "torch-fidelity", "lpips")
    versions = (*versions, *plugins.versions(METRICS, classes, METRIC_NAMES))
    return deliver(options, {"metrics": results, "images_sha256": digest}, lines, packages=versions)


def _metric_options(assignments: Sequence[str], metrics: Sequence[str]) -> dict[str, dict[str, object]]:
    """`metric.name=value` by metric; values are read as YAML, so numbers and true/false are what they look like."""
    from stagevar.yaml_files import parse_yaml

    options: dict[str, dict[str, object]] = {name: {} for name in metrics}
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        metric, dot, name = target.partition(".")
        if not (equals and dot and name) or metric not in options:
            raise UsageError(f"--option {shown(assignment)}: expected METRIC.NAME=VALUE with a metric of --metric")
        try:
            options[metric][name] = parse_yaml(value, assignment)
        except UsageError:
            options[metric][name] = value
    return options


def _flat(summary: object, prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in summary.items() if isinstance(summary, dict) else ():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", f"{value:.5f}" if isinstance(value, float) else str(value)))
    return rows
