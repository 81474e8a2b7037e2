"""`stagevar-eval`: score image folders, apply the benchmarks' rules to outside detections and answers, user studies.

Parsing and printing only; the work is in tuner.metrics. Model libraries load when a verb needs them: --help is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, NoReturn

from stagevar.errors import StagevarError, UsageError

VERBS = ("images", "geneval", "dpg", "prompts", "pairs", "preference")

_DETECTIONS_HELP = """\
detections file: JSON (a list, or an object of images by name) or JSON lines, one entry per image:
  {"name": "00000/samples/0000.png",
   "metadata": {"tag": "counting", "include": [{"class": "dog", "count": 2}],
                "exclude": [{"class": "dog", "count": 3}], "prompt": "a photo of two dogs"},
   "detections": [{"class": "dog", "score": 0.97, "box": [x0, y0, x1, y1], "color": "red"}, ...]}
Boxes are corners in pixels (box_xywh: corner and size). "color" is the classifier's answer; "color_scores", ten
numbers in GenEval's order, are decided by argmax, the first of equals. List every detection: the thresholds, the limit
of 16 per class and the order by score are applied here. The results.jsonl of the GenEval script is read too.
docs/metrics.md has all spellings."""

_ANSWERS_HELP = """\
answers file: CSV with a header, one line per question and tile:
  item_id,proposition_id,dependency,tuple,tile,answer
  partiprompts97,1,0,entity - whole (cat),0,yes
  partiprompts97,2,"1",attribute - color (cat, black),0,no
"dependency" lists parent propositions of the item ("1,2", 0 or empty for none). Without "tile", the k-th line of a
question is tile k; instead of tile and answer there may be columns answer_0 ... answer_3. Only the exact answer "yes"
counts; a column of 0/1 is taken as scores. Questions keep the file's order, which the dependency walk follows.
docs/metrics.md has all spellings."""


class _Parser(argparse.ArgumentParser):
    """argparse with errors on one line; the exit code stays 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 unusable input (one line on stderr)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in (*VERBS, "-h", "--help", "--version"):
        arguments.insert(0, "images")  # `stagevar-eval --images DIR --metric NAME` needs no verb
    try:
        options = _build_parser().parse_args(arguments)
        return options.run(options)
    except StagevarError as error:
        print(f"stagevar-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stagevar-eval",
        description="Image quality for next-scale models: benchmarks, metrics, user studies.",
        epilog="Without a verb, `images` is meant: stagevar-eval --images DIR --metric NAME.",
    )
    parser.add_argument("--version", action="version", version=f"stagevar-tune {_version('stagevar-tune')}")
    verbs = parser.add_subparsers(dest="verb", metavar="{" + ",".join(VERBS) + "}")
    parser.set_defaults(run=lambda options: parser.print_help() or 0)

    geneval = _add(verbs, "geneval", "GenEval's official verdicts and score from given detections", _DETECTIONS_HELP)
    geneval.add_argument("--detections", required=True, metavar="FILE.json", help="what a detector found, per image")
    geneval.add_argument("--metadata", metavar="FILE.jsonl", help="evaluation_metadata.jsonl, if entries carry none")
    geneval.add_argument("--threshold", type=float, default=0.3, help="scores must be above it (default %(default)s)")
    geneval.add_argument("--counting-threshold", type=float, default=0.9, help="for tag counting (%(default)s)")
    geneval.add_argument("--max-per-class", type=int, default=16, help="best detections kept (%(default)s)")
    geneval.add_argument("--position-margin", type=float, default=0.1, help="share of the sizes (%(default)s)")
    geneval.add_argument("--max-overlap", type=float, default=1.0, help="NMS threshold; 1 is off (%(default)s)")
    geneval.set_defaults(run=_run_geneval)

    dpg = _add(verbs, "dpg", "DPG-Bench's score from given answers, as published and corrected", _ANSWERS_HELP)
    dpg.add_argument("--answers", required=True, metavar="FILE.csv", help="what a VQA model answered")
    dpg.add_argument("--questions", metavar="dpg_bench.csv", help="official questions, if the answers file has none")
    dpg.add_argument("--mode", choices=("both", "published", "corrected"), default="both",
                     help="published keeps the released script's bugs (default %(default)s)")
    dpg.set_defaults(run=_run_dpg)
    return parser


def _add(verbs: Any, name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name, help=summary, description=summary + ".", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--out", metavar="FILE.json", help="also write the results, with versions and hashes, here")
    verb.add_argument("--json", action="store_true", help="print that JSON instead of the table")
    return verb


# Benchmarks from given detections and answers ----------------------------------------------------------------------


def _run_geneval(options: argparse.Namespace) -> int:
    from tuner.metrics.detections import read_detections, score_detections

    rules = {name: getattr(options, name) for name in
             ("threshold", "counting_threshold", "max_per_class", "position_margin", "max_overlap")}
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
    return _deliver(options, "geneval", results, lines, [options.detections, options.metadata])


def _run_dpg(options: argparse.Namespace) -> int:
    from tuner.metrics.dpg import MODES, read_answers, score_dpg

    questions, answers = read_answers(options.answers, options.questions)
    results: dict[str, Any] = {}
    lines: list[str] = []
    for mode in MODES if options.mode == "both" else (options.mode,):
        score = score_dpg(questions, answers, mode)
        results[mode] = dataclasses.asdict(score)
        figure = "n/a (no prompt scored)" if score.score is None else f"{score.score:.4f}"
        lines += [f"DPG-Bench {mode:<10} {figure}   ({len(score.prompts)} prompts)"]
        lines += [f"  dropped {item_id}: {reason}" for item_id, reason in score.dropped.items()]
        if score.unanswered:
            lines.append(f"  {len(score.unanswered)} items of the question file have no answers")
        lines += [f"  L1 {name:<28} {value:9.4f}" for name, value in score.l1.items()]
        lines += [f"  L2 {name:<28} {value:9.4f}" for name, value in score.l2.items()]
    return _deliver(options, "dpg", results, lines, [options.answers, options.questions])


# Output -----------------------------------------------------------------------------------------------------------


def _deliver(
    options: argparse.Namespace, command: str, results: Any, lines: Sequence[str], inputs: Sequence[str | None]
) -> int:
    """Print the table (or JSON) and write `--out`; the JSON states versions and the hashes of the inputs."""
    document = {
        "schema": "stagevar-eval/1",
        "command": command,
        "inputs": {str(path): _sha256(Path(path)) for path in inputs if path is not None},
        "versions": {"stagevar-tune": _version("stagevar-tune"), "python": platform.python_version(),
                     "numpy": _version("numpy")},
        "results": results,
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    if options.out:
        try:
            Path(options.out).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--out {options.out}: cannot be written ({error.strerror})") from None
    print(text if options.json else "\n".join(lines))
    return 0


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(package: str) -> str:
    try:
        return package_metadata.version(package)
    except package_metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
