"""`stagevar convert`: writes a model's files once as safetensors."""

from __future__ import annotations

import argparse

from stagevar.choices import check_weights
from stagevar.cli.arguments import (
    name_value,
    path_value,
)
from stagevar.cli.model_options import (
    Verbs,
)


def add(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("convert", help="write a model's files once as safetensors, which load memory-mapped")
    parser.add_argument("--model", type=name_value, required=True, help="model name, e.g. infinity-2b, infinity-8b")
    parser.add_argument("--weights", type=name_value, help="file or folder to read (default: the public files)")
    parser.add_argument("--tokenizer", type=name_value, help="tokenizer file, if it is not next to the weights")
    parser.add_argument("--dtype", help="bfloat16 halves the transformer blocks (default: as in the files)")
    parser.add_argument(
        "-o", "--output", type=path_value, required=True, help="new folder; load it with --weights FOLDER"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes safetensors and prints their paths."""
    from stagevar.models.convert import convert

    check_weights(args.weights, args.tokenizer)
    for path in convert(args.model, args.output, weights=args.weights, tokenizer=args.tokenizer, dtype=args.dtype):
        print(path)
    return 0
