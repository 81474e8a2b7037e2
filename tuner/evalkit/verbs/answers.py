"""`stagevar-eval answers`: scores of GenEval 2, T2I-CompBench and OneIG from given answers."""

from __future__ import annotations

import argparse
import dataclasses

from stagevar.cli.arguments import existing_file
from tuner.evalkit.delivery import Verbs, add_verb, deliver

_HELP = """\
answers file: as for `dpg`, one line per question and image (docs/metrics.md):
  item_id,proposition_id,skill,tile,answer
  0,1,count,0,0.83
geneval2: answers are probabilities of the right answer; with the script's score_lists.json (.json) instead,
  --questions geneval2_data.jsonl is needed
compbench: answers are probabilities of yes, one question per noun phrase (BLIP-VQA: color, shape, texture)
oneig: answers are yes or no; "dependency" lists parents (alignment)"""


def add(verbs: Verbs) -> None:
    """The options of the verb."""
    verb = add_verb(verbs, "answers", "scores of GenEval 2, T2I-CompBench and OneIG from given answers", _HELP)
    verb.add_argument(
        "--benchmark", choices=("geneval2", "compbench", "oneig"), required=True, help="whose rules to apply"
    )
    verb.add_argument(
        "--answers", type=existing_file, required=True, metavar="FILE", help="what a VQA model answered (.csv, .json)"
    )
    verb.add_argument(
        "--questions",
        type=existing_file,
        metavar="FILE",
        help="the benchmark's questions (geneval2_data.jsonl, or a table as for dpg), if the answers file has none",
    )
    verb.set_defaults(run=run, inputs=("answers", "questions"))


def run(options: argparse.Namespace) -> int:
    """Applies one benchmark's rules."""
    from tuner.metrics import answer_rules
    from tuner.metrics.answers_file import read_answers

    if options.benchmark == "geneval2":
        score = answer_rules.score_geneval2(*answer_rules.read_geneval2_answers(options.answers, options.questions))
    elif options.benchmark == "compbench":
        score = answer_rules.score_compbench(*read_answers(options.answers, options.questions, reading="shares"))
    else:
        score = answer_rules.score_oneig(*read_answers(options.answers, options.questions, reading="words"))
    lines = [f"{name:<32} {value:9.4f}   ({len(score.items)} prompts)" for name, value in score.figures.items()]
    lines += [
        f"  {kind} {name:<24} {value:9.4f}" for kind, found in score.groups.items() for name, value in found.items()
    ]
    if score.unanswered:
        lines.append(f"  {len(score.unanswered)} items of the question file have no answers")
    return deliver(options, dataclasses.asdict(score), lines)
