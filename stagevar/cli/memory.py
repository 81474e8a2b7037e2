"""`stagevar memory`: estimates what schedules need, without loading weights."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable

from stagevar.cli.arguments import (
    finite_number,
    positive_int,
)
from stagevar.cli.model_options import (
    Verbs,
    add_model_options,
    model_request,
    presets,
)
from stagevar.errors import UsageError
from stagevar.models.request import ModelRequest


def add(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("memory", help="estimate memory per schedule without loading weights")
    add_model_options(parser)
    parser.add_argument("--compare", default="exact,stagevar-paper", help="comma-separated presets")
    parser.add_argument("--batch", type=positive_int, default=1, help="images per run (default: 1)")
    parser.add_argument(
        "--card", type=finite_number, metavar="GIB", help="memory of a card in GiB; the table then says what fits"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints one column per schedule and KV cache; the precision is a GPU's unless given."""
    from stagevar.models.memory import MIB, estimate_model
    from stagevar.models.registry import model_parts, published, resolve
    from stagevar.schedule import preset
    from stagevar.tensors.cache import KV_CACHES

    names = presets(args.compare)
    if not names:
        raise UsageError("--compare names no schedule; give comma-separated presets")
    if args.card is not None and not args.card > 0:
        raise UsageError(f"--card {args.card:g} must be a number of GiB above 0")
    request = model_request(args).over(ModelRequest(args.model, batch=args.batch, dtype="bfloat16"))
    if args.card is not None:
        import torch

        # The card is a GPU whatever this machine has: a GPU loads the text encoder in half precision.
        request = dataclasses.replace(request, device=torch.device("cuda"))
    grids = model_parts(resolve(request)).grids
    caches = KV_CACHES if request.kv_cache is None else [request.kv_cache]
    columns = {
        f"{name}, {cache}": estimate_model(
            dataclasses.replace(request, schedule=preset(name, grids, published(args.model)), kv_cache=cache)
        )
        for name in names
        for cache in caches
    }
    uses = next(iter(columns.values())).rows
    rows = {use: [f"{needed.rows[use] / MIB:,.0f}" for needed in columns.values()] for use in uses}
    if args.card is not None:
        fits = ["yes" if needed.generating <= args.card * 1024 * MIB else "no" for needed in columns.values()]
        rows[f"sampling fits {args.card:g} GiB"] = fits
        for name, values in _study_rows(request, columns, args.card).items():
            rows[f"{name}, {args.card:g} GiB"] = values
    width = max(40, *(len(name) + 1 for name in rows))
    print(f"{args.model}, batch {args.batch}, MiB")
    print(f"{'':<{width}}" + "".join(f"{name:>28}" for name in columns))
    for name, values in rows.items():
        print(f"{name:<{width}}" + "".join(f"{value:>28}" for value in values))
    return 0


def _study_rows(request: ModelRequest, columns: Iterable[str], card_gib: float) -> dict[str, list[str]]:
    """What a study on the card draws and times at once, per schedule and KV cache: labels to values."""
    from stagevar.models.memory import MIB, estimate_model, largest_batch
    from stagevar.models.memory_plan import CARD_SHARE, STUDY_BATCH, timed_beside_full

    card_bytes = int(card_gib * 1024 * MIB)
    drawn: list[str] = []
    timed: dict[str, list[str]] = {"eager": [], "graph": []}
    for column in columns:
        name, cache = column.rsplit(", ", 1)
        one = dataclasses.replace(request, kv_cache=cache, batch=1)
        fits = estimate_model(one).least <= card_bytes
        drawn.append(str(largest_batch(one, STUDY_BATCH, int(CARD_SHARE * card_bytes))) if fits else "none")
        for engine, values in timed.items():
            values.append(str(timed_beside_full(one, name, engine, card_bytes) or "none"))
    label = "have room beside the full schedule"
    return {"images a study draws at once": drawn, **{f"{label}, {e}": values for e, values in timed.items()}}
