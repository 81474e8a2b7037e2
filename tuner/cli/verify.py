"""`stagevar-tune verify PROFILE`: a profile measured again on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar.cli.arguments import Parser, path_value
from stagevar.errors import UsageError
from stagevar.models.request import ModelRequest
from tuner.cli import tune
from tuner.cli.options import Groups, add_study_options
from tuner.cli.plan import check_provable, checked_space
from tuner.config import checks
from tuner.config.limits import parse_budget, parse_share
from tuner.config.quality import parse_max_drops, quality_limits
from tuner.config.space import SearchSpace

if TYPE_CHECKING:
    from stagevar.profile import Profile


def add_options(parser: Parser) -> None:
    """The profile, how much slower it may be, and what to measure."""
    parser.add_argument("profile", type=path_value, help="profile.yaml of a run")
    parser.add_argument(
        "--max-regression", metavar="SHARE", help="fail if slower than recorded by more than this, such as 3%%"
    )
    add_study_options(Groups.of(parser, "what to measure"), required=False)


def kept_max_drops(profile: Profile, given: argparse.Namespace | None, space: SearchSpace) -> dict[str, float]:
    """The limits that a profile was made under, for the space's metrics; old profiles have them in their command."""
    stated = profile.constraints.max_drop
    if isinstance(stated, Mapping):
        return {metric: value for metric, value in stated.items() if metric in space.quality}
    return parse_max_drops((given.max_drop if given is not None else None) or (), space.quality)


def run(args: argparse.Namespace) -> int:
    """Measures a profile again here, against the full schedule in the same run."""
    from stagevar.profile import Profile

    profile = Profile.load(args.profile)
    words = shlex.split(profile.reproduce)[1:]
    words = checks.with_absolute_paths(words, [Path.cwd(), *args.profile.absolute().parents])
    given = tune.build_parser().parse(words) if words else None
    for name in ("model", "budget", "prompts", "heldout", "seed", "space", "weights"):
        if getattr(args, name) is None and given is not None:
            setattr(args, name, getattr(given, name))
    args.model = args.model or profile.model.name
    if args.budget is None:
        raise UsageError(f"profile {args.profile} does not say how it was made; give --budget")
    from tuner.results.codec import to_plain
    from tuner.study.progress import Progress
    from tuner.study.verify_profile import Terms, recheck

    share = parse_share(args.max_regression, "max-regression") if args.max_regression else None
    budget = parse_budget(args.budget)
    named = ModelRequest(args.model, weights=args.weights, device=args.device)
    checks.check_running(named, threads=args.threads, engine=args.engine)
    # The resolution is also checked with the profile's options before loading.
    request = dataclasses.replace(named, resolution=args.resolution).over(profile.model.request)
    request = dataclasses.replace(request, name=profile.model.name)
    made_at = profile.model.load.resolution if args.model == profile.model.name else None
    resolution = args.resolution or made_at
    space = checked_space(args.model, args.space, args.prompts, args.heldout, args.seed or 0, resolution)
    max_drop = kept_max_drops(profile, given, space) | parse_max_drops(args.max_drop or (), space.quality)
    check_provable(space, max_drop, args.weights)
    progress = Progress(args.quiet)
    tune.say_downloads(request, space, progress)
    outcome = recheck(
        profile,
        request,
        Terms(space, budget, tuple(quality_limits(space.quality, max_drop)), share, args.seed or 0),
        threads=args.threads or profile.envelope.threads or 1,
        engine=args.engine or profile.envelope.engine,
        progress=progress,
    )
    if args.json:
        print(json.dumps(to_plain(outcome.to_dict()), indent=2))
    else:
        for line in outcome.lines:
            print(line)
    return outcome.exit_code
