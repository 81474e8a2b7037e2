"""`stagevar-tune --model ... --budget ...`: the run directory, signals and the study. The work is in tuner.study."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagevar import __version__, logs, plugins
from stagevar.choices import processors
from stagevar.cli.arguments import Parser, name_value, path_value, positive_int
from stagevar.console import STOPPED, say, set_verbosity
from stagevar.errors import EXIT_CODES, UsageError
from stagevar.models.registry import MODELS, SPECS
from stagevar.models.request import ModelRequest
from stagevar.profile.sections import EngineSection
from stagevar.schedule import ACCELERATORS, PLUGGED_ACCELERATORS
from stagevar.sections import read_section
from tuner.cli.console import announce, write_derived
from tuner.cli.options import PROG, Groups, add_output_options, add_study_options
from tuner.cli.plan import Plan, plan
from tuner.cli.stored import earlier_study, say_reuse, with_store
from tuner.config.quality import composite_specs, quality_limits
from tuner.config.space import SearchSpace
from tuner.metrics.registry import METRIC_NAMES, METRICS
from tuner.results.candidate import Finalist
from tuner.results.run_dir import CONFIG_FILE, LOG_FILE, STUDY_FILE, discard, driver_lock, prepare, repair

if TYPE_CHECKING:
    from tuner.cluster.executor import RayExecutor
    from tuner.evaluation.evaluator import Evaluator
    from tuner.evaluation.executor import Executor
    from tuner.results.result import StudyResult
    from tuner.study.progress import Progress
    from tuner.study.study import Study

log = logging.getLogger(__name__)

EFFORTS = ("instant", "quick", "full")
#: Most CPU threads that draw images for quality: a small model's products are too small to divide among many.
MOST_DRAWING_THREADS = 4

_CODES = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
_EPILOG = f"""\
verbs:
  stagevar-tune resume RUN           continue a run to its original target (so does the same command)
  stagevar-tune report RUN           write report.html, pareto.yaml and trials.csv again from study.json
  stagevar-tune verify PROFILE       measure a profile again on this machine (--max-regression 3% as a CI gate)
  stagevar-tune sweep SWEEP.yaml     one study per model, budget, seed ... on a Ray cluster, one table
  stagevar-tune doctor               check this machine

exit codes:
{_CODES}

example: stagevar-tune --model nano --budget 60%"""


def build_parser() -> Parser:
    """The options of a study."""
    parser = Parser(
        prog=PROG,
        description="Find, prove and export the schedule with the best quality within a latency budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    groups = Groups.of(parser, "what to tune")
    what, limits, search, place, output = groups.what, groups.limits, groups.search, groups.place, groups.output
    add_study_options(groups, required=True)
    what.add_argument(
        "--analysis",
        type=path_value,
        metavar="DIR",
        help="boundaries, ranks and proposals of `stagevar analyze --out DIR`",
    )
    what.add_argument(
        "--kv-cache", choices=("model", "int8"), default="model", help="8 bits halve the cache (default: the model's)"
    )
    limits.add_argument("--time-budget", metavar="TIME", help="tuning time, such as 10m, including verification")
    _add_search_options(search)
    place.add_argument("--executor", choices=("local", "ray"), default="local", help="where it runs (default: local)")
    place.add_argument(
        "--ray-address",
        type=name_value,
        metavar="ADDRESS",
        help="cluster to join, such as auto (default: start one here)",
    )
    place.add_argument("--gpu-kind", metavar="NAME", help="which GPUs to use if a Ray cluster has several kinds")
    place.add_argument(
        "--task-timeout",
        default="30m",
        metavar="TIME",
        help="restart a Ray worker that has not answered for TIME (default: 30m)",
    )
    output.add_argument(
        "--out", type=path_value, metavar="DIR", help="run directory (default: outputs/MODEL-BUDGET-sSEED)"
    )
    output.add_argument("--fresh", action="store_true", help="discard what an earlier run left in --out")
    output.add_argument("--dry-run", action="store_true", help="check everything, print the plan, run nothing")
    add_output_options(output)
    return parser


def _add_search_options(search: argparse._ArgumentGroup) -> None:
    """Options for the search, and for reusing earlier studies."""
    search.add_argument(
        "--from",
        "--start-from",
        dest="start_from",
        type=path_value,
        metavar="RUN",
        help="first try what an earlier run or a profile.yaml found; what the run proved on the same held-out prompts stays "
        "proved, latency is measured again",
    )
    search.add_argument(
        "--effort",
        choices=EFFORTS,
        default="quick",
        help="instant: step costs and prior knowledge, nothing verified; quick: sensitivities, few schedules, one of them "
        "verified; full: also the sampler, all finalists verified (default: quick)",
    )
    search.add_argument(
        "--trials", type=positive_int, help="distinct schedules to evaluate (default: 12 if quick, else 30)"
    )
    search.add_argument(
        "--patience", type=positive_int, default=60, metavar="N", help="end after N schedules without progress (60)"
    )
    search.add_argument(
        "--exhaustive", action="store_true", help="time every schedule end to end and judge it on all search prompts"
    )
    search.add_argument("--sampler", choices=("auto", "gp", "tpe", "random"), default="auto", help="default: auto")
    search.add_argument(
        "--storage",
        type=name_value,
        metavar="URL",
        help="database for the trials, such as postgresql://HOST/DB (default: a file)",
    )
    search.add_argument(
        "--store",
        type=path_value,
        metavar="DIR",
        help="reuse matching quality and step costs from this folder, and add new ones (default: STAGEVAR_STORE)",
    )


class Interrupts:
    """Ctrl-C once asks the study to finish its round and write everything; twice stops immediately."""

    def __init__(self, say: Callable[[str], None]):
        self.asked, self._say = False, say

    def __enter__(self) -> Interrupts:
        self._catches = threading.current_thread() is threading.main_thread()  # other threads may not set handlers
        if self._catches:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._catches:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._say("finishing this round and writing everything; press Ctrl-C again to stop now")

    def __call__(self) -> bool:
        return self.asked


def run(args: argparse.Namespace, argv: Sequence[str], again: bool = False) -> int:
    """Runs or continues a study and prints its verdict; with `again`, undecided timings are repeated."""
    if args.threads == 1:
        # Set before the plan's checks load torch, which reads it once: drawing threads that sleep while waiting, instead of
        # spinning, lose little beside a busy process. Timings on several threads stay as in a deployment.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    set_verbosity(args.verbose, args.quiet)
    checked = plan(args, argv)
    if args.dry_run:
        from tuner.cli.dry_run import print_plan

        return print_plan(checked)
    try:
        result, written = carry_out(checked, again)
    except KeyboardInterrupt:
        say(f"{PROG}: interrupted; rerun the same command to resume")
        return STOPPED
    return announce(result, checked.run_dir, written, args)


def carry_out(checked: Plan, again: bool = False) -> tuple[StudyResult, list[Path]]:
    """Runs or continues a study in its directory; returns its result and the files that were derived from it.

    Raises KeyboardInterrupt if a second Ctrl-C stops it immediately, and the errors of `stagevar.errors`.
    """
    prepare(checked.run_dir)
    with driver_lock(checked.run_dir):
        if checked.args.fresh:
            discard(checked.run_dir)
        with logs.log_file(checked.run_dir / LOG_FILE, checked.command, versions()):
            result, written = _drive(checked, again)
            log.info("%s: %s", result.verdict, result.reason)
        return result, written


def _finished(checked: Plan, again: bool, progress: Progress) -> StudyResult | None:
    """The stored result if this very command already ran to its end; the caller has compared the identities."""
    from tuner.results.result import DamagedResult, StudyResult

    if not (checked.run_dir / STUDY_FILE).exists():
        return None
    try:
        result = StudyResult.load(checked.run_dir)
    except DamagedResult:
        progress.say(f"{STUDY_FILE} is damaged; writing it again from the evidence")
        return None
    if result.command != checked.command or result.verdict == "partial" or (again and _times_undecided(result)):
        return None
    return result


def _times_undecided(result: StudyResult) -> bool:
    """Whether timings left a study open, so that measuring again may settle it."""
    if result.verdict != "inconclusive" or not result.nearest:
        return False
    nearest = result.candidate(result.nearest[0])
    return isinstance(nearest, Finalist) and nearest.verification.times_open


def _drive(checked: Plan, again: bool) -> tuple[StudyResult, list[Path]]:
    from tuner.study.progress import Progress

    progress = Progress(checked.args.quiet)
    with Interrupts(progress.say) as interrupts:
        try:
            for line in repair(checked.run_dir):
                progress.say(line)
            progress.phase("load")
            study = build_study(checked, progress, interrupts)
            try:
                study.check_identity()
                result = _finished(checked, again, progress)
                if result is not None:
                    return result, write_derived(result, checked.run_dir)
                result = study.run()
                say_reuse(study, progress)
            finally:
                study.executor.close()
            progress.phase("report")
            written = write_derived(result, checked.run_dir)
        finally:
            progress.close()
    result = dataclasses.replace(result, phases_s={**progress.seconds, **progress.parts})
    result.save(checked.run_dir)
    return result, written


def build_study(checked: Plan, progress: Any, stop: Callable[[], bool]) -> Study:
    """Loads model, prompts and metrics."""
    from tuner.config.prompts import load_prompts
    from tuner.evaluation.model_evaluator import fitting_micro_batch, load_evaluator
    from tuner.study.instant import InstantStudy
    from tuner.study.options import EXHAUSTIVE, SearchShortcuts
    from tuner.study.predicted_front import load_table
    from tuner.study.study import Options, Study

    args, space = checked.args, checked.space
    if args.executor == "local":
        size = fitting_micro_batch(checked.model, space.prompts.micro_batch, space.quality)
        if size < space.prompts.micro_batch:
            progress.say(
                f"using micro-batches of {size} instead of {space.prompts.micro_batch} images to fit the memory"
            )
            space = dataclasses.replace(space, prompts=dataclasses.replace(space.prompts, micro_batch=size))
    prompts = load_prompts(space.prompts, args.seed)
    say_downloads(checked.model, space, progress)
    quality = composite_specs(space.quality, quality_limits(space.quality, args.max_drop))
    engine = kept_engine(checked.run_dir, args.engine)
    parts = {"prompts": prompts, "quality": quality, "floors": space.floors, "threads": args.threads, "engine": engine}
    executor: Executor | None = None
    evaluator: Evaluator
    if args.executor == "ray":
        cluster = _ray_executor(checked, parts, progress, stop)
        executor, evaluator = cluster, cluster.evaluator
    else:
        drawing = max(args.threads, min(MOST_DRAWING_THREADS, len(processors()) or 1))
        local = {"drawing_threads": drawing, "references_dir": checked.run_dir / "references"}
        evaluator = load_evaluator(checked.model, **parts, **local)
    options = Options(
        args.budget,
        max_drop=args.max_drop,
        trials=args.trials,
        time_budget_s=args.time_budget,
        seed=args.seed,
        sampler=args.sampler,
        storage=args.storage,
        command=checked.command,
        versions=versions() | plugged_versions(space),
        patience=args.patience,
        shortcuts=EXHAUSTIVE
        if args.exhaustive
        else SearchShortcuts(sensitivity=True, few=args.most_trials > args.trials),
        earlier=None if args.start_from is None else load_table(args.start_from, args.model),
        earlier_study=earlier_study(args, space, evaluator, prompts, progress),
        one_by_one=args.effort == "quick",
    )
    if args.store is not None and not evaluator.facts.random_weights:
        executor, evaluator = with_store(args, space, evaluator, prompts, executor, progress)
    kind = InstantStudy if args.effort == "instant" else Study
    return kind(checked.run_dir, space, options, evaluator, prompts, executor, progress, stop)


def say_downloads(model: ModelRequest, space: SearchSpace, progress: Any) -> None:
    """Names what model and metrics will fetch, with sizes, before anything is fetched."""
    from tuner.config.costs import downloads_of

    for download in downloads_of(model, space.quality):
        if not download.cached:
            progress.say(f"file: {download.line}")


def kept_engine(run_dir: Path, asked: str) -> Any:
    """The choice that this run made for the same `--engine` when it started; else what is requested.

    Comparing engines again could give another result, and a study has one engine.
    """
    try:
        kept = json.loads((run_dir / CONFIG_FILE).read_text())["engine_choice"]
        choice = read_section(EngineSection, kept, "engine_choice")
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return asked
    return choice if choice.asked == asked == "auto" else asked


def _ray_executor(checked: Plan, parts: Mapping[str, object], progress: Any, stop: Callable[[], bool]) -> RayExecutor:
    """Workers that load the same model; paths must exist on every node."""
    from tuner.cluster.executor import RayExecutor
    from tuner.cluster.worker import Recipe

    args, model = checked.args, checked.model
    if model.weights and Path(model.weights).exists():
        model = dataclasses.replace(model, weights=str(Path(model.weights).resolve()))
    return RayExecutor(
        Recipe("tuner.evaluation.model_evaluator:load_evaluator", {"model": model, **parts}),
        args.ray_address,
        gpu_kind=args.gpu_kind,
        task_timeout_s=args.task_timeout,
        threads=args.threads,
        run_dir=checked.run_dir,
        say=progress.say,
        stop=stop,
    )


def plugged_versions(space: SearchSpace) -> dict[str, str]:
    """Versions of the packages whose plug-ins the study uses."""
    words = {str(value) for parameter in space.parameters for value in parameter.values}
    return {
        **plugins.versions(MODELS, {space.model}, SPECS),
        **plugins.versions(METRICS, {*space.quality}, METRIC_NAMES),
        **plugins.versions(PLUGGED_ACCELERATORS, words, ACCELERATORS),
    }


def versions() -> dict[str, str]:
    """Versions of what determines the figures, and the commit if run from a checkout."""
    found = {"python": platform.python_version(), "stagevar": __version__}
    for name in ("torch", "numpy", "optuna", "open_clip_torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        shown = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        if shown.returncode == 0:
            found["commit"] = shown.stdout.strip()
    return found
