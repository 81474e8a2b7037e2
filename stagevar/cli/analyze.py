"""`stagevar analyze`: finds the stages of a model and proposes a schedule."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar import extras
from stagevar.cli.arguments import (
    path_value,
)
from stagevar.cli.model_options import (
    Verbs,
    add_model_options,
    add_prompt_options,
    check_loading,
    model_request,
    prompts_of_file,
)
from stagevar.errors import UsageError
from stagevar.files import check_output_folder

if TYPE_CHECKING:
    from stagevar.analysis.ablation import Quality
    from stagevar.analysis.similarity import Similarity


def add(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("analyze", help="find the stages of a model and propose a schedule")
    add_model_options(parser)
    add_prompt_options(parser, 48)
    parser.add_argument("--out", type=path_value, help="folder for analysis.yaml, rank_ratio.json and plots")
    parser.add_argument(
        "--ranks", action="store_true", help="only measure spectra for the energy -> rank table: no ablation"
    )
    parser.add_argument(
        "--similarity",
        action="append",
        metavar="NAME[:K=V,...]",
        help="another comparison with the final image, e.g. clip, dino, lpips:net=alex (may be repeated)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the analysis and prints its proposal with the reasons."""
    from stagevar.analysis import analyze, find_similarity, nano_inputs
    from stagevar.analysis.plots import draw
    from stagevar.models.registry import load_model
    from stagevar.sampling.bench import bench_prompts

    extras.require("stagevar analyze", "matplotlib", *(["scipy"] if args.model == "nano" else []))
    request = model_request(args)
    device = check_loading(request)
    out = check_output_folder(args.out or Path("outputs") / f"analysis-{args.model}", "--out")
    given = prompts_of_file(args)
    wanted = args.similarity or (["clip:model=nano"] if args.model == "nano" else [])
    similarities: list[Similarity] = []
    try:
        similarities = [find_similarity(text, device if args.device == "auto" else args.device) for text in wanted]
    except UsageError as error:
        if args.similarity:
            raise
        warnings.warn(f"CLIP similarity is left out: {error}", stacklevel=2)
    model = load_model(request)
    quality: Mapping[str, Quality] = {}
    if model.name == "nano" and given is None:
        prompts, seeds, quality = nano_inputs(args.prompts, args.seed)
    else:
        prompts = bench_prompts(model, args.prompts) if given is None else given
        seeds = [args.seed + i for i in range(len(prompts))]

    def progress(what: str, done: int, total: int) -> None:
        print(f"\r{what} {done}/{total}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)

    shows = sys.stderr and sys.stderr.isatty() and not args.quiet
    found = analyze(
        model,
        prompts,
        seeds,
        similarities=similarities,
        quality=quality,
        ablation_prompts=0 if args.ranks else None,
        progress=progress if shows else None,
    )
    files = [*found.save(out), *draw(found, Path(out))]
    for name, reason in found.reasons.items():
        print(f"{name}: {reason}")
    for path in files:
        print(path)
    return 0
