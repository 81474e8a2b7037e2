"""`stagevar-eval`: scores image folders, applies benchmarks' rules to given detections and answers, runs user studies.

Model libraries load only when a verb needs them, so --help is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stagevar.cli.arguments import Parser
from stagevar.console import report_errors, set_verbosity
from tuner.evalkit.delivery import check_outputs, version_of
from tuner.evalkit.verbs import answers, dpg, geneval, images, pairs, preference, prompts

VERBS = ("images", "geneval", "dpg", "answers", "prompts", "pairs", "preference")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 unusable input (one line on stderr)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version"):
        arguments.insert(0, "images")  # `stagevar-eval --images DIR --metric NAME` needs no verb

    def run() -> int:
        options = build_parser().parse(arguments)
        if "out" in options:  # a verb was given
            set_verbosity(options.verbose, options.quiet)
            check_outputs(options)
        return options.run(options)

    return report_errors("stagevar-eval", run)


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="stagevar-eval",
        description="Image quality for next-scale models: benchmarks, metrics, user studies.",
        epilog="The default verb is `images`: stagevar-eval --images DIR --metric NAME.",
    )
    parser.add_argument("--version", action="version", version=f"stagevar-tune {version_of('stagevar-tune')}")
    verbs = parser.add_subparsers(dest="verb", metavar="{" + ",".join(VERBS) + "}")

    def show_help(options: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=show_help)
    for verb in (geneval, dpg, answers, images, prompts, pairs, preference):
        verb.add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
