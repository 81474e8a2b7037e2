"""`stagevar-eval dpg`: DPG-Bench's score from given answers, as published and corrected."""

from __future__ import annotations

import argparse
import dataclasses

from stagevar.cli.arguments import existing_file
from stagevar.errors import UsageError
from tuner.evalkit.delivery import Verbs, add_verb, deliver

_HELP = """\
answers file: CSV with a header, one line per question and tile:
  item_id,proposition_id,dependency,tuple,tile,answer
  partiprompts97,1,0,entity - whole (cat),0,yes
  partiprompts97,2,"1","attribute - color (cat, black)",0,no
"dependency" lists parent propositions of the item ("1,2"; 0 or empty for none). Without "tile", the k-th line of a
question is tile k; columns answer_0 ... answer_3 may replace tile and answer. Only the exact answer "yes" counts; a
column of 0/1 is read as scores. Questions keep the file's order, which the dependency walk follows.
docs/metrics.md lists all spellings."""


def add(verbs: Verbs) -> None:
    """The options of the verb."""
    verb = add_verb(verbs, "dpg", "DPG-Bench's score from given answers, as published and corrected", _HELP)
    verb.add_argument(
        "--answers", type=existing_file, required=True, metavar="FILE.csv", help="what a VQA model answered"
    )
    verb.add_argument(
        "--questions",
        type=existing_file,
        metavar="dpg_bench.csv",
        help="official questions, if the answers file has none",
    )
    verb.add_argument(
        "--mode",
        choices=("both", "published", "corrected"),
        default="both",
        help="published keeps the released script's bugs (default %(default)s)",
    )
    verb.set_defaults(run=run, inputs=("answers", "questions"))


def run(options: argparse.Namespace) -> int:
    """Scores answers under the published rules, the corrected ones, or both."""
    from tuner.metrics.answers_file import read_answers
    from tuner.metrics.dpg import MODES, score_dpg

    questions, answers = read_answers(options.answers, options.questions)
    results: dict[str, object] = {}
    lines: list[str] = []
    for mode in MODES if options.mode == "both" else (options.mode,):
        try:
            score = score_dpg(questions, answers, mode)
        except UsageError as error:
            if options.mode != "both" or mode == "published":
                raise
            # A file that only the corrected rules reject still has its published score.
            results[mode] = {"refused": str(error)}
            lines.append(f"DPG-Bench {mode:<10} refused: {error}")
            continue
        results[mode] = dataclasses.asdict(score)
        figure = "n/a (no prompt scored)" if score.score is None else f"{score.score:.4f}"
        lines += [f"DPG-Bench {mode:<10} {figure}   ({len(score.prompts)} prompts)"]
        lines += [f"  dropped {item_id}: {reason}" for item_id, reason in score.dropped.items()]
        if score.unanswered:
            lines.append(f"  {len(score.unanswered)} items of the question file have no answers")
        lines += [f"  L1 {name:<28} {value:9.4f}" for name, value in score.l1.items()]
        lines += [f"  L2 {name:<28} {value:9.4f}" for name, value in score.l2.items()]
    return deliver(options, results, lines)
