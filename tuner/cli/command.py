"""The command line of `stagevar-tune`: tuning needs no verb, every other verb is a file in this folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from stagevar import extras
from stagevar.cli.arguments import Parser
from stagevar.console import report_errors, set_verbosity
from stagevar.errors import UsageError, did_you_mean
from tuner.cli import tune
from tuner.cli.options import PROG, add_output_options

VERBS = ("resume", "report", "verify", "sweep", "doctor")
#: What every command except doctor needs beyond the base installation; metrics name their own needs.
NEEDED = ("optuna", "scipy", "pandas", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes as in --help; 130 if stopped immediately by a second Ctrl-C."""
    return report_errors(PROG, lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        args = tune.build_parser().parse(argv)
        extras.require(PROG, *NEEDED)
        return tune.run(args, argv)
    verb = argv[0]
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; tuning needs none: {PROG} --model ...")
    args = verb_parser(verb).parse(argv[1:])
    set_verbosity(args.verbose, args.quiet)
    if verb != "doctor":
        extras.require(f"{PROG} {verb}", *NEEDED)
    return importlib.import_module(f"tuner.cli.{verb}").run(args)


def verb_parser(verb: str) -> Parser:
    """The options of a verb."""
    parser = Parser(prog=f"{PROG} {verb}")
    importlib.import_module(f"tuner.cli.{verb}").add_options(parser)
    add_output_options(parser)
    return parser
