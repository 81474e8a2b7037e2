"""`stagevar-tune report RUN`: writes everything that is derived from study.json again."""

from __future__ import annotations

import argparse

from stagevar.cli.arguments import Parser, path_value
from tuner.cli.console import announce, write_derived


def add_options(parser: Parser) -> None:
    """The run to report on."""
    parser.add_argument("run_dir", type=path_value, metavar="RUN", help="run directory")


def run(args: argparse.Namespace) -> int:
    """Writes the derived files of a run again."""
    from tuner.results.result import StudyResult

    result = StudyResult.load(args.run_dir)
    written = write_derived(result, args.run_dir)
    announce(result, args.run_dir, written, args)
    return 0
