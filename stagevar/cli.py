"""`stagevar`: generate images, measure, analyse and convert. Parsing imports neither torch nor a model."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagevar import __version__
from stagevar.errors import StagevarError, UsageError

if TYPE_CHECKING:
    from stagevar.models.base import LoadedModel


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors (exit code 2) and the nearest option named by argparse itself."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Options that say which model runs where."""
    parser.add_argument("--model", required=required, help="model name, e.g. nano, infinity-2b, infinity-8b")
    parser.add_argument("--weights", help="path, or 'random' for seeded random weights (latency work only)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = ArgumentParser(prog="stagevar", description="Run next-scale image models with stage-aware schedules.")
    parser.add_argument("--version", action="version", version=f"stagevar {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=ArgumentParser)

    generate = verbs.add_parser("generate", help="make images with a profile, or with a model's full schedule")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--profile", type=Path, help="profile.yaml written by stagevar-tune")
    add_model_options(generate, required=False)
    generate.add_argument("-o", "--output", type=Path, default=Path("image.png"), help="PNG file; several images get -0, -1, ...")
    generate.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    generate.add_argument("--images", type=positive_int, default=1, help="images per prompt, seeds counted up (default: 1)")
    generate.add_argument("--negative", help="negative prompt instead of the model's null text")
    generate.set_defaults(run=run_generate)

    bench = verbs.add_parser("bench", help="time schedules against the full one in one interleaved run")
    add_model_options(bench, required=False)
    bench.add_argument("--profile", type=Path, action="append", default=[], help="a profile to time (may be repeated)")
    bench.add_argument("--compare", default="exact,stagevar-paper,stagevar-released", help="comma list of presets")
    bench.add_argument("--rounds", type=positive_int, default=10, help="timed runs per schedule (default: 10)")
    bench.add_argument("--batch", type=positive_int, default=1, help="images per run (default: 1)")
    bench.add_argument("--prompts", type=positive_int, default=32, help="prompts for the quality columns (default: 32)")
    bench.add_argument("--threads", type=positive_int, default=1, help="CPU threads, pinned (default: 1)")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(run=run_bench)
    return parser


def load(args: argparse.Namespace) -> LoadedModel:
    """The model that the options name."""
    from stagevar.models.registry import load_model

    return load_model(args.model, weights=args.weights, device=args.device)


def run_generate(args: argparse.Namespace) -> int:
    """Writes PNG files and prints their paths."""
    from PIL import Image

    if (args.profile is None) == (args.model is None):
        raise UsageError("give either --profile FILE or --model NAME")
    outputs = output_paths(args.output, len(args.prompts) * args.images)
    prompts = [prompt for prompt in args.prompts for _ in range(args.images)]
    seeds = [args.seed + i for _ in args.prompts for i in range(args.images)]
    options: dict[str, Any] = {"negative": [args.negative] * len(prompts)} if args.negative else {}
    if args.profile is not None:
        from stagevar.profile import Profile

        profile = Profile.load(args.profile)
        weights = {} if args.weights is None else {"weights": args.weights}
        images = profile.pipeline(device=args.device, **weights).generate(prompts, seeds, **options)
    else:
        from stagevar.sampler import Sampler
        from stagevar.schedule import exact

        model = load(args)
        if model.random_weights:
            raise UsageError("--weights random draws noise, not images; it is for latency work only")
        sampler = Sampler(model)
        steps = exact(len(model.grids)).expand(model.grids, sampler.chunks)
        images = [Image.fromarray(pixels) for pixels in sampler.generate(prompts, seeds, steps, **options)]
    for image, path in zip(images, outputs, strict=True):
        image.save(path)
        print(path)
    return 0


def output_paths(output: Path, count: int) -> list[Path]:
    """One path per image, checked to be writable before any work is done."""
    suffix = output.suffix or ".png"
    if suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(f"output {output} has an unknown image type {suffix!r}; use .png, .jpg or .webp")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UsageError(f"output {output}: folder {output.parent} does not exist or cannot be written")
    if output.is_dir():
        raise UsageError(f"output {output} is a folder; name a file")
    if count == 1:
        return [output.with_suffix(suffix)]
    return [output.with_name(f"{output.stem}-{i}{suffix}") for i in range(count)]


def run_bench(args: argparse.Namespace) -> int:
    """Prints one row per schedule: latency, ratio to the full schedule, tokens, memory, quality against it."""
    from stagevar.compare import compare, format_table
    from stagevar.profile import Profile

    profiles = [Profile.load(path) for path in args.profile]
    if args.model is None:
        if not profiles:
            raise UsageError("give --model NAME or --profile FILE")
        args.model = profiles[0].model["name"]
    model = load(args)
    extra = {f"profile {path}": profile.expand(model) for path, profile in zip(args.profile, profiles, strict=True)}
    names = [name.strip() for name in args.compare.split(",") if name.strip()]
    rows = compare(
        model,
        names,
        extra_steps=extra,
        rounds=args.rounds,
        batch=args.batch,
        prompts=args.prompts,
        threads=args.threads,
    )
    print(json.dumps(rows, indent=2) if args.json else format_table(rows))
    return 0


def report_errors(prog: str, run: Callable[[], int]) -> int:
    """Runs a command; errors of ours become one line and their exit code."""

    def one_line(message: Any, *rest: Any) -> None:
        print(f"{prog}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning)
            warnings.showwarning = one_line  # type: ignore[assignment]
            return run()
    except StagevarError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader went away (`| head`); point stdout at nothing so that the interpreter's last flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `stagevar`."""
    args = build_parser().parse_args(argv)
    return report_errors("stagevar", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
