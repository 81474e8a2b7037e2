"""`stagevar-tune resume RUN`: the command that a run directory was started with, once more."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from stagevar.cli.arguments import Parser, path_value
from stagevar.errors import UsageError
from tuner.cli import tune
from tuner.config import checks
from tuner.results.run_dir import CONFIG_FILE


def add_options(parser: Parser) -> None:
    """The run to continue."""
    parser.add_argument("run_dir", type=path_value, metavar="RUN", help="run directory")


def run(args: argparse.Namespace) -> int:
    """Runs the command that a run directory was started with."""
    path = args.run_dir / CONFIG_FILE
    try:
        words = shlex.split(json.loads(path.read_text())["command"])[1:]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{args.run_dir} holds no run that could be resumed (no readable config.json)") from None
    # Runs of before have relative paths, from a working directory that is not known: often that of the run itself.
    words = checks.with_absolute_paths(words, [Path.cwd(), *args.run_dir.absolute().parents])
    parsed = tune.build_parser().parse(words)
    parsed.out, parsed.quiet, parsed.json = args.run_dir, args.quiet, args.json
    parsed.verbose = args.verbose
    return tune.run(parsed, words, again=True)
