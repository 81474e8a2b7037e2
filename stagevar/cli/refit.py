"""`stagevar refit`: fits SkipVAR's classifier for a model."""

from __future__ import annotations

import argparse
import json

from stagevar.cli.arguments import (
    finite_number,
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


def add(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("refit", help="fit SkipVAR's classifier for a model")
    add_model_options(parser)
    add_prompt_options(parser, 256)
    parser.add_argument(
        "--target",
        type=finite_number,
        default=0.84,
        help="SSIM with the full schedule's image to keep (default: 0.84)",
    )
    parser.add_argument("--out", type=path_value, required=True, help="JSON file that a schedule's decision may name")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fits on full generations, writes the classifier and prints how well it does."""
    from stagevar.analysis.skipvar_fit import check_file, check_fitting, refit
    from stagevar.models.registry import load_model
    from stagevar.sampling.bench import bench_prompts
    from stagevar.sampling.sampler import Sampler

    if not 0 < args.target < 1:
        raise UsageError(f"target {args.target} must lie between 0 and 1")
    request = model_request(args)
    check_loading(request)
    check_file(args.out)
    given = prompts_of_file(args)
    check_fitting(args.prompts if given is None else len(given), args.weights == "random")
    model = load_model(request)
    prompts = bench_prompts(model, args.prompts) if given is None else given
    fit = refit(Sampler(model), prompts, [args.seed + i for i in range(len(prompts))], args.target, name=args.out.stem)
    fit.save(args.out)
    print(json.dumps(fit.to_dict()["fit"], indent=2))
    print(args.out)
    return 0
