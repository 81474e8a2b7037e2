"""Options that several verbs of `stagevar-tune` share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from stagevar.choices import ENGINE_OPTIONS
from stagevar.cli.arguments import Parser, add_verbosity, name_value, path_value, positive_int, whole_number
from stagevar.models import registry
from tuner.config.space import PROMPT_SOURCES

PROG = "stagevar-tune"


def heldout_numbers(text: str) -> tuple[int, ...]:
    """Numbers of held-out prompts: the original ones, then added ones, such as "512+640"."""
    return tuple(positive_int(part) for part in text.split("+"))


@dataclass(frozen=True)
class Groups:
    """Sections of --help."""

    what: argparse._ArgumentGroup
    limits: argparse._ArgumentGroup
    search: argparse._ArgumentGroup
    place: argparse._ArgumentGroup
    output: argparse._ArgumentGroup

    @classmethod
    def of(cls, parser: Parser, what: str) -> Groups:
        """Adds the sections in order, `what` being the first one's title; empty ones are not printed."""
        titles = (what, "limits", "search", "where it runs", "output")
        return cls(*(parser.add_argument_group(title) for title in titles))


def add_study_options(groups: Groups, required: bool) -> None:
    """Options that determine what is measured, and under which limits; where not `required`, a profile has the defaults."""
    profiles = "the profile's"
    what, limits, place = groups.what, groups.limits, groups.place
    models = ", ".join(registry.model_names())
    what.add_argument("--model", type=name_value, required=required, help=f"one of {models}")
    what.add_argument("--weights", type=name_value, help="path, or 'random' for seeded random weights (latency only)")
    what.add_argument("--resolution", help="pixel budget (0.25M, 1M ...) or image side, if a model has several")
    what.add_argument(
        "--space", type=path_value, metavar="FILE", help="search space, or its differences from the model's default"
    )
    sources = ", ".join(PROMPT_SOURCES)
    what.add_argument(
        "--prompts",
        metavar="N|SOURCE[:N]|FILE",
        help=f"search prompts: a number, {sources} (geneval:64), a file (.txt, .jsonl, .json, .csv), or a folder of .txt",
    )
    what.add_argument(
        "--heldout",
        type=heldout_numbers,
        metavar="N[+N]",
        help="maximum number of held-out prompts for verification; a larger number continues a run (geneval: 512+640 adds "
        "640)"
        if required
        else f"maximum number of held-out prompts (default: {profiles})",
    )
    what.add_argument(
        "--seed",
        type=whole_number,
        default=0 if required else None,
        help="of prompts, noise and sampler (default: 0)"
        if required
        else f"of prompts and noise (default: {profiles})",
    )
    budget_help = "latency of one image: 2s, 800ms, or 60%% of the measured full schedule"
    limits.add_argument("--budget", "--latency-budget", required=required, metavar="LATENCY", help=budget_help)
    limits.add_argument(
        "--max-drop",
        action="append",
        metavar="[METRIC=]DROP",
        help="largest drop: 2%% for the first metric of the space, clip_score=0.3 for another; may be repeated "
        f"(default: {'the space' if required else 'the profile'}'s)",
    )
    place.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    place.add_argument(
        "--threads",
        type=positive_int,
        default=1 if required else None,
        help=f"CPU threads to time with, pinned while timing (default: {'1' if required else profiles})",
    )
    place.add_argument(
        "--engine",
        choices=ENGINE_OPTIONS,
        default="auto" if required else None,
        help="engine to time, recorded in the profile (default: auto, the fastest that draws the same images)"
        if required
        else "engine to time (default: the profile's)",
    )


def add_output_options(parser: Parser | argparse._ArgumentGroup) -> None:
    """Options that determine what is printed."""
    add_verbosity(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
