"""`stagevar generate`: images from a profile, or from a model's full schedule."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar.cli.arguments import (
    MOST,
    file_value,
    path_value,
    positive_int,
    whole_number,
)
from stagevar.cli.model_options import (
    Verbs,
    add_model_options,
    add_running_options,
    drawing_request,
)
from stagevar.errors import UsageError
from stagevar.files import check_output, write_atomically, writing
from stagevar.prompts.requests import check_negatives, check_prompts
from stagevar.sections import shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from stagevar.models.request import ModelRequest


def add(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("generate", help="make images with a profile, or with a model's full schedule")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--profile", type=path_value, help="profile.yaml written by stagevar-tune")
    add_model_options(parser, required=False)
    parser.add_argument(
        "-o", "--output", type=file_value, default=Path("image.png"), help="PNG file; several images get -0, -1, ..."
    )
    parser.add_argument("--seed", type=whole_number, default=0, help="seed of the first image (default: 0)")
    parser.add_argument(
        "--images", type=positive_int, default=1, help="images per prompt, with consecutive seeds (default: 1)"
    )
    add_running_options(parser, batch="the profile's, else 1", threads="the profile's, else torch's")
    parser.add_argument("--negative", help="negative prompt instead of the model's null text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes images as they are drawn, and prints their paths."""

    if (args.profile is None) == (args.model is None):
        raise UsageError("give either --profile FILE or --model NAME")
    count = len(args.prompts) * args.images
    if count > MOST:
        raise UsageError(f"{count} images are too many for one command; at most {MOST}")
    outputs = output_paths(args.output, count)
    prompts = check_prompts([prompt for prompt in args.prompts for _ in range(args.images)])
    seeds = [args.seed + i for _ in args.prompts for i in range(args.images)]
    check_negatives(args.negative, count)
    if args.profile is not None:
        from stagevar.profile import Profile

        profile = Profile.load(args.profile)
        request = drawing_request(args, profile)
        pipeline = profile.pipeline_of(request, engine=args.engine, batch=args.batch or 0, threads=args.threads)
        parts = (slice(first, first + pipeline.batch) for first in range(0, count, pipeline.batch))
        images: Iterator[Image] = (
            image for part in parts for image in pipeline.generate(prompts[part], seeds[part], args.negative)
        )
    else:
        images = draw_full(args, drawing_request(args), prompts, seeds)
    for image, path in zip(images, outputs, strict=True):
        save_image(image, path)
        print(path)
    return 0


def save_image(image: Image, path: Path) -> None:
    """Writes a PIL image in the format of the path's suffix, whole or not at all."""
    from PIL import Image as pillow

    kind = pillow.registered_extensions()[path.suffix.lower()]
    with writing(path):
        write_atomically(path, lambda file: image.save(file, kind))


def draw_full(
    args: argparse.Namespace, request: ModelRequest, prompts: Sequence[str], seeds: Sequence[int]
) -> Iterator[Image]:
    """PIL images of a model's full schedule, drawn batch by batch."""
    from PIL import Image as pillow

    from stagevar.models.registry import load_model
    from stagevar.profile.engine_choice import WORTH_COMPARING, engine_for
    from stagevar.sampling.sampler import Sampler
    from stagevar.schedule import exact
    from stagevar.timing import threads_of

    model = load_model(request)
    batch, negatives = args.batch or 1, check_negatives(args.negative, len(prompts))
    steps = exact(len(model.grids)).expand(model.grids, len(model.transformer.chunk_layers))
    with threads_of(args.threads):
        few = args.engine == "auto" and len(prompts) < WORTH_COMPARING
        engine = "eager" if few else engine_for(args.engine, model, steps, prompts, seeds).name
        sampler = Sampler(model, engine=engine)
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            negative = None if negatives is None else negatives[part]
            for pixels in sampler.generate(prompts[part], seeds[part], steps, negative=negative):
                yield pillow.fromarray(pixels)


def output_paths(output: Path, count: int) -> list[Path]:
    """One path per image, checked to be writable before any work is done."""
    suffix = output.suffix or ".png"
    check_output(output)
    if suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(
            f"output {shown(str(output))} has an unknown image type {shown(suffix)}; use .png, .jpg or .webp"
        )
    if count == 1:
        return [check_output(output.with_suffix(suffix))]
    paths = [output.with_name(f"{output.stem}-{i}{suffix}") for i in range(count)]
    check_output(paths[-1])  # the longest name
    return paths
