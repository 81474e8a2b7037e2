"""`stagevar-eval geneval`: GenEval's official verdicts and score from given detections."""

from __future__ import annotations

import argparse
import dataclasses

from stagevar.cli.arguments import between, existing_file, positive_int
from tuner.evalkit.delivery import Verbs, add_verb, deliver

_HELP = """\
detections file: JSON (a list, or an object of images by name) or JSON lines, one entry per image:
  {"name": "00000/samples/0000.png",
   "metadata": {"tag": "counting", "include": [{"class": "dog", "count": 2}],
                "exclude": [{"class": "dog", "count": 3}], "prompt": "a photo of two dogs"},
   "detections": [{"class": "dog", "score": 0.97, "box": [x0, y0, x1, y1], "color": "red"}, ...]}
Boxes are corners in pixels (box_xywh: corner and size). "color" is the classifier's answer; "color_scores" are ten
numbers in GenEval's order, whose largest (the first, if tied) decides. List every detection: thresholds, the limit of
16 per class and the order by score are applied here. The GenEval script's results.jsonl can be read as well.
docs/metrics.md lists all spellings."""


def add(verbs: Verbs) -> None:
    """The options of the verb."""
    verb = add_verb(verbs, "geneval", "GenEval's official verdicts and score from given detections", _HELP)
    verb.add_argument(
        "--detections", type=existing_file, required=True, metavar="FILE.json", help="what a detector found, per image"
    )
    verb.add_argument(
        "--metadata", type=existing_file, metavar="FILE.jsonl", help="evaluation_metadata.jsonl, if entries have none"
    )
    verb.add_argument(
        "--threshold", type=between(0, 1), default=0.3, help="scores must be above it (default %(default)s)"
    )
    verb.add_argument("--counting-threshold", type=between(0, 1), default=0.9, help="for tag counting (%(default)s)")
    verb.add_argument("--max-per-class", type=positive_int, default=16, help="best detections kept (%(default)s)")
    verb.add_argument("--position-margin", type=between(0, 1), default=0.1, help="share of the sizes (%(default)s)")
    verb.add_argument("--max-overlap", type=between(0, 1), default=1.0, help="NMS threshold; 1 is off (%(default)s)")
    verb.set_defaults(run=run, inputs=("detections", "metadata"))


def run(options: argparse.Namespace) -> int:
    """Scores detections, one line per image and per tag."""
    from tuner.metrics.detections import read_detections, score_detections

    rules = {
        name: getattr(options, name)
        for name in ("threshold", "counting_threshold", "max_per_class", "position_margin", "max_overlap")
    }
    report = score_detections(read_detections(options.detections, options.metadata), **rules)
    summary = report.summary
    results = {
        **dataclasses.asdict(summary),
        "rules": rules,
        "verdicts": [
            {"name": image.name, "tag": image.metadata["tag"], "correct": verdict.correct, "reason": verdict.reason}
            for image, verdict in zip(report.images, report.verdicts, strict=True)
        ],
    }
    lines = [
        f"{'correct' if verdict['correct'] else 'wrong':<8} {verdict['tag']:<14} {verdict['name']}"
        + (f"  ({verdict['reason'].replace(chr(10), '; ')})" if verdict["reason"] else "")
        for verdict in results["verdicts"]
    ]
    lines += ["", f"{'tag':<14} {'score':>8} {'images':>7}"]
    lines += [f"{tag:<14} {value:8.2%} {summary.images_per_tag[tag]:7d}" for tag, value in summary.tags.items()]
    lines += [
        "",
        f"images {summary.images}, correct {summary.correct_images:.2%}; "
        f"prompts {summary.prompts}, any image correct {summary.correct_prompts:.2%}",
        f"GenEval overall (mean of tags) {summary.overall:.5f}",
    ]
    return deliver(options, results, lines)
