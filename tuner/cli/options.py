"""Options that several verbs of `stagevar-tune` share."""

from __future__ import annotations

from stagevar.choices import ENGINE_OPTIONS
from stagevar.cli.arguments import Parser, name_value, path_value, positive_int, whole_number
from stagevar.models import registry
from tuner.config.space import PROMPT_SOURCES

PROG = "stagevar-tune"


def heldout_numbers(text: str) -> tuple[int, ...]:
    """Numbers of held-out prompts: those that a study began with, then those that were added, as "512+640"."""
    return tuple(positive_int(part) for part in text.split("+"))


def add_study_options(parser: Parser, required: bool) -> None:
    """Options that decide what is measured against what."""
    profiles = "the profile's"
    budget_help = "latency of one image: 2s, 800ms, or 60%% of the measured full schedule"
    models = ", ".join(registry.model_names())
    parser.add_argument("--model", type=name_value, required=required, help=f"one of {models}")
    parser.add_argument("--budget", "--latency-budget", required=required, metavar="LATENCY", help=budget_help)
    parser.add_argument(
        "--max-drop",
        action="append",
        metavar="[METRIC=]DROP",
        help="largest drop: 2%% for the first metric of the space, clip_score=0.3 for another; may be repeated "
        "(default: the space's)",
    )
    sources = ", ".join(PROMPT_SOURCES)
    parser.add_argument(
        "--prompts",
        metavar="N|SOURCE[:N]|FILE",
        help=f"search prompts: how many, {sources} (geneval:64), a file (.txt, .jsonl, .json, .csv), or a folder of .txt",
    )
    parser.add_argument(
        "--heldout",
        type=heldout_numbers,
        metavar="N[+N]",
        help="held-out prompts that verify at most; more of them continue a run (with geneval as 512+640: 640 added)",
    )
    parser.add_argument("--seed", type=whole_number, default=0, help="of prompts, noise and sampler (default: 0)")
    parser.add_argument(
        "--space", type=path_value, metavar="FILE", help="search space, or what of it differs from the model's default"
    )
    parser.add_argument("--weights", type=name_value, help="path, or 'random' for seeded random weights (latency only)")
    parser.add_argument("--resolution", help="pixel budget (0.25M, 1M ...) or image side, where a model has several")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=1 if required else None,
        help=f"CPU threads of a latency, pinned while timing (default: {'1' if required else profiles})",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINE_OPTIONS,
        default="auto" if required else None,
        help="what latency is timed on, and deployed with (default: auto, the fastest that draws the same images)"
        if required
        else "what latency is timed on (default: the profile's)",
    )


def add_output_options(parser: Parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress; the result only")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
