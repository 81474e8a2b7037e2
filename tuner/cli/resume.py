"""`stagevar-tune resume RUN`: runs the command that a run directory was started with again."""

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
        raise UsageError(f"{args.run_dir} holds no run to resume (no readable config.json)") from None
    # Older runs have relative paths from an unknown working directory: often the run's own.
    words = checks.with_absolute_paths(words, [Path.cwd(), *args.run_dir.absolute().parents])
    parsed = tune.build_parser().parse(words)
    parsed.out, parsed.quiet, parsed.json = args.run_dir, args.quiet, args.json
    parsed.verbose = args.verbose
    return tune.run(parsed, words, again=True)
