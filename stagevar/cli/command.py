"""`stagevar`: generate images, measure, analyse and convert. Parsing imports neither torch nor a model."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagevar import __version__, extras
from stagevar.choices import ENGINE_OPTIONS, check_engine, check_threads, check_weights
from stagevar.cli.arguments import (
    MOST,
    Parser,
    between,
    existing_file,
    file_value,
    finite_number,
    name_value,
    path_value,
    positive_int,
    whole_number,
)
from stagevar.console import report_errors
from stagevar.errors import UsageError
from stagevar.files import check_output, check_output_folder, write_atomically, writing
from stagevar.prompts.requests import check_negatives, check_prompts
from stagevar.sections import shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from stagevar.models.base import LoadedModel
    from stagevar.profile import Profile


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Options that say which model runs where."""
    parser.add_argument(
        "--model", type=name_value, required=required, help="model name, e.g. nano, infinity-2b, infinity-8b"
    )
    parser.add_argument(
        "--weights", type=name_value, help="path, or 'random' for seeded random weights (latency work only)"
    )
    parser.add_argument("--tokenizer", type=name_value, help="tokenizer file, where it does not lie beside the weights")
    parser.add_argument(
        "--text", type=name_value, help="folder of the text encoder, where it does not lie beside the weights"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: bfloat16 on a GPU, else float32)")
    parser.add_argument(
        "--resolution", help="pixel budget (0.06M, 0.25M, 0.60M, 1M) or image side, where a model has several"
    )
    parser.add_argument("--kv-cache", help="model (default), or int8 for about half the memory of keys and values")
    parser.add_argument(
        "--ratio", type=finite_number, help="height / width, snapped to one of the model's (default: 1)"
    )


def add_running_options(parser: argparse.ArgumentParser, batch: str, threads: str) -> None:
    """Options that say how steps reach the device."""
    parser.add_argument(
        "--engine",
        choices=ENGINE_OPTIONS,
        default="auto",
        help="default: auto, the profile's, else the fastest that draws the same images",
    )
    parser.add_argument("--batch", type=positive_int, help=f"images per run (default: {batch})")
    parser.add_argument("--threads", type=positive_int, help=f"CPU threads (default: {threads})")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog="stagevar", description="Run next-scale image models with stage-aware schedules.")
    parser.add_argument("--version", action="version", version=f"stagevar {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    generate = verbs.add_parser("generate", help="make images with a profile, or with a model's full schedule")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--profile", type=path_value, help="profile.yaml written by stagevar-tune")
    add_model_options(generate, required=False)
    generate.add_argument(
        "-o", "--output", type=file_value, default=Path("image.png"), help="PNG file; several images get -0, -1, ..."
    )
    generate.add_argument("--seed", type=whole_number, default=0, help="seed of the first image (default: 0)")
    generate.add_argument(
        "--images", type=positive_int, default=1, help="images per prompt, seeds counted up (default: 1)"
    )
    add_running_options(generate, batch="the profile's, else 1", threads="the profile's, else torch's")
    generate.add_argument("--negative", help="negative prompt instead of the model's null text")
    generate.set_defaults(run=run_generate)

    bench = verbs.add_parser("bench", help="time schedules against the full one in one interleaved run")
    add_model_options(bench, required=False)
    bench.add_argument(
        "--profile", type=path_value, action="append", default=[], help="a profile to time (may be repeated)"
    )
    bench.add_argument("--compare", default="exact,stagevar-paper,stagevar-released", help="comma list of presets")
    bench.add_argument("--rounds", type=positive_int, default=10, help="timed runs per schedule (default: 10)")
    add_running_options(bench, batch="the profile's, else 1", threads="the profile's, else 1; pinned")
    bench.add_argument("--prompts", type=positive_int, default=32, help="prompts for the quality columns (default: 32)")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_server_measuring(bench)
    bench.set_defaults(run=run_bench)

    add_serve(verbs.add_parser("serve", help="serve a profile over HTTP as OpenAI's images endpoint"))

    memory = verbs.add_parser("memory", help="reckon how much memory schedules need; loads nothing")
    add_model_options(memory)
    memory.add_argument("--compare", default="exact,stagevar-paper", help="comma list of presets")
    memory.add_argument("--batch", type=positive_int, default=1, help="images per run (default: 1)")
    memory.add_argument("--card", type=finite_number, metavar="GIB", help="memory of a card, to say what fits")
    memory.set_defaults(run=run_memory)

    analyze = verbs.add_parser("analyze", help="find the stages of a model and propose a schedule")
    add_model_options(analyze)
    add_prompt_options(analyze, 48)
    analyze.add_argument("--out", type=path_value, help="folder for analysis.yaml, rank_ratio.json and plots")
    analyze.add_argument(
        "--ranks", action="store_true", help="only measure spectra for the energy -> rank table: no ablation"
    )
    analyze.add_argument(
        "--similarity",
        action="append",
        metavar="NAME[:K=V,...]",
        help="a further comparison with the final image, e.g. clip, dino, lpips:net=alex (may be repeated)",
    )
    analyze.set_defaults(run=run_analyze)

    refit = verbs.add_parser("refit", help="fit SkipVAR's classifier for a model")
    add_model_options(refit)
    add_prompt_options(refit, 256)
    refit.add_argument(
        "--target", type=finite_number, default=0.84, help="SSIM to the full schedule's image to keep (default: 0.84)"
    )
    refit.add_argument("--out", type=path_value, required=True, help="JSON file that a schedule's decision may name")
    refit.set_defaults(run=run_refit)

    convert = verbs.add_parser("convert", help="write a model's files once as safetensors, which load memory-mapped")
    convert.add_argument("--model", type=name_value, required=True, help="model name, e.g. infinity-2b, infinity-8b")
    convert.add_argument("--weights", type=name_value, help="file or folder to read (default: the public files)")
    convert.add_argument(
        "--tokenizer", type=name_value, help="tokenizer file, where it does not lie beside the weights"
    )
    convert.add_argument("--dtype", help="bfloat16 halves the transformer blocks (default: as in the files)")
    convert.add_argument(
        "-o", "--output", type=path_value, required=True, help="new folder; load it with --weights FOLDER"
    )
    convert.set_defaults(run=run_convert)
    return parser


def add_server_measuring(bench: argparse.ArgumentParser) -> None:
    """Options of `bench` for a running server."""
    bench.add_argument("--serve", metavar="URL", type=name_value, help="measure a running server instead of schedules")
    bench.add_argument(
        "--concurrency", default="1,2,4,8", help="with --serve: comma list of clients at once (default: 1,2,4,8)"
    )
    bench.add_argument("--requests", type=positive_int, default=64, help="with --serve: per level (default: 64)")
    bench.add_argument("--api-key-file", type=existing_file, help="with --serve: file whose first line is the key")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    parser.add_argument("--profile", type=path_value, help="profile.yaml written by stagevar-tune")
    add_model_options(parser, required=False)
    add_running_options(parser, batch="the profile's, else 1", threads="the profile's, else torch's")
    parser.add_argument("--compare", action="store_true", help="serve the full schedule beside the profile's")
    parser.add_argument(
        "--host", type=name_value, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=whole_number, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--api-key-file", type=existing_file, help="accept only requests with one of its keys, one a line"
    )
    parser.add_argument("--queue", type=positive_int, default=64, help="images that may wait (default: 64)")
    seconds = between(0.1, 86400)
    parser.add_argument("--timeout", type=seconds, default=60, help="seconds until a request gives up (default: 60)")
    parser.add_argument(
        "--grace", type=seconds, default=30, help="seconds for accepted requests after SIGTERM (default: 30)"
    )
    parser.add_argument(
        "--stuck", type=seconds, default=300, help="seconds of one batch after which /health fails (default: 300)"
    )
    parser.set_defaults(run=run_serve)


def add_prompt_options(parser: argparse.ArgumentParser, count: int) -> None:
    """Options that say which prompts and seeds are used."""
    parser.add_argument("--prompts", type=positive_int, default=count, help=f"how many prompts (default: {count})")
    parser.add_argument(
        "--prompts-file", type=path_value, help="prompts (.txt, .jsonl, .json, .csv) instead of built-in ones"
    )
    parser.add_argument("--seed", type=whole_number, default=0, help="seed of the first prompt (default: 0)")


def prompts_of_file(args: argparse.Namespace) -> list[str] | None:
    """The prompts of --prompts-file, None without one. Raises UsageError."""
    if args.prompts_file is None:
        return None
    from stagevar.prompts.prompt_files import read_prompt_file

    return check_prompts([entry.text for entry in read_prompt_file(args.prompts_file)][: args.prompts])


def load(args: argparse.Namespace, **defaults: Any) -> LoadedModel:
    """The model that the options name; defaults are for options that were not given."""
    from stagevar.models.registry import load_model

    return load_model(args.model, device=args.device, **{**defaults, **given_options(args)})


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The model options that were given, as `load_model` takes them."""
    names = ("weights", "tokenizer", "text", "dtype", "resolution", "ratio", "kv_cache")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def run_generate(args: argparse.Namespace) -> int:
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
    if args.weights == "random":
        raise UsageError("--weights random draws noise, not images; it is for latency work only")
    if args.profile is not None:
        from stagevar.profile import Profile

        profile = Profile.load(args.profile)
        check_running(args, profile.model.name, [profile], args.threads)
        running = {"engine": args.engine, "batch": args.batch or 0, "threads": args.threads}
        pipeline = profile.pipeline(device=args.device, **running, **given_options(args))
        parts = (slice(first, first + pipeline.batch) for first in range(0, count, pipeline.batch))
        images = (image for part in parts for image in pipeline.generate(prompts[part], seeds[part], args.negative))
    else:
        check_running(args, args.model, [], args.threads)
        images = draw_full(args, prompts, seeds)
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


def check_loading(args: argparse.Namespace, model: str, profiles: Sequence[Profile] = ()) -> str:
    """The kind of device ("cpu", "cuda") that a model will be on.

    Raises UsageError, before anything is loaded, for a model, option or device that is not there, and for paths that hold
    nothing.
    """
    from stagevar.models.registry import resolve

    check_weights(args.weights, args.tokenizer, args.text)
    loading = {**(profiles[0].model.load.given() if profiles else {}), **given_options(args)}
    return resolve(model, device=args.device, **loading).device.type


def check_running(args: argparse.Namespace, model: str, profiles: Sequence[Profile], threads: int | None) -> None:
    """Raises UsageError, before anything is loaded, for an engine or threads that this device does not have."""
    device = check_loading(args, model, profiles)
    check_engine(args.engine, device)
    if threads is not None:
        check_threads(threads, device)


def draw_full(args: argparse.Namespace, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image]:
    """PIL images of a model's full schedule, drawn batch by batch."""
    from PIL import Image as pillow

    from stagevar.profile.engine_choice import WORTH_COMPARING, engine_for
    from stagevar.sampling.sampler import Sampler
    from stagevar.schedule import exact
    from stagevar.timing import threads_of

    model = load(args)
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


def run_convert(args: argparse.Namespace) -> int:
    """Writes safetensors and prints their paths."""
    from stagevar.models.convert import convert

    check_weights(args.weights, args.tokenizer)
    for path in convert(args.model, args.output, weights=args.weights, tokenizer=args.tokenizer, dtype=args.dtype):
        print(path)
    return 0


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


def run_serve(args: argparse.Namespace) -> int:
    """Serves until it is told to stop."""
    from stagevar.profile import Profile
    from stagevar.serving.app import Keys, Limits
    from stagevar.serving.server import Serving, read_keys, require_packages, serve

    require_packages()
    if (args.profile is None) == (args.model is None):
        raise UsageError("give either --profile FILE or --model NAME")
    if args.compare and args.profile is None:
        raise UsageError("--compare needs --profile: a model alone is served with its full schedule")
    if args.weights == "random":
        raise UsageError("--weights random draws noise, not images; it is for latency work only")
    keys = Keys() if args.api_key_file is None else read_keys(args.api_key_file)
    limits = Limits(timeout_s=args.timeout, stuck_s=args.stuck)
    serving = Serving(args.host, args.port, args.queue, args.grace, limits, keys)
    profile = None if args.profile is None else Profile.load(args.profile)
    check_running(args, profile.model.name if profile else args.model, [profile] if profile else [], args.threads)
    from stagevar.serving.drawing import Loading

    running = {"device": args.device, "engine": args.engine, "batch": args.batch or 0, "threads": args.threads}
    serve(Loading(profile, args.model, args.compare, **running, options=given_options(args)), serving)
    return 0


def bench_server(args: argparse.Namespace) -> int:
    """Prints one row per number of clients at once: latency, images per second, statuses."""
    from stagevar.models.nano.scenes import prompts
    from stagevar.serving.load import format_levels, measure_server

    try:
        levels = [positive_int(word) for word in args.concurrency.split(",")]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--concurrency: {error}") from None
    key = None
    if args.api_key_file is not None:
        key = next(iter(args.api_key_file.read_text(encoding="utf-8").split()), None)
    texts = [metadata["prompt"] for metadata in prompts("heldout", args.prompts)]
    rows = [level.row() for level in measure_server(args.serve, levels, args.requests, texts, key)]
    print(json.dumps(rows, indent=2) if args.json else format_levels(rows))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """Prints one row per schedule: latency, ratio to the full schedule, tokens, memory, quality against it."""
    if args.serve is not None:
        return bench_server(args)
    from stagevar.profile import Profile
    from stagevar.profile.engine_choice import engine_for
    from stagevar.sampling.bench import bench_prompts, compare, format_table
    from stagevar.schedule import preset

    profiles = [Profile.load(path) for path in args.profile]
    if args.model is None:
        if not profiles:
            raise UsageError("give --model NAME or --profile FILE")
        args.model = profiles[0].model.name
    batch = args.batch or shared("batch", [profile.envelope.batch for profile in profiles]) or 1
    threads = args.threads or shared("threads", [profile.envelope.threads for profile in profiles]) or 1
    if args.resolution is None:
        shared("resolution", [profile.model.load.resolution for profile in profiles])
    if batch > args.prompts:
        raise UsageError(f"batch {batch} is larger than the {args.prompts} prompts; raise --prompts")
    names = presets(args.compare)
    check_running(args, args.model, profiles, threads)
    model = load(args, **(profiles[0].model.load.given() if profiles else {}))
    extra = {f"profile {path}": profile.expand(model) for path, profile in zip(args.profile, profiles, strict=True)}
    engines = {
        name: profile.engine_here(model.device.type) for name, profile in zip(extra, profiles, strict=True)
    }  # what each profile was measured on
    engine = args.engine
    if engine != "auto":
        engines = {}
    elif profiles:
        engine = next(iter(engines.values()))
    else:
        texts = bench_prompts(model, 2)
        full = preset("exact", model.grids).expand(model.grids, len(model.transformer.chunk_layers))
        engine = engine_for(engine, model, full, texts, [0, 1]).name
    rows = compare(
        model,
        names,
        extra_steps=extra,
        rounds=args.rounds,
        batch=batch,
        prompts=args.prompts,
        threads=threads,
        engine=engine,
        engines=engines,
    )
    print(json.dumps(rows, indent=2) if args.json else format_table(rows))
    return 0


def presets(text: str) -> list[str]:
    """Names of presets with commas between them, each once. Raises UsageError for an unknown one."""
    from stagevar.schedule import PRESETS

    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in names:
        if word not in PRESETS:
            near = difflib.get_close_matches(word[:60], PRESETS, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else f"; use {', '.join(PRESETS)}"
            raise UsageError(f"--compare: unknown schedule {shown(word)}{hint}")
    return names


def shared(what: str, values: Sequence[Any]) -> Any:
    """What all profiles agree on, None without any. Raises UsageError where they do not."""
    different = list(dict.fromkeys(values))
    if len(different) > 1:
        raise UsageError(f"the profiles differ in {what} ({', '.join(map(str, different))}); give --{what}")
    return different[0] if different else None


def run_memory(args: argparse.Namespace) -> int:
    """Prints one column per schedule and KV cache; the precision is a GPU's unless given."""
    from stagevar.models.memory import MIB, estimate_model
    from stagevar.models.registry import model_parts, published, resolve
    from stagevar.schedule import preset
    from stagevar.tensors.cache import KV_CACHES

    names = presets(args.compare)
    if not names:
        raise UsageError("--compare names no schedule; give presets with commas between them")
    if args.card is not None and not args.card > 0:
        raise UsageError(f"--card {args.card:g} must be a number of GiB above 0")
    options = {"device": args.device, "batch": args.batch, "dtype": "bfloat16", **given_options(args)}
    grids = model_parts(resolve(args.model, **options)).grids
    caches = [options.pop("kv_cache")] if "kv_cache" in options else KV_CACHES
    columns = {
        f"{name}, {cache}": estimate_model(
            args.model, schedule=preset(name, grids, published(args.model)), kv_cache=cache, **options
        )
        for name in names
        for cache in caches
    }
    rows = {line[:40].strip(): [] for line in next(iter(columns.values())).lines()}
    for needed in columns.values():
        for line in needed.lines():
            rows[line[:40].strip()].append(line[40:].removesuffix(" MiB").strip())
    if args.card is not None:
        fits = ["yes" if needed.generating <= args.card * 1024 * MIB else "no" for needed in columns.values()]
        rows[f"sampling fits {args.card:g} GiB"] = fits
        for name, values in _study_rows(args, columns, options).items():
            rows[f"{name}, {args.card:g} GiB"] = values
    print(f"{args.model}, batch {args.batch}, MiB")
    print(f"{'':<40}" + "".join(f"{name:>28}" for name in columns))
    for name, values in rows.items():
        print(f"{name:<40}" + "".join(f"{value:>28}" for value in values))
    return 0


def _study_rows(
    args: argparse.Namespace, columns: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, list[str]]:
    """What a study on the card draws and times at once, per schedule and KV cache: labels to values."""
    from stagevar.models.memory import MIB, largest_batch
    from stagevar.models.memory_plan import CARD_SHARE, STUDY_BATCH, timed_beside_full

    card_bytes = int(args.card * 1024 * MIB)
    drawn, timed = [], {"eager": [], "graph": []}
    for column in columns:
        name, cache = column.rsplit(", ", 1)
        chosen = {**options, "kv_cache": cache}
        one = {key: value for key, value in chosen.items() if key != "batch"}
        drawn.append(str(largest_batch(args.model, STUDY_BATCH, int(CARD_SHARE * card_bytes), **one)))
        for engine, values in timed.items():
            values.append(str(timed_beside_full(args.model, name, engine, card_bytes, **one)))
    label = "timed beside the full schedule"
    return {"images a study draws at once": drawn, **{f"{label}, {e}": values for e, values in timed.items()}}


def run_analyze(args: argparse.Namespace) -> int:
    """Writes the analysis and prints its proposal with the reasons."""
    from stagevar.analysis import analyze, find_similarity, nano_inputs
    from stagevar.analysis.plots import draw
    from stagevar.sampling.bench import bench_prompts

    extras.require("stagevar analyze", "matplotlib", *(["scipy"] if args.model == "nano" else []))
    device = check_loading(args, args.model)
    out = check_output_folder(args.out or Path("outputs") / f"analysis-{args.model}", "--out")
    given = prompts_of_file(args)
    options: dict[str, Any] = {"ablation_prompts": 0} if args.ranks else {}
    wanted = args.similarity or (["clip:model=nano"] if args.model == "nano" else [])
    try:
        options["similarities"] = [
            find_similarity(text, device if args.device == "auto" else args.device) for text in wanted
        ]
    except UsageError as error:
        if args.similarity:
            raise
        warnings.warn(f"CLIP similarity is left out: {error}", stacklevel=2)
    model = load(args)
    if model.name == "nano" and given is None:
        prompts, seeds, options["quality"] = nano_inputs(args.prompts, args.seed)
    else:
        prompts = bench_prompts(model, args.prompts) if given is None else given
        seeds = [args.seed + i for i in range(len(prompts))]

    def progress(what: str, done: int, total: int) -> None:
        print(f"\r{what} {done}/{total}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)

    found = analyze(model, prompts, seeds, progress=progress if sys.stderr and sys.stderr.isatty() else None, **options)
    files = [*found.save(out), *draw(found, Path(out))]
    for name, reason in found.reasons.items():
        print(f"{name}: {reason}")
    for path in files:
        print(path)
    return 0


def run_refit(args: argparse.Namespace) -> int:
    """Fits on full generations, writes the classifier and prints how well it does."""
    from stagevar.analysis.skipvar_fit import check_file, check_fitting, refit
    from stagevar.sampling.bench import bench_prompts
    from stagevar.sampling.sampler import Sampler

    if not 0 < args.target < 1:
        raise UsageError(f"target {args.target} must lie between 0 and 1")
    check_loading(args, args.model)
    check_file(args.out)
    given = prompts_of_file(args)
    check_fitting(args.prompts if given is None else len(given), args.weights == "random")
    model = load(args)
    prompts = bench_prompts(model, args.prompts) if given is None else given
    fit = refit(Sampler(model), prompts, [args.seed + i for i in range(len(prompts))], args.target, name=args.out.stem)
    fit.save(args.out)
    print(json.dumps(fit.to_dict()["fit"], indent=2))
    print(args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `stagevar`. Exit codes as in stagevar.errors."""

    def run() -> int:
        args = build_parser().parse_args(argv)
        return args.run(args)

    return report_errors("stagevar", run)


if __name__ == "__main__":
    sys.exit(main())
