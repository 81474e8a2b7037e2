"""`stagevar-eval preference`: the win rate of a user study."""

from __future__ import annotations

import argparse
import dataclasses

from stagevar.cli.arguments import between, existing_file
from tuner.evalkit.delivery import Verbs, add_verb, deliver


def add(verbs: Verbs) -> None:
    """The options of the verb."""
    verb = add_verb(verbs, "preference", "win rate of a study, and whether no preference is supported")
    verb.add_argument(
        "--key", type=existing_file, required=True, metavar="FILE.json", help="the key that `pairs` wrote"
    )
    verb.add_argument(
        "--answers", type=existing_file, required=True, nargs="+", metavar="FILE.json", help="answers, all voters"
    )
    verb.add_argument(
        "--margin",
        type=between(0, 0.5, ends=False),
        default=0.1,
        help="win rates within this distance of 0.5 count as no preference (default %(default)s)",
    )
    verb.add_argument(
        "--level", type=between(0.5, 1, ends=False), default=0.95, help="confidence (default %(default)s)"
    )
    verb.set_defaults(run=run, inputs=("key", "answers"))


def run(options: argparse.Namespace) -> int:
    """Judges the votes."""
    from stagevar.text_files import read_json
    from tuner.evalkit.user_study import judge_preference, read_votes

    votes = read_votes(read_json(options.key), options.answers)
    result = judge_preference(votes, margin=options.margin, level=options.level)
    lines = [
        f"votes: A {result.votes['A']}, B {result.votes['B']}, no difference {result.votes['tie']} "
        f"({result.voters} voters, {result.pairs} pairs)",
        f"win rate of A {result.win_rate:.1%}, {result.level:.0%} interval {result.low:.1%} to {result.high:.1%}",
        f"preference: p = {result.p_preference:.4f}",
        f"no preference within 50 % -+ {result.margin:.0%}: p = {result.p_equivalence:.4f}",
        f"verdict: {result.verdict}",
    ]
    if result.verdict == "undecided":
        lines.append(f"about {result.pairs_needed} pairs would support no preference if there is none")
    return deliver(options, dataclasses.asdict(result), lines)
