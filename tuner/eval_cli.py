"""`stagevar-eval`: score image folders, apply the benchmarks' rules to outside detections and answers, user studies.

Parsing and printing only; the work is in tuner.metrics. Model libraries load when a verb needs them: --help is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, NoReturn

from stagevar.console import (
    between,
    existing_file,
    existing_folder,
    existing_path,
    file_value,
    name_value,
    positive_int,
    report_errors,
    whole_number,
)
from stagevar.errors import UsageError
from stagevar.files import check_output, write_text_atomically, writing
from stagevar.folders import visible_files
from stagevar.prompt_files import natural_key
from stagevar.sections import shortened, shown

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
  partiprompts97,2,"1","attribute - color (cat, black)",0,no
"dependency" lists parent propositions of the item ("1,2", 0 or empty for none). Without "tile", the k-th line of a
question is tile k; instead of tile and answer there may be columns answer_0 ... answer_3. Only the exact answer "yes"
counts; a column of 0/1 is taken as scores. Questions keep the file's order, which the dependency walk follows.
docs/metrics.md has all spellings."""


_IMAGES_HELP = """\
layouts: GenEval's (DIR/00000/metadata.jsonl, DIR/00000/samples/0000.png), or images anywhere below DIR with --prompts:
a .jsonl of {"file": "a.png", "prompt": "..."} or GenEval metadata in order of name, a .txt with one prompt a line, or a
folder of item_id.txt (DPG). With --out RESULT.json every finished row is kept in RESULT.json.rows.jsonl; the same
command goes on from there. metrics and their options: docs/metrics.md."""

_PROMPTS_HELP = """\
Without --from: COCO classes, GenEval's six tasks, the same for the same seed. With --from: every tag keeps its share.
--check RESULT.json ... (three or more systems on the prompts of --from, one image each) says how well subsets of
--count prompts rank the systems as all prompts do (Spearman)."""

_PAIRS_HELP = """\
Send the page, keep the key. Voters press 1, 2 or T and save their answers to a file, which
`stagevar-eval preference --key KEY.json --answers ANSWERS.json ...` reads."""


class _Parser(argparse.ArgumentParser):
    """argparse with errors on one line; the exit code stays 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(shortened(f"{message} (see {self.prog} --help)"))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 unusable input (one line on stderr)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in (*VERBS, "-h", "--help", "--version"):
        arguments.insert(0, "images")  # `stagevar-eval --images DIR --metric NAME` needs no verb

    def run() -> int:
        options = _build_parser().parse_args(arguments)
        if "out" in options:  # a verb was given
            _check_outputs(options)
        return options.run(options)

    return report_errors("stagevar-eval", run)


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
    geneval.add_argument(
        "--detections", type=existing_file, required=True, metavar="FILE.json", help="what a detector found, per image"
    )
    geneval.add_argument(
        "--metadata", type=existing_file, metavar="FILE.jsonl", help="evaluation_metadata.jsonl, if entries carry none"
    )
    geneval.add_argument(
        "--threshold", type=between(0, 1), default=0.3, help="scores must be above it (default %(default)s)"
    )
    geneval.add_argument("--counting-threshold", type=between(0, 1), default=0.9, help="for tag counting (%(default)s)")
    geneval.add_argument("--max-per-class", type=positive_int, default=16, help="best detections kept (%(default)s)")
    geneval.add_argument("--position-margin", type=between(0, 1), default=0.1, help="share of the sizes (%(default)s)")
    geneval.add_argument("--max-overlap", type=between(0, 1), default=1.0, help="NMS threshold; 1 is off (%(default)s)")
    geneval.set_defaults(run=_run_geneval, inputs=("detections", "metadata"))

    dpg = _add(verbs, "dpg", "DPG-Bench's score from given answers, as published and corrected", _ANSWERS_HELP)
    dpg.add_argument(
        "--answers", type=existing_file, required=True, metavar="FILE.csv", help="what a VQA model answered"
    )
    dpg.add_argument(
        "--questions",
        type=existing_file,
        metavar="dpg_bench.csv",
        help="official questions, if the answers file has none",
    )
    dpg.add_argument(
        "--mode",
        choices=("both", "published", "corrected"),
        default="both",
        help="published keeps the released script's bugs (default %(default)s)",
    )
    dpg.set_defaults(run=_run_dpg, inputs=("answers", "questions"))

    images = _add(verbs, "images", "score a folder of images with metrics by name", _IMAGES_HELP)
    images.add_argument(
        "--images", type=existing_folder, metavar="DIR", help="GenEval's layout, or any folder of images"
    )
    images.add_argument("--metric", required=True, action="append", metavar="NAME", help="repeatable; --metric list")
    images.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METRIC.NAME=VALUE",
        help="option of a metric, such as clip_score.model=ViT-B-32; repeatable",
    )
    images.add_argument(
        "--reference", type=existing_folder, metavar="DIR", help="images to compare with, same names (fid, kid: any)"
    )
    images.add_argument("--prompts", type=existing_path, metavar="FILE", help="prompts, if the folder has none")
    images.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default %(default)s)")
    images.add_argument("--batch-size", type=positive_int, default=16, help="images at once (default %(default)s)")
    images.set_defaults(run=_run_images, inputs=("prompts",))

    prompts = _add(verbs, "prompts", "make a GenEval-style prompt set, or a stratified subset of one", _PROMPTS_HELP)
    prompts.add_argument("--count", type=positive_int, help="number of prompts (with --from: all of them)")
    prompts.add_argument(
        "--from",
        dest="source",
        type=existing_path,
        metavar="FILE",
        help="take a stratified subset of these prompts (.jsonl, .json, .csv, .txt, or a folder of .txt, one prompt each)",
    )
    prompts.add_argument("--tags", type=_tags, metavar="TAG,...", help="tasks to generate (default: all six)")
    prompts.add_argument("--seed", type=whole_number, default=0, help="seed (default %(default)s)")
    prompts.add_argument(
        "--to", type=file_value, metavar="FILE.jsonl", help="write the prompts here, as GenEval metadata"
    )
    prompts.add_argument(
        "--check", type=existing_file, nargs="+", metavar="RESULT.json", help="results of `images`, one per system"
    )
    prompts.add_argument("--metric", type=name_value, default="geneval", help="metric of --check (default %(default)s)")
    prompts.set_defaults(run=_run_prompts, inputs=("source", "check"), outputs=("to", "out"))

    pairs = _add(verbs, "pairs", "make a blind A/B page from two folders of images", _PAIRS_HELP)
    pairs.add_argument(
        "--a",
        type=existing_folder,
        required=True,
        metavar="DIR",
        help="images of A, with prompts if it has GenEval's layout",
    )
    pairs.add_argument("--b", type=existing_folder, required=True, metavar="DIR", help="images of B, same names")
    pairs.add_argument("--page", type=file_value, required=True, metavar="FILE.html", help="the page to write")
    pairs.add_argument(
        "--key", type=file_value, metavar="FILE.json", help="the key to write (default: beside the page, .key.json)"
    )
    pairs.add_argument("--prompts", type=existing_path, metavar="FILE", help="prompts, if A's folder has none")
    pairs.add_argument("--count", type=positive_int, help="number of pairs (default: all)")
    pairs.add_argument(
        "--seed", type=whole_number, default=0, help="seed of choice, order and sides (default %(default)s)"
    )
    pairs.add_argument("--question", type=name_value, default="Which image is better?", help="heading of the page")
    pairs.set_defaults(run=_run_pairs, inputs=("prompts",), outputs=("page", "key", "out"))

    preference = _add(verbs, "preference", "win rate of a study, and whether no preference is supported")
    preference.add_argument(
        "--key", type=existing_file, required=True, metavar="FILE.json", help="the key that `pairs` wrote"
    )
    preference.add_argument(
        "--answers", type=existing_file, required=True, nargs="+", metavar="FILE.json", help="answers, all voters"
    )
    preference.add_argument(
        "--margin",
        type=between(0, 0.5, ends=False),
        default=0.1,
        help="win rates within 0.5 -+ this count as no preference (default %(default)s)",
    )
    preference.add_argument(
        "--level", type=between(0.5, 1, ends=False), default=0.95, help="confidence (default %(default)s)"
    )
    preference.set_defaults(run=_run_preference, inputs=("key", "answers"))
    return parser


def _add(verbs: Any, name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=summary,
        description=summary + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "--out", type=file_value, metavar="FILE.json", help="also write the results, with versions and hashes, here"
    )
    verb.add_argument("--json", action="store_true", help="print that JSON instead of the table")
    verb.set_defaults(outputs=("out",))
    return verb


def _tags(text: str) -> list[str]:
    """GenEval's tasks with commas between them."""
    from stagevar.geneval import TAGS

    tags = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [tag for tag in tags if tag not in TAGS]
    if unknown or not tags:
        named = shown(unknown[0] if unknown else text)
        raise argparse.ArgumentTypeError(f"{named} is no task; give some of {', '.join(TAGS)} with commas between them")
    return tags


# Files that a command reads and writes ---------------------------------------------------------------------------------


def _check_outputs(options: argparse.Namespace) -> None:
    """Raises UsageError, before anything is computed, for a file that cannot be written or that is read or written twice."""
    if options.verb == "pairs" and options.key is None:
        options.key = options.page.with_suffix(".key.json")
    taken = {os.path.realpath(path): f"--{_spelled(name)}" for name, path in _read_by(options) if path.is_file()}
    for name in options.outputs:
        path = getattr(options, name)
        if path is None:
            continue
        check_output(path, f"--{name}")
        if path.exists() and not path.is_file():
            continue  # a device or a pipe takes several
        place = os.path.realpath(path)
        if place in taken:
            raise UsageError(f"--{name} {path!s:.200} is the file of {taken[place]} too; choose another")
        taken[place] = f"--{name}"


def _spelled(name: str) -> str:
    return {"source": "from"}.get(name, name)


def _read_by(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """(option, path) of the files and folders that a command reads whole."""
    for name in options.inputs:
        value = getattr(options, name)
        for path in value if isinstance(value, list) else [value]:
            if path is not None:
                yield name, path


# Benchmarks from given detections and answers ----------------------------------------------------------------------


def _run_geneval(options: argparse.Namespace) -> int:
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
    return _deliver(options, results, lines)


def _run_dpg(options: argparse.Namespace) -> int:
    from tuner.metrics.dpg import MODES, read_answers, score_dpg

    questions, answers = read_answers(options.answers, options.questions)
    results: dict[str, Any] = {}
    lines: list[str] = []
    for mode in MODES if options.mode == "both" else (options.mode,):
        try:
            score = score_dpg(questions, answers, mode)
        except UsageError as error:
            if options.mode != "both" or mode == "published":
                raise
            # A file that only the corrected rules refuse still has its published score.
            results[mode] = {"refused": str(error)}
            lines.append(f"DPG-Bench {mode:<10} refused: {error}")
            continue
        results[mode] = dataclasses.asdict(score)
        figure = "n/a (no prompt scored)" if score.score is None else f"{score.score:.4f}"
        lines += [f"DPG-Bench {mode:<10} {figure}   ({len(score.prompts)} prompts)"]
        lines += [f"  dropped {item_id}: {reason}" for item_id, reason in score.dropped.items()]
        if score.unanswered:
            lines.append(f"  {len(score.unanswered)} items of the question file have no answers")
        lines += [f"  L1 {name:<28} {value:9.4f}" for name, value in score.l1.items()]
        lines += [f"  L2 {name:<28} {value:9.4f}" for name, value in score.l2.items()]
    return _deliver(options, results, lines)


# Image folders and prompt sets -------------------------------------------------------------------------------------


def _run_images(options: argparse.Namespace) -> int:
    from stagevar.models.registry import resolve_device
    from tuner.evalkit.image_folder import evaluate_folder, match_references, read_folder, reference_set
    from tuner.metrics.registry import METRIC_NAMES, check_name, check_options, create, metric_class

    if options.metric == ["list"]:
        print("\n".join(METRIC_NAMES))
        return 0
    if options.images is None:
        raise UsageError("give --images DIR, the folder to score (see stagevar-eval images --help)")
    progress = None
    if options.out is not None and (options.out.is_file() or not options.out.exists()):  # beside no device
        progress = check_output(options.out.with_name(options.out.name + ".rows.jsonl"), "--out")
    for name in options.metric:
        check_name(name)
    given = _metric_options(options.option, options.metric)
    images = read_folder(options.images, options.prompts)
    classes = {name: metric_class(name) for name in options.metric}  # imports torch: after all cheap refusals
    for name in classes:
        check_options(name, given[name])
    paired = any(cls.needs_reference for name, cls in classes.items() if name not in ("fid", "kid"))
    references = None
    if options.reference is not None:
        references = match_references(images, options.reference) if paired else reference_set(options.reference)
    device = str(resolve_device(options.device))
    digest = _files_digest([image.path for image in images])
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
    versions = ("torch", "transformers", "open_clip_torch", "torchmetrics", "torch-fidelity", "lpips")
    return _deliver(options, {"metrics": results, "images_sha256": digest}, lines, packages=versions)


def _metric_options(assignments: Sequence[str], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`metric.name=value` by metric; values are read as YAML, so numbers and true/false are what they look like."""
    from stagevar.yaml_files import parse_yaml

    options: dict[str, dict[str, Any]] = {name: {} for name in metrics}
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


def _flat(summary: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in summary.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", f"{value:.5f}" if isinstance(value, float) else str(value)))
    return rows


def _files_digest(paths: Sequence[Path]) -> str:
    """One hash over the bytes of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(_sha256(path)))
    return digest.hexdigest()


def _run_prompts(options: argparse.Namespace) -> int:
    from tuner.metrics.prompt_sets import (
        generate,
        read_prompts,
        stratified_subset,
        subset_rank_correlation,
        write_metadata,
    )

    results: dict[str, Any] = {}
    if options.source is None:
        if options.check:
            raise UsageError("--check needs --from: the prompts that the results were made with")
        if options.count is None:
            raise UsageError("give --count N, how many prompts to make, or --from FILE")
        prompts = generate(options.count, options.seed, **({"tags": options.tags} if options.tags else {}))
    else:
        if options.tags:
            raise UsageError("--tags says which prompts to make; with --from they are those of the file: leave one out")
        whole = read_prompts(options.source)
        if options.check and options.count is None:
            raise UsageError("--check needs --count N: how many prompts the subsets have that it judges")
        indices = stratified_subset(whole, len(whole) if options.count is None else options.count, options.seed)
        prompts = [whole[index] for index in indices]
        results["indices"] = indices
        if options.check:
            results["subset"] = subset_rank_correlation(
                _values_of(options.check, options.metric, len(whole)), whole, options.count, seed=options.seed
            )
    if options.to is not None:
        write_metadata(prompts, options.to)
    by_tag: dict[str, int] = {}
    for prompt in prompts:
        by_tag[prompt.get("tag", "")] = by_tag.get(prompt.get("tag", ""), 0) + 1
    results |= {"count": len(prompts), "tags": by_tag, "prompts": prompts}
    lines = [prompt["prompt"] for prompt in prompts] if options.to is None and not options.check else []
    lines += [f"{name:<16} {value:.4f}" for name, value in results.get("subset", {}).items()]
    lines += [f"{tag or 'prompts':<16} {count}" for tag, count in by_tag.items()]
    return _deliver(options, results, lines)


def _values_of(paths: Sequence[Path], metric: str, count: int) -> list[list[float]]:
    """One row per result file: the metric's value per image, which must be one per prompt."""
    from stagevar.text_files import read_json

    rows = []
    for path in paths:
        try:
            values = [float(row["value"]) for row in read_json(path)["results"]["metrics"][metric]["rows"]]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UsageError(f"{path}: no rows of {shown(metric)} in it; make it with stagevar-eval images") from None
        if not all(map(math.isfinite, values)):
            raise UsageError(f"{path}: a value of {shown(metric)} is beyond floating point")
        if len(values) != count:
            raise UsageError(
                f"{path}: {len(values)} rows of {shown(metric)} for {count} prompts; one image per prompt needed"
            )
        rows.append(values)
    return rows


# User study --------------------------------------------------------------------------------------------------------


def _run_pairs(options: argparse.Namespace) -> int:
    from tuner.evalkit.image_folder import match_references, read_folder
    from tuner.evalkit.user_study import build_study

    images = read_folder(options.a, options.prompts)
    study = build_study(
        images, match_references(images, options.b), count=options.count, seed=options.seed, question=options.question
    )
    page, key = options.page, options.key
    for path, text in ((page, study.page), (key, json.dumps(study.key, indent=2) + "\n")):
        with writing(path):
            write_text_atomically(path, text)
    results = {"page": str(page), "key": str(key), "pairs": len(study.key["pairs"]), "study": study.key["study"]}
    lines = [f"{results['pairs']} pairs: send {page}, keep {key}"]
    return _deliver(options, results, lines, [page, key])


def _run_preference(options: argparse.Namespace) -> int:
    from stagevar.text_files import read_json
    from tuner.evalkit.user_study import judge_preference, read_votes

    votes = read_votes(read_json(options.key), options.answers)
    result = judge_preference(votes, margin=options.margin, level=options.level)
    lines = [
        f"votes: A {result.votes['A']}, B {result.votes['B']}, no difference {result.votes['tie']} "
        f"({result.voters} voters, {result.pairs} pairs)",
        f"win rate of A {result.win_rate:.1%}, {result.level:.0%} interval {result.low:.1%} to {result.high:.1%}",
        f"preference: p = {result.p_preference:.4f}",
        f"no preference within 50 % -+ {result.margin:.0%}: p = {result.p_equivalence:.4f}",
        f"verdict: {result.verdict}",
    ]
    if result.verdict == "undecided":
        lines.append(f"about {result.pairs_needed} pairs would support no preference, if there is none")
    return _deliver(options, dataclasses.asdict(result), lines)


# Output -----------------------------------------------------------------------------------------------------------


def _deliver(
    options: argparse.Namespace,
    results: Any,
    lines: Sequence[str],
    written: Sequence[Path] = (),
    packages: Sequence[str] = (),
) -> int:
    """Print the table (or JSON) and write `--out`; the JSON states versions and the hashes of what was read and written."""
    document = {
        "schema": "stagevar-eval/1",
        "command": options.verb,
        "inputs": {str(path): _digest(path) for path in (*(path for _, path in _read_by(options)), *written)},
        "versions": {
            "stagevar-tune": _version("stagevar-tune"),
            "python": platform.python_version(),
            **{package: _version(package) for package in ("numpy", *packages)},
        },
        "results": _plain(results),
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    if options.out is not None:
        with writing(options.out):
            write_text_atomically(options.out, text + "\n")
    print(text if options.json else "\n".join(lines))
    return 0


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinities: null stands for them."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or of the visible files of a folder in natural order; None for a pipe, which is read only once."""
    if path.is_dir():
        return _files_digest(sorted(visible_files(path), key=lambda file: natural_key(str(file))))
    return _sha256(path) if path.is_file() else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(package: str) -> str:
    try:
        return package_metadata.version(package)
    except package_metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
