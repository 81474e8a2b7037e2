"""`stagevar`: generate images, serve, measure, analyze and convert. Parsing imports neither torch nor a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stagevar import __version__
from stagevar.cli import analyze, bench, convert, generate, memory, refit, serve
from stagevar.cli.arguments import Parser, add_verbosity
from stagevar.console import report_errors, set_verbosity

#: In the order of --help.
VERBS = (generate, bench, serve, memory, analyze, refit, convert)


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="stagevar", description="Run next-scale image models with stage-aware schedules.")
    parser.add_argument("--version", action="version", version=f"stagevar {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    add_verbosity(*verbs.choices.values())
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `stagevar`. Exit codes as in stagevar.errors."""

    def run() -> int:
        args = build_parser().parse(sys.argv[1:] if argv is None else argv)
        set_verbosity(args.verbose, args.quiet)
        return args.run(args)

    return report_errors("stagevar", run)


if __name__ == "__main__":
    sys.exit(main())
