"""`stagevar memory`: estimates what schedules need, without loading weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from stagevar.cli.arguments import (
    finite_number,
    positive_int,
)
from stagevar.cli.model_options import (
    Verbs,
    add_model_options,
    given_options,
    presets,
)
from stagevar.errors import UsageError


def add(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("memory", help="estimate memory per schedule without loading weights")
    add_model_options(parser)
    parser.add_argument("--compare", default="exact,stagevar-paper", help="comma list of presets")
    parser.add_argument("--batch", type=positive_int, default=1, help="images per run (default: 1)")
    parser.add_argument("--card", type=finite_number, metavar="GIB", help="memory of a card, to say what fits")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
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
    uses = next(iter(columns.values())).rows
    rows = {use: [f"{needed.rows[use] / MIB:,.0f}" for needed in columns.values()] for use in uses}
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
    drawn: list[str] = []
    timed: dict[str, list[str]] = {"eager": [], "graph": []}
    for column in columns:
        name, cache = column.rsplit(", ", 1)
        chosen = {**options, "kv_cache": cache}
        one = {key: value for key, value in chosen.items() if key != "batch"}
        drawn.append(str(largest_batch(args.model, STUDY_BATCH, int(CARD_SHARE * card_bytes), **one)))
        for engine, values in timed.items():
            values.append(str(timed_beside_full(args.model, name, engine, card_bytes, **one)))
    label = "timed beside the full schedule"
    return {"images a study draws at once": drawn, **{f"{label}, {e}": values for e, values in timed.items()}}
