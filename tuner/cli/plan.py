"""A tuning command line, checked as far as it can be without loading a model."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from stagevar.cli.arguments import MOST
from stagevar.errors import UsageError
from stagevar.files import check_output_folder
from stagevar.models import registry
from stagevar.models.request import ModelRequest
from tuner.cli.options import PROG
from tuner.config import checks
from tuner.config.analysis import Findings, read_analysis
from tuner.config.limits import parse_budget, parse_time
from tuner.config.quality import parse_max_drops, quality_limits
from tuner.config.space import PROMPT_SOURCES, PromptSource, SearchSpace
from tuner.config.space_file import load_space
from tuner.results.run_dir import check_strangers
from tuner.study.options import FULL_TRIALS, QUICK_TRIALS

#: Options that change what is printed or what happens to an earlier run, but no figure.
_NOT_OF_THE_STUDY = ("--fresh", "--quiet", "--verbose", "--json")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked command line.

    Args:
        args: its options, with budget and limits parsed.
        model: the model to tune.
        space: what is searched.
        run_dir: where the run is kept.
        command: the same command, valid in any working directory.
    """

    args: argparse.Namespace
    model: ModelRequest
    space: SearchSpace
    run_dir: Path
    command: str


def plan(args: argparse.Namespace, argv: Sequence[str], here: bool = True) -> Plan:
    """Checks everything that can be checked without loading a model. Raises UsageError.

    Unless the study runs `here`, as a sweep's cells do not, this machine's devices and processors do not matter.
    """
    args.budget = parse_budget(args.budget)
    args.time_budget = parse_time(args.time_budget) if args.time_budget else None
    model = model_request(args)
    registry.find(model.name)
    run_dir = args.out or Path("outputs") / checks.run_name(args.model, args.budget.text, args.seed)
    check_effort(args)
    check_placement(args, run_dir)
    checks.check_running(model, threads=args.threads, engine=args.engine, here=here and args.executor == "local")
    findings = checked_findings(args)
    space = checked_space(args.model, args.space, args.prompts, args.heldout, args.seed, args.resolution, findings)
    space = with_earlier(space, args.start_from, args.resolution)
    check_searchable(space)
    args.store = store_folder(args.store)
    args.max_drop = parse_max_drops(args.max_drop or (), space.quality)
    check_provable(space, args.max_drop, args.weights, error_share_of(args.effort))
    from tuner.config.prompts import warn_of_short_files

    warn_of_short_files(space.prompts)
    check_output_folder(run_dir)
    check_strangers(run_dir)
    if not args.fresh:
        from tuner.study.identity import check_asked

        check_asked(run_dir, args.seed, args.budget.text)
    words = [a for a in argv if a not in _NOT_OF_THE_STUDY and not re.fullmatch("-[vq]+", a)]
    command = shlex.join([PROG, *checks.with_absolute_paths(words, [Path.cwd()])])
    return Plan(args, model, space, run_dir, command)


def model_request(args: argparse.Namespace) -> ModelRequest:
    """The model that the options ask for."""
    return ModelRequest(
        args.model, weights=args.weights, resolution=args.resolution, device=args.device, kv_cache=args.kv_cache
    )


def checked_findings(args: argparse.Namespace) -> Findings | None:
    """What --analysis found. Raises UsageError if it is of another model, resolution or weights."""
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
    """The space in a file (the model's for None) with the requested prompts, all checked. Raises UsageError."""
    space = load_space(model, file, resolution, findings)
    folders = [Path.cwd()] if file is None else [file.absolute().parent, Path.cwd()]
    space = checks.with_absolute_source(space, folders)
    space = checks.with_absolute_source(with_prompts(space, prompts, heldout), [Path.cwd()])
    checks.check_prompts_of(space, seed)
    if file is not None:  # the shipped ones are tested, and a metric's module takes seconds to import
        checks.check_metric_options(space)
    return space


def with_earlier(space: SearchSpace, earlier: Path | None, resolution: str | int | None) -> SearchSpace:
    """The space with the schedules of --from proposed before everything else. Raises UsageError."""
    if earlier is None:
        return space
    from tuner.results.earlier import earlier_schedules

    known = registry.find(space.model).scales is not None
    grids = registry.scale_grids(space.model, resolution) if known else None
    named = earlier_schedules(earlier, space.model, grids)
    others = tuple((name, schedule) for name, schedule in space.proposals if name not in named)
    space = dataclasses.replace(space, proposals=(*named.items(), *others))
    if grids is not None:
        space.fit(grids)
    return space


def store_folder(asked: Path | None) -> Path | None:
    """The folder of `--store`, else of STAGEVAR_STORE, else None. Raises UsageError if it cannot be written."""
    named = asked or Path(os.environ.get("STAGEVAR_STORE") or "")
    if named == Path(""):
        return None
    return check_output_folder(named, "--store" if asked else "STAGEVAR_STORE").absolute()


def check_searchable(space: SearchSpace) -> None:
    """Raises UsageError for a metric that is too slow to judge every trial of a search."""
    from tuner.metrics.registry import declaration_of

    for metric in (*space.quality, *space.floors):
        if declaration_of(metric).verification_only:
            raise UsageError(
                f"metric {metric} is for verification only: remove it from the search space; use it with stagevar-tune verify "
                f"PROFILE --space SPACE.yaml or stagevar-eval --metric {metric}"
            )


def error_share_of(effort: str) -> float:
    """The share of a judgment's error that claims about the first finalist may make."""
    from tuner.statistics.looks import TURN_SHARE

    return TURN_SHARE if effort == "quick" else 1.0


def check_provable(
    space: SearchSpace, max_drop: Mapping[str, float], weights: str | None, error_share: float = 1.0
) -> None:
    """Checks what the verdict needs: packages and files of metrics, and enough prompts to prove the limits if no image changes.

    Raises UsageError.
    """
    if weights == "random":  # only latency is judged
        return
    from tuner.config.prompts import set_sizes
    from tuner.metrics.downloads import check_files
    from tuner.metrics.registry import check_packages
    from tuner.statistics.provable import floor_shortfalls, shortfalls

    for metric in (*space.quality, *space.floors):
        check_packages(metric)
    for metric, spec in space.quality.items():
        check_files(metric, spec.options)
    limits = quality_limits(space.quality, max_drop)
    size = set_sizes(space.prompts)[1], space.prompts.micro_batch
    missing = [*shortfalls(limits, *size, error_share), *floor_shortfalls(space.floors, *size, error_share)]
    if missing:
        raise UsageError(f"{'; '.join(missing)}; raise --heldout (and add prompts to a file), or loosen --max-drop")


def check_effort(args: argparse.Namespace) -> None:
    """Fills in how many schedules are evaluated, and the most. Raises UsageError for contradictory options."""
    if args.exhaustive:
        if args.effort == "instant":
            raise UsageError("--exhaustive judges every schedule, --effort instant none; leave out one of them")
        args.effort = "full"
    few = args.trials is None and args.effort == "quick" and args.weights != "random"
    if args.trials is None:
        args.trials = QUICK_TRIALS if few else FULL_TRIALS
    args.most_trials = FULL_TRIALS if few else args.trials


def check_placement(args: argparse.Namespace, run_dir: Path) -> None:
    """Checks the options that say where work runs and where trials are kept. Raises UsageError."""
    args.task_timeout = parse_time(args.task_timeout)
    if args.executor == "ray":
        from tuner.cluster.connection import check_installed

        check_installed()
        if args.ray_address is not None:
            checks.check_ray_address(args.ray_address)
    elif args.ray_address or args.gpu_kind:
        raise UsageError("--ray-address and --gpu-kind need --executor ray")
    if args.storage is not None:
        checks.check_storage(args.storage, run_dir)


def with_prompts(space: SearchSpace, prompts: str | None, heldout: Sequence[int] | None) -> SearchSpace:
    """The space with the prompts that the command line asks for: a number, source or file, and how many to hold out."""
    source = space.prompts
    if prompts is not None:
        source = _asked_prompts(source, prompts)
    if heldout is not None:
        source = dataclasses.replace(source, heldout=sum(heldout), added=tuple(heldout[1:]))
    return dataclasses.replace(space, prompts=source)


def _asked_prompts(source: PromptSource, text: str) -> PromptSource:
    """The source as changed by `--prompts`: "64", "geneval", "geneval:128" or a file. Raises UsageError."""
    name, colon, count = text.partition(":")
    number = count if name in PROMPT_SOURCES and colon else text
    if number.isdecimal() and number.isascii():
        if len(number) > 7 or not 1 <= int(number) <= MOST:
            raise UsageError(f"prompts {text!r:.60} must be a number from 1 to {MOST}, a source or a file")
        return dataclasses.replace(source, search=int(number), source=source.source if number == text else name)
    if name in PROMPT_SOURCES:
        if colon:
            raise UsageError(f"prompts {text!r}: {count!r} must be a number of at least 1, such as {name}:64")
        return dataclasses.replace(source, source=name)
    if not (os.path.isfile(text) or os.path.isdir(text)):  # a pipe can be read only once
        sources = ", ".join(PROMPT_SOURCES)
        raise UsageError(
            f"prompts {text!r:.200} is neither a number nor a file or folder that exists, nor one of {sources} (as in "
            "geneval:64)"
        )
    return dataclasses.replace(source, source=text)
