"""`stagevar-tune`: parsing, the run directory, signals and what is printed. The work is in tuner.study.study.

No torch, optuna or open_clip is imported before all input was checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stagevar import __version__, extras
from stagevar.choices import ENGINE_OPTIONS, processors
from stagevar.console import MOST, name_value, path_value, positive_int, report_errors, whole_number
from stagevar.errors import EXIT_CODES, InfrastructureError, UsageError
from stagevar.files import check_output_folder
from stagevar.folders import visible
from stagevar.models import registry
from stagevar.profile_sections import EngineSection
from stagevar.sections import read_section, shortened
from tuner.config import checks
from tuner.config.analysis import Findings, read_analysis
from tuner.config.limits import parse_budget, parse_share, parse_time
from tuner.config.quality import composite_options, limited, parse_max_drops, quality_limits
from tuner.config.space import PROMPT_SOURCES, SearchSpace, load_space
from tuner.results.run_dir import LOCK_FILE, driver_lock, repair

if TYPE_CHECKING:
    from stagevar.profile import Profile
    from tuner.cluster.executor import RayExecutor
    from tuner.results.result import Candidate, StudyResult
    from tuner.study.study import Study

PROG = "stagevar-tune"
VERBS = ("resume", "report", "verify", "sweep", "doctor")
#: Everything that a study writes into its directory, and so all that --fresh may remove.
#: config.json comes last, so that an interrupted removal still leaves a folder that is recognised as a run.
RUN_FILES = ("trials.jsonl", "journal.log*", "study.json", "profile.yaml", "pareto.yaml", "trials.csv", "report.html")
RUN_FILES += ("images", "references", "study.name", "measurements.jsonl", "config.json")
STOPPED = 130
#: CPU threads that draw images for quality at most: the products of a small model are too small to share among many.
MOST_DRAWING_THREADS = 4
#: What every command but doctor needs beyond the base installation; metrics name what they need themselves.
_NEEDED = ("optuna", "scipy", "pandas", "rich")

_CODES = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
_EPILOG = f"""\
verbs:
  stagevar-tune resume RUN           continue a run to its original target (the same command does it too)
  stagevar-tune report RUN           write report.html, pareto.yaml and trials.csv again from study.json
  stagevar-tune verify PROFILE       measure a profile again on this machine (--max-regression 3% as a CI gate)
  stagevar-tune sweep SWEEP.yaml     one study per model, budget, seed ... on a Ray cluster, one table
  stagevar-tune doctor               check this machine

exit codes:
{_CODES}

example: stagevar-tune --model nano --budget 60%"""


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest option; exit code 2."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(shortened(f"{message} (see {self.prog} --help)"))

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, rest = self.parse_known_args(argv)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(rest[0].split("=")[0], known, n=1, cutoff=0.4)
            self.error(f"unknown option {rest[0]!r}" + (f", did you mean {near[0]}?" if near else ""))
        return args


def _tune_parser() -> _Parser:
    parser = _Parser(
        prog=PROG,
        description="Find, prove and write down the schedule with the best quality within a latency budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    _add_study_options(parser, required=True)
    parser.add_argument(
        "--analysis",
        type=path_value,
        metavar="DIR",
        help="boundaries, ranks and proposals of `stagevar analyze --out DIR`",
    )
    parser.add_argument("--trials", type=positive_int, default=30, help="distinct schedules to evaluate (default: 30)")
    parser.add_argument("--time-budget", metavar="TIME", help="tuning time, such as 10m; verification included")
    parser.add_argument(
        "--kv-cache", choices=("model", "int8"), default="model", help="8 bits halve the cache (default: the model's)"
    )
    parser.add_argument(
        "--patience", type=positive_int, default=60, metavar="N", help="end after N schedules without progress (60)"
    )
    parser.add_argument(
        "--exhaustive", action="store_true", help="time every schedule end to end and judge it on all search prompts"
    )
    parser.add_argument(
        "--out", type=path_value, metavar="DIR", help="run directory (default: outputs/MODEL-BUDGET-sSEED)"
    )
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run left in --out")
    parser.add_argument("--sampler", choices=("auto", "gp", "tpe", "random"), default="auto", help="default: auto")
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="where it runs (default: local)")
    parser.add_argument(
        "--ray-address",
        type=name_value,
        metavar="ADDRESS",
        help="cluster to join, such as auto (default: start one here)",
    )
    parser.add_argument("--gpu-kind", metavar="NAME", help="the GPUs to use where a Ray cluster has several kinds")
    parser.add_argument(
        "--task-timeout", default="30m", metavar="TIME", help="a Ray worker is stuck after (default: 30m)"
    )
    parser.add_argument(
        "--storage",
        type=name_value,
        metavar="URL",
        help="database for the trials, as postgresql://HOST/DB (default: a file)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, run nothing")
    _add_output_options(parser)
    return parser


def heldout_numbers(text: str) -> tuple[int, ...]:
    """Numbers of held-out prompts: those that a study began with, then those that were added, as "512+640"."""
    return tuple(positive_int(part) for part in text.split("+"))


def _add_study_options(parser: _Parser, required: bool) -> None:
    """Options that decide what is measured against what."""
    profiles = "the profile's"
    budget_help = "latency of one image: 2s, 800ms, or 60%% of the measured full schedule"
    models = ", ".join(model.name for model in registry.list_models())
    parser.add_argument("--model", type=name_value, required=required, help=f"one of {models}")
    parser.add_argument("--budget", "--latency-budget", required=required, metavar="LATENCY", help=budget_help)
    parser.add_argument(
        "--max-drop",
        action="append",
        metavar="[METRIC=]DROP",
        help="largest drop: 2%% for the first metric of the space, clip_score=0.3 for another; may be repeated "
        "(default: the space's)",
    )
    sources = ", ".join(PROMPT_SOURCES)
    parser.add_argument(
        "--prompts",
        metavar="N|SOURCE[:N]|FILE",
        help=f"search prompts: how many, {sources} (geneval:64), a file (.txt, .jsonl, .json, .csv), or a folder of .txt",
    )
    parser.add_argument(
        "--heldout",
        type=heldout_numbers,
        metavar="N[+N]",
        help="held-out prompts that verify at most; more of them continue a run (with geneval as 512+640: 640 added)",
    )
    parser.add_argument("--seed", type=whole_number, default=0, help="of prompts, noise and sampler (default: 0)")
    parser.add_argument(
        "--space", type=path_value, metavar="FILE", help="search space, or what of it differs from the model's default"
    )
    parser.add_argument("--weights", type=name_value, help="path, or 'random' for seeded random weights (latency only)")
    parser.add_argument("--resolution", help="pixel budget (0.25M, 1M ...) or image side, where a model has several")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=1 if required else None,
        help=f"CPU threads of a latency, pinned while timing (default: {'1' if required else profiles})",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINE_OPTIONS,
        default="auto" if required else None,
        help="what latency is timed on, and deployed with (default: auto, the fastest that draws the same images)"
        if required
        else "what latency is timed on (default: the profile's)",
    )


def _add_output_options(parser: _Parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress; the result only")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _verb_parser(verb: str) -> _Parser:
    parser = _Parser(prog=f"{PROG} {verb}")
    if verb in ("resume", "report"):
        parser.add_argument("run_dir", type=path_value, metavar="RUN", help="run directory")
    if verb == "verify":
        parser.add_argument("profile", type=path_value, help="profile.yaml of a run")
        parser.add_argument(
            "--max-regression", metavar="SHARE", help="fail when this much slower than recorded, as 3%%"
        )
        _add_study_options(parser, required=False)
        parser.set_defaults(seed=None)
    if verb == "sweep":
        parser.add_argument(
            "sweep", type=path_value, metavar="SWEEP.yaml", help="models, budgets, seeds and more (docs/cluster.md)"
        )
        parser.add_argument(
            "--out", type=path_value, metavar="DIR", help="folder that all nodes share (default: outputs/SWEEP)"
        )
        parser.add_argument(
            "--ray-address",
            type=name_value,
            metavar="ADDRESS",
            help="cluster to join, such as auto (default: one here)",
        )
    if verb == "doctor":
        parser.add_argument(
            "--out", type=path_value, default=Path("outputs"), help="where runs would go (default: outputs)"
        )
        parser.add_argument("--model", type=name_value, help="also the memory and files that this model needs")
        parser.add_argument("--weights", type=name_value, help="with --model: path, or 'random'")
        parser.add_argument("--device", default="auto", help="with --model: auto, cpu, cuda, cuda:N (default: auto)")
    _add_output_options(parser)
    return parser


# ------------------------------------------------------------------------------------------------ entry


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes as in --help; 130 when stopped at once by a second Ctrl-C."""
    return report_errors(PROG, lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        if argv[0] not in VERBS:
            near = difflib.get_close_matches(argv[0], VERBS, n=1, cutoff=0.0)[0]
            raise UsageError(f"unknown verb {argv[0]!r} (nearest: {near}); tuning needs none: {PROG} --model ...")
        args = _verb_parser(argv[0]).parse(argv[1:])
        if argv[0] != "doctor":
            extras.require(f"{PROG} {argv[0]}", *_NEEDED)
        verbs = {
            "resume": run_resume,
            "report": run_report,
            "verify": run_verify,
            "sweep": run_sweep,
            "doctor": run_doctor,
        }
        return verbs[argv[0]](args)
    args = _tune_parser().parse(argv)
    extras.require(PROG, *_NEEDED)
    return run_tune(args, argv)


class Interrupts:
    """Ctrl-C once asks the study to finish its round and write everything; twice stops now."""

    def __init__(self, say: Callable[[str], None]):
        self.asked, self._say = False, say

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._say("finishing this round and writing everything; Ctrl-C again stops now")

    def __call__(self) -> bool:
        return self.asked


# ------------------------------------------------------------------------------------------------ tune


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked command line."""

    args: argparse.Namespace
    space: SearchSpace
    run_dir: Path
    command: str


def plan(args: argparse.Namespace, argv: Sequence[str]) -> Plan:
    """Checks everything that can be checked without loading a model. Raises UsageError."""
    args.budget = parse_budget(args.budget)
    args.time_budget = parse_time(args.time_budget) if args.time_budget else None
    registry.find(args.model)
    run_dir = args.out or Path("outputs") / checks.run_name(args.model, args.budget.text, args.seed)
    check_placement(args, run_dir)
    checks.check_running(
        args.model,
        device=args.device,
        threads=args.threads if args.executor == "local" else None,
        engine=args.engine,
        resolution=args.resolution,
        weights=args.weights,
    )
    findings = checked_findings(args)
    space = checked_space(args.model, args.space, args.prompts, args.heldout, args.seed, args.resolution, findings)
    args.max_drop = parse_max_drops(args.max_drop or (), space.quality)
    check_provable(space, args.max_drop, args.weights)
    from tuner.config.prompts import warn_of_short_files

    warn_of_short_files(space.prompts)
    check_output_folder(run_dir)
    check_strangers(run_dir)
    words = [a for a in argv if a not in ("--fresh", "--quiet", "--json")]
    command = shlex.join([PROG, *checks.with_absolute_paths(words, [Path.cwd()])])
    return Plan(args, space, run_dir, command)


def checked_findings(args: argparse.Namespace) -> Findings | None:
    """What --analysis found, where it is of the model, resolution and weights that are tuned. Raises UsageError."""
    if args.analysis is None:
        return None
    findings = read_analysis(args.analysis)
    known = registry.find(args.model).scales is not None
    findings.check(args.model, args.weights, registry.scale_grids(args.model, args.resolution) if known else None)
    return findings


def checked_space(
    model: str,
    file: Path | None,
    prompts: str | None,
    heldout: Sequence[int] | None,
    seed: int,
    resolution: str | int | None = None,
    findings: Findings | None = None,
) -> SearchSpace:
    """The space of a file (the model's for None) with the prompts asked for, all checked. Raises UsageError."""
    space = load_space(model, file, resolution, findings)
    folders = [Path.cwd()] if file is None else [file.absolute().parent, Path.cwd()]
    space = checks.with_absolute_source(space, folders)
    space = checks.with_absolute_source(with_prompts(space, prompts, heldout), [Path.cwd()])
    checks.check_prompts_of(space, seed)
    checks.check_metric_options(space)
    return space


def check_provable(space: SearchSpace, max_drop: Mapping[str, float], weights: str | None) -> None:
    """What the verdict needs: the metrics' packages, and prompts that prove the limits at least where no image changes.

    Raises UsageError.
    """
    if weights == "random":  # only latency is judged
        return
    from tuner.config.prompts import set_sizes
    from tuner.metrics.registry import check_packages
    from tuner.statistics.provable import floor_shortfalls, shortfalls

    for metric in (*space.quality, *space.floors):
        check_packages(metric)
    limits = quality_limits(space.quality, max_drop)
    size = set_sizes(space.prompts)[1], space.prompts.micro_batch
    missing = [*shortfalls(limits, *size), *floor_shortfalls(space.floors, *size)]
    if missing:
        raise UsageError(f"{'; '.join(missing)}; raise --heldout (and add prompts to a file), or loosen --max-drop")


def check_placement(args: argparse.Namespace, run_dir: Path) -> None:
    """Checks the options that say where work runs and where trials are kept. Raises UsageError."""
    args.task_timeout = parse_time(args.task_timeout)
    if args.executor == "ray":
        from tuner.cluster.executor import check_installed

        check_installed()
        if args.ray_address is not None:
            checks.check_ray_address(args.ray_address)
    elif args.ray_address or args.gpu_kind:
        raise UsageError("--ray-address and --gpu-kind need --executor ray")
    if args.storage is not None:
        checks.check_storage(args.storage, run_dir)


def with_prompts(space: SearchSpace, prompts: str | None, heldout: Sequence[int] | None) -> SearchSpace:
    """The space with the prompts that the command line asks for: a number, a source or a file, and how many to hold out."""
    source = space.prompts
    if prompts is not None:
        source = dataclasses.replace(source, **_asked_prompts(prompts))
    if heldout is not None:
        source = dataclasses.replace(source, heldout=sum(heldout), added=tuple(heldout[1:]))
    return dataclasses.replace(space, prompts=source)


def _asked_prompts(text: str) -> dict[str, Any]:
    """Fields of a PromptSource from `--prompts`: "64", "geneval", "geneval:128" or a file. Raises UsageError."""
    name, colon, count = text.partition(":")
    number = count if name in PROMPT_SOURCES and colon else text
    if number.isdecimal() and number.isascii():
        if len(number) > 7 or not 1 <= int(number) <= MOST:
            raise UsageError(f"prompts {text!r:.60} must be a number from 1 to {MOST}, a source or a file")
        return {"search": int(number), **({"source": name} if number != text else {})}
    if name in PROMPT_SOURCES:
        if colon:
            raise UsageError(f"prompts {text!r}: {count!r} must be a number of at least 1, such as {name}:64")
        return {"source": name}
    if not (os.path.isfile(text) or os.path.isdir(text)):  # a pipe could be read only once
        sources = ", ".join(PROMPT_SOURCES)
        raise UsageError(
            f"prompts {text!r:.200} is neither a number nor a file or folder that exists, nor one of {sources} (as in "
            "geneval:64)"
        )
    return {"source": text}


def prepare(run_dir: Path) -> None:
    """Makes the run directory. Raises UsageError when it cannot be written or holds something else."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"output {run_dir} cannot be written: {reason}; choose another --out") from None
    check_strangers(run_dir)


def check_strangers(run_dir: Path) -> None:
    """Raises UsageError for a folder that holds something else than a run; names that systems hide do not count."""
    if not run_dir.is_dir():
        return
    strangers = [p.name for p in visible(run_dir.iterdir()) if p.name != LOCK_FILE]
    if strangers and not (run_dir / "config.json").exists():
        raise UsageError(f"output {run_dir} is not empty and holds no run ({strangers[0]}); choose another --out")


def discard(run_dir: Path) -> None:
    """Removes what an earlier study wrote, nothing else."""
    for pattern in RUN_FILES:
        for path in run_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_tune(args: argparse.Namespace, argv: Sequence[str], again: bool = False) -> int:
    """Runs or continues a study and prints its verdict. again: where timings did not decide, they are taken anew."""
    checked = plan(args, argv)
    if args.dry_run:
        return _print_plan(checked)
    prepare(checked.run_dir)
    with driver_lock(checked.run_dir):
        if args.fresh:
            discard(checked.run_dir)
        return _drive(checked, again)


def _finished(checked: Plan, again: bool) -> StudyResult | None:
    """The stored result when this very command already ran to its end; the caller has compared the identities."""
    from tuner.results.result import STUDY_FILE, StudyResult

    if not (checked.run_dir / STUDY_FILE).exists():
        return None
    result = StudyResult.load(checked.run_dir)
    if result.command != checked.command or result.verdict == "partial" or (again and _times_undecided(result)):
        return None
    return result


def _times_undecided(result: StudyResult) -> bool:
    """Whether the timings left a study open, so that measuring again may end it."""
    if result.verdict != "inconclusive" or not result.nearest:
        return False
    check = result.candidate(result.nearest[0]).verification
    return check is not None and check.times_open


def _drive(checked: Plan, again: bool) -> int:
    from tuner.study.progress import Progress

    args = checked.args
    progress = Progress(args.quiet)
    with Interrupts(progress.say) as interrupts:
        try:
            for line in repair(checked.run_dir):
                progress.say(line)
            progress.phase("load")
            study = build_study(checked, progress, interrupts)
            try:
                study.check_identity()
                result = _finished(checked, again)
                if result is not None:
                    progress.close()
                    return _announce(result, checked.run_dir, _write(result, checked.run_dir), args)
                result = study.run()
            finally:
                study.executor.close()
            progress.phase("report")
            written = _write(result, checked.run_dir)
            progress.close()
        except KeyboardInterrupt:
            progress.close()
            print(f"{PROG}: stopped; the same command continues", file=sys.stderr)
            return STOPPED
        except BaseException:
            progress.close()
            raise
    result = dataclasses.replace(result, phases_s={**progress.seconds, **progress.parts})
    result.save(checked.run_dir)
    return _announce(result, checked.run_dir, written, args)


def build_study(checked: Plan, progress: Any, stop: Callable[[], bool]) -> Study:
    """Loads model, prompts and metrics."""
    from tuner.config.prompts import load_prompts
    from tuner.evaluation.evaluator import fitting_micro_batch, load_evaluator
    from tuner.study.search import EXHAUSTIVE, Savings
    from tuner.study.study import Options, Study

    args, space = checked.args, checked.space
    place = {"weights": args.weights, "resolution": args.resolution, "device": args.device}
    if args.executor == "local":
        size = fitting_micro_batch(args.model, space.prompts.micro_batch, **place)
        if size < space.prompts.micro_batch:
            progress.say(f"micro-batches of {size} instead of {space.prompts.micro_batch} images fit the memory here")
            space = dataclasses.replace(space, prompts=dataclasses.replace(space.prompts, micro_batch=size))
    prompts = load_prompts(space.prompts, args.seed)
    say_downloads(args.model, space, {**place, "kv_cache": args.kv_cache}, progress)
    quality = composite_options(space.quality, quality_limits(space.quality, args.max_drop))
    parts = {"model": args.model, "prompts": prompts, "quality": quality, "floors": space.floors}
    parts |= {"weights": args.weights, "device": args.device, "threads": args.threads, "resolution": args.resolution}
    parts |= {"engine": kept_engine(checked.run_dir, args.engine), "kv_cache": args.kv_cache}
    if args.executor == "ray":
        executor = _ray_executor(checked, parts, progress)
        evaluator = executor.evaluator
    else:
        drawing = max(args.threads, min(MOST_DRAWING_THREADS, len(processors()) or 1))
        if args.threads == 1:
            # Before torch is loaded: threads that wait asleep, not spinning, lose little beside a busy process. Timings on
            # several threads are left as a deployment has them.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        local = {"drawing_threads": drawing, "references_dir": checked.run_dir / "references"}
        executor, evaluator = None, load_evaluator(**parts, **local)
    options = Options(
        args.budget,
        max_drop=args.max_drop,
        trials=args.trials,
        time_budget_s=args.time_budget,
        seed=args.seed,
        sampler=args.sampler,
        storage=args.storage,
        command=checked.command,
        versions=versions(),
        patience=args.patience,
        savings=EXHAUSTIVE if args.exhaustive else Savings(),
    )
    return Study(checked.run_dir, space, options, evaluator, prompts, executor, progress, stop)


def say_downloads(model: str, space: SearchSpace, place: dict[str, Any], progress: Any) -> None:
    """Names what model and metrics are about to fetch, with sizes, while nothing has been fetched yet."""
    from tuner.config.costs import downloads_of

    for download in downloads_of(model, space.quality, place):
        if not download.cached:
            progress.say(f"file: {download.line}")


def kept_engine(run_dir: Path, asked: str) -> Any:
    """The choice that this run made for the same `--engine` when it began; else what is asked for.

    Comparing engines again could end otherwise, and a study has one engine.
    """
    try:
        kept = json.loads((run_dir / "config.json").read_text())["engine_choice"]
        choice = read_section(EngineSection, kept, "engine_choice")
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return asked
    return choice if choice.asked == asked == "auto" else asked


def _ray_executor(checked: Plan, parts: dict[str, Any], progress: Any) -> RayExecutor:
    """Workers that load the same model; paths must exist on every node."""
    from tuner.cluster.executor import RayExecutor, Recipe

    args = checked.args
    if args.weights and Path(args.weights).exists():
        parts["weights"] = str(Path(args.weights).resolve())
    return RayExecutor(
        Recipe("tuner.evaluation.evaluator:load_evaluator", parts),
        args.ray_address,
        gpu_kind=args.gpu_kind,
        task_timeout_s=args.task_timeout,
        threads=args.threads,
        run_dir=checked.run_dir,
        say=progress.say,
    )


def versions() -> dict[str, str]:
    """Versions of what decides the figures, and the commit when run from a checkout."""
    found = {"python": platform.python_version(), "stagevar": __version__}
    for name in ("torch", "numpy", "optuna", "open_clip_torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        shown = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        if shown.returncode == 0:
            found["commit"] = shown.stdout.strip()
    return found


def _write(result: StudyResult, run_dir: Path) -> list[Path]:
    """Everything that is derived from study.json."""
    from tuner.report.export import export
    from tuner.report.page import write_report

    return [*export(result, run_dir), write_report(result, run_dir)]


def _print_plan(checked: Plan) -> int:
    from tuner.config import costs
    from tuner.config.prompts import set_sizes
    from tuner.statistics.provable import limit_lines, limits_table

    space, args = checked.space, checked.args
    limits = () if args.weights == "random" else quality_limits(space.quality, args.max_drop)
    (search, heldout), micro_batch = set_sizes(space.prompts), space.prompts.micro_batch
    place = {"weights": args.weights, "resolution": args.resolution, "device": args.device, "kv_cache": args.kv_cache}
    downloads, memory = costs.downloads_of(args.model, space.quality, place), costs.memory_plan(space, place)
    plan_data = {
        "model": args.model,
        "budget": args.budget.text,
        "engine": args.engine,
        "space": {"source": str(args.space or "default"), **space.to_data()},
        "prompts": {"source": space.prompts.source, "search": search, "heldout": heldout},
        "limits": limits_table(limits, heldout, micro_batch),
        "without_limit": [m.metric for m in limits if m.max_drop is None],
        "run_directory": str(checked.run_dir),
        "schedules": args.trials,
        "enqueued": ["the full schedule", *space.known],
        "searched": [p.name for p in space.parameters],
        "micro_batch": micro_batch,
        "settings": costs.settings_of(space),
        "images_at_most": 0 if args.weights == "random" else costs.images_at_most(args.trials, search, heldout),
        "downloads": [dataclasses.asdict(download) for download in downloads],
        "memory": memory,
    }
    if args.json:
        print(json.dumps(plan_data, indent=2))
    else:
        for key, value in plan_data.items():
            if key == "limits":
                for line in limit_lines(limits, heldout, micro_batch) or ["none: random weights have no quality"]:
                    print(f"{'limit':<16} {line}")
                continue
            if key in ("without_limit", "searched"):
                continue
            if key == "space":
                for line in _space_lines(value):
                    print(line)
                continue
            if key == "downloads":
                for download in downloads:
                    print(f"{'file':<16} {download.line}")
                continue
            if key == "memory":
                value = costs.memory_line(memory) if memory else "fits anywhere"
            if key in ("settings", "images_at_most"):
                value = "no end: a parameter is continuous" if value is None else f"{value:,}"
            if isinstance(value, dict):
                value = [f"{name} {entry}" for name, entry in value.items()]
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{key.replace('_', ' '):<16} {text}")
        print("dry run: nothing was loaded, measured or written")
    return 0


def _space_lines(space: Mapping[str, Any]) -> list[str]:
    """Where the space comes from, and every searched parameter with its values."""
    lines = [f"{'space':<16} {space['source']}; structure stage from scale {space['semantic_end']}"]
    for name, values in space["parameters"].items():
        text = ", ".join(map(str, values)) if isinstance(values, list) else f"{values['low']} to {values['high']}"
        lines.append(f"  {name:<14} {text}")
    floors = space["constraints"]["floors"]
    return [*lines, *(f"  {'floor':<14} {metric} {value:g}" for metric, value in floors.items())]


def _announce(result: StudyResult, run_dir: Path, written: Sequence[Path], args: argparse.Namespace) -> int:
    """Prints the verdict: one line each for speed, quality, time and files, then what it means and what to do next."""
    from tuner.report.next_steps import next_steps
    from tuner.report.words import describe
    from tuner.results.result import to_plain

    pick, following = result.pick, next_steps(result, run_dir, shlex.split(result.command))
    if args.json:
        summary = {
            "verdict": result.verdict,
            "exit_code": result.exit_code,
            "reason": result.reason,
            "picks": result.picks,
            "nearest": list(result.nearest),
            "speedup": _bounds(pick, "speedup") if pick is not None else None,
            "quality_change": _bounds(pick, "quality") if pick is not None else None,
            "metrics": [] if pick is None else _metrics(result, pick),
            "baseline_ms": result.baseline.latency.median_ms if result.baseline.latency else None,
            "budget_ms": None if result.budget_ms != result.budget_ms else result.budget_ms,
            "schedules": len(result.candidates),
            "sampled": result.sampled,
            "phases_s": result.phases_s,
            "files": [str(path) for path in written],
            "next": dataclasses.asdict(following),
        }
        print(json.dumps(to_plain(summary), indent=2))
        return result.exit_code
    print(f"{result.verdict.replace('_', ' ')}: {result.reason}")
    if result.baseline.latency:
        full_ms = result.baseline.latency.median_ms  # the one that a budget in per cent is a share of, and the report's
        budget = f"budget {result.budget} = {result.budget_ms:.1f} ms"
        print(f"full schedule    {full_ms:.1f} ms, {budget} ({result.engine} engine)")
    if result.engine_choice is not None and result.engine_choice.tried:
        print(f"engine           {result.engine}: {result.engine_choice.reason}")
    if pick is not None and pick is not result.baseline:
        print(f"schedule         {describe(pick.steps)}")
        print(f"speed-up         {_speedup(pick)}")
        for metric in _metrics(result, pick):
            mean, low, high = metric["change"]
            limit = f", limit -{metric['max_drop']:g}" if metric["max_drop"] is not None else ""
            bound = f"; drop at most {metric['drop_upper']:.3g}" if metric["drop_upper"] is not None else ""
            what = (
                f"{mean:+.3g} [{low:+.3g}, {high:+.3g}] {metric['unit']} on {metric['prompts']} prompts{bound}{limit}"
            )
            print(f"{metric['metric']:<16} {what}")
    whole = result.picks.get("no_skip")
    if whole and whole != result.picks.get("pick"):
        best = result.candidate(whole)
        print(f"without skips    {_speedup(best)}, {_change(result, best)}")
    for key in result.nearest:
        near = result.candidate(key)
        print(f"nearest          {_speedup(near)}, {_change(result, near)}: {describe(near.steps)}")
    tried = f"{len(result.candidates)} besides the full one, {result.sampled} of them not enqueued"
    print(f"schedules        {tried}; {result.stop_reason}")
    print("seconds          " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.phases_s.items()))
    for path in written:
        print(f"file             {path}")
    if following.lines:
        print()
    for line in following.lines:
        print(line)
    return result.exit_code


def _bounds(candidate: Candidate, what: str) -> list[float] | None:
    """[estimate, low, high] of the speed-up or of the quality change; None for the full schedule itself."""
    latency, change = candidate.best_latency, candidate.best_differences.get("quality")
    if what == "speedup" and latency is not None and latency.ratio is not None:
        return [1 / latency.ratio.mean, 1 / latency.ratio.high, 1 / latency.ratio.low]
    return [change.mean, change.low, change.high] if what == "quality" and change is not None else None


def _speedup(candidate: Candidate) -> str:
    ratio = candidate.best_latency.ratio
    return f"{1 / ratio.mean:.2f}x [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]"


def _metrics(result: StudyResult, candidate: Candidate) -> list[dict[str, Any]]:
    """Per metric: unit, paired change [estimate, low, high], bound of the drop where it was verified, and limit."""
    verdicts = {v.name: v for v in candidate.verification.verdicts} if candidate.verification else {}
    rows = []
    for limit in result.limits:
        change, verdict = candidate.best_differences.get(limit.metric), verdicts.get(limit.name)
        if change is None:
            continue
        row = {"metric": limit.metric, "unit": limit.unit, "change": [change.mean, change.low, change.high]}
        row |= {"prompts": change.n, "drop_upper": verdict and verdict.bound, "max_drop": limit.max_drop}
        rows.append(row | {"status": verdict and verdict.status})
    return rows


def _change(result: StudyResult, candidate: Candidate) -> str:
    changes = [
        f"{m.metric} {d.mean:+.3g} [{d.low:+.3g}, {d.high:+.3g}] on {d.n} prompts"
        for m in limited(result.limits)
        if (d := candidate.best_differences.get(m.metric)) is not None
    ]
    return ", ".join(changes) or "quality not measured"


# ------------------------------------------------------------------------------------------------ verbs


def run_resume(args: argparse.Namespace) -> int:
    """Runs the command that a run directory was started with."""
    path = args.run_dir / "config.json"
    try:
        words = shlex.split(json.loads(path.read_text())["command"])[1:]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{args.run_dir} holds no run that could be resumed (no readable config.json)") from None
    # Runs of before have relative paths, from a working directory that is not known: often that of the run itself.
    words = checks.with_absolute_paths(words, [Path.cwd(), *args.run_dir.absolute().parents])
    parsed = _tune_parser().parse(words)
    parsed.out, parsed.quiet, parsed.json = args.run_dir, args.quiet, args.json
    return run_tune(parsed, words, again=True)


def run_report(args: argparse.Namespace) -> int:
    """Writes the derived files of a run again."""
    from tuner.results.result import StudyResult

    result = StudyResult.load(args.run_dir)
    written = _write(result, args.run_dir)
    _announce(result, args.run_dir, written, args)
    return 0


def kept_max_drops(profile: Profile, given: argparse.Namespace | None, space: SearchSpace) -> dict[str, float]:
    """The limits that a profile was made under, of the metrics that the space has; old profiles say them in their command."""
    stated = profile.constraints.max_drop
    if isinstance(stated, Mapping):
        return {metric: value for metric, value in stated.items() if metric in space.quality}
    return parse_max_drops((given.max_drop if given is not None else None) or (), space.quality)


def run_verify(args: argparse.Namespace) -> int:
    """Measures a profile again here, against the full schedule in the same run."""
    from stagevar.profile import Profile

    profile = Profile.load(args.profile)
    words = shlex.split(profile.reproduce)[1:]
    words = checks.with_absolute_paths(words, [Path.cwd(), *args.profile.absolute().parents])
    given = _tune_parser().parse(words) if words else None
    for name in ("model", "budget", "prompts", "heldout", "seed", "space", "weights"):
        if getattr(args, name) is None and given is not None:
            setattr(args, name, getattr(given, name))
    args.model = args.model or profile.model.name
    if args.budget is None:
        raise UsageError(f"profile {args.profile} does not say how it was made; give --budget")
    from tuner.results.result import to_plain
    from tuner.study.progress import Progress
    from tuner.study.verify_profile import recheck

    share = parse_share(args.max_regression, "max-regression") if args.max_regression else None
    budget = parse_budget(args.budget)
    checks.check_running(
        args.model,
        device=args.device,
        threads=args.threads,
        engine=args.engine,
        weights=args.weights,
    )  # the resolution is checked with the profile's options, before loading too
    made_at = profile.model.load.given().get("resolution") if args.model == profile.model.name else None
    resolution = args.resolution or made_at
    space = checked_space(args.model, args.space, args.prompts, args.heldout, args.seed or 0, resolution)
    max_drop = kept_max_drops(profile, given, space) | parse_max_drops(args.max_drop or (), space.quality)
    check_provable(space, max_drop, args.weights)
    progress = Progress(args.quiet)
    place = {"weights": args.weights, "device": args.device, **profile.model.load.given()}
    place |= {} if args.resolution is None else {"resolution": args.resolution}
    say_downloads(profile.model.name, space, place, progress)
    outcome = recheck(
        profile,
        space,
        budget,
        quality_limits(space.quality, max_drop),
        share,
        args.seed or 0,
        args.weights,
        args.device,
        args.threads or profile.envelope.threads or 1,
        progress,
        args.engine or profile.envelope.engine,
        args.resolution,
    )
    if args.json:
        print(json.dumps(to_plain(outcome.to_dict()), indent=2))
    else:
        for line in outcome.lines:
            print(line)
    return outcome.exit_code


def check(argv: Sequence[str]) -> Plan:
    """A tuning command line checked without running it. Raises UsageError."""
    return plan(_tune_parser().parse(argv), argv)


def run_sweep(args: argparse.Namespace) -> int:
    """Runs or continues a sweep; exit code 4 when every cell failed, 6 when one lost what it ran on."""
    from tuner.cluster import sweep

    cells = sweep.load_sweep(args.sweep).cells()
    if args.ray_address is not None:
        checks.check_ray_address(args.ray_address)
    sweep.check_cells(cells)
    out = args.out or Path("outputs") / args.sweep.stem
    say = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))
    rows = sweep.run_sweep(cells, out, args.ray_address, say=say)
    failed = [row for row in rows if row["verdict"] == "failed"]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            gain = f", {row['speedup']:.2f}x" if row.get("speedup") else ""
            print(f"{row['cell']:<32} {row['verdict'].replace('_', ' ')}{gain}")
        for row in failed:
            print(f"failed           {row['cell']}: {row.get('reason')}")
        for name in (sweep.TABLE_FILE, sweep.REPORT_FILE):
            print(f"file             {out / name}")
    if any(row.get("exit_code") == InfrastructureError.exit_code for row in failed):
        return InfrastructureError.exit_code
    return 4 if len(failed) == len(rows) else 0


def run_doctor(args: argparse.Namespace) -> int:
    """Prints one line per check; exit code 1 when a study cannot run here."""
    from tuner.doctor import examine

    findings = examine(args.out, args.model, args.weights, args.device)
    if args.json:
        print(json.dumps([dataclasses.asdict(f) for f in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:<5}{finding.text}")
    return 1 if any(f.state == "fail" for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
