"""`stagevar bench`: times schedules in one interleaved run, or measures a running server."""

from __future__ import annotations

import argparse
import dataclasses
import json

from stagevar.cli.arguments import (
    existing_file,
    name_value,
    path_value,
    positive_int,
)
from stagevar.cli.model_options import (
    Verbs,
    add_model_options,
    add_running_options,
    check_running,
    model_request,
    presets,
    shared,
)
from stagevar.errors import UsageError


def add(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("bench", help="time schedules against the full one in one interleaved run")
    add_model_options(parser, required=False)
    parser.add_argument(
        "--profile", type=path_value, action="append", default=[], help="a profile to time (may be repeated)"
    )
    parser.add_argument("--compare", default="exact,stagevar-paper,stagevar-released", help="comma-separated presets")
    parser.add_argument("--rounds", type=positive_int, default=10, help="timed runs per schedule (default: 10)")
    add_running_options(parser, batch="the profile's, else 1", threads="the profile's, else 1; pinned")
    parser.add_argument(
        "--prompts", type=positive_int, default=32, help="prompts for the quality columns (default: 32)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_server_measuring(parser)
    parser.set_defaults(run=run)


def add_server_measuring(bench: argparse.ArgumentParser) -> None:
    """Options of `bench` for a running server."""
    bench.add_argument("--serve", metavar="URL", type=name_value, help="measure a running server instead of schedules")
    bench.add_argument(
        "--concurrency", default="1,2,4,8", help="with --serve: numbers of concurrent clients (default: 1,2,4,8)"
    )
    bench.add_argument(
        "--requests", type=positive_int, default=64, help="with --serve: requests per level (default: 64)"
    )
    bench.add_argument(
        "--api-key-file",
        type=existing_file,
        help="with --serve: file of API keys, one per line; the first is sent",
    )


def run(args: argparse.Namespace) -> int:
    """Prints one row per schedule: latency, ratio to the full schedule, tokens, memory, quality against it."""
    if args.serve is not None:
        return bench_server(args)
    from stagevar.models.registry import load_model
    from stagevar.profile import Profile
    from stagevar.profile.engine_choice import engine_for
    from stagevar.sampling.bench import bench_prompts, compare, format_table
    from stagevar.schedule import preset

    profiles = [Profile.load(path) for path in args.profile]
    if args.model is None:
        if not profiles:
            raise UsageError("give --model NAME or --profile FILE")
        args.model = profiles[0].model.name
    request = model_request(args)
    if profiles:
        request = request.over(dataclasses.replace(profiles[0].model.request, name=args.model))
    batch = args.batch or shared("batch", [profile.envelope.batch for profile in profiles]) or 1
    threads = args.threads or shared("threads", [profile.envelope.threads for profile in profiles]) or 1
    if args.resolution is None:
        shared("resolution", [profile.model.load.resolution for profile in profiles])
    if batch > args.prompts:
        raise UsageError(f"batch {batch} is larger than the {args.prompts} prompts; raise --prompts")
    names = presets(args.compare)
    check_running(request, args.engine, threads)
    model = load_model(request)
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


def bench_server(args: argparse.Namespace) -> int:
    """Prints one row per number of clients at once: latency, images per second, statuses."""
    from stagevar.models.nano.scenes import prompts
    from stagevar.serving.load import format_levels, measure_server
    from stagevar.serving.server import keys_of

    try:
        levels = [positive_int(word) for word in args.concurrency.split(",")]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--concurrency: {error}") from None
    key = None if args.api_key_file is None else keys_of(args.api_key_file)[0]
    texts = [metadata["prompt"] for metadata in prompts("heldout", args.prompts)]
    rows = [level.row() for level in measure_server(args.serve, levels, args.requests, texts, key)]
    print(json.dumps(rows, indent=2) if args.json else format_levels(rows))
    return 0
