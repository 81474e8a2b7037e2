"""`--dry-run`: a study's plan, in words or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tuner.cli.plan import Plan, error_share_of
from tuner.config import costs
from tuner.config.prompts import set_sizes
from tuner.config.quality import quality_limits
from tuner.config.space import SearchSpace
from tuner.statistics.provable import limit_lines, limits_table


def print_plan(checked: Plan) -> int:
    space, args = checked.space, checked.args
    limits = () if args.weights == "random" else quality_limits(space.quality, args.max_drop)
    judged = args.weights != "random" and args.effort != "instant"
    (search, heldout), micro_batch = set_sizes(space.prompts), space.prompts.micro_batch
    share = error_share_of(args.effort)
    schedules, most = args.trials, args.most_trials
    if args.effort == "instant":
        from tuner.study.instant import TIMED

        schedules = most = TIMED
    images = costs.images_at_most(args.most_trials, search, heldout) if judged else 0
    downloads, memory = costs.downloads_of(checked.model, space.quality), costs.memory_plan(checked.model, micro_batch)
    known = ["the full schedule", *space.known]
    if args.json:
        plan_data = {
            "model": args.model,
            "budget": args.budget.text,
            "engine": args.engine,
            "space": {"source": str(args.space or "default"), **space.to_data()},
            "prompts": {"source": space.prompts.source, "search": search, "heldout": heldout},
            "limits": limits_table(limits, heldout, micro_batch, share),
            "without_limit": [m.metric for m in limits if m.max_drop is None],
            "run_directory": str(checked.run_dir),
            "schedules": schedules,
            "schedules_at_most": most,
            "enqueued": known,
            "searched": [p.name for p in space.parameters],
            "micro_batch": micro_batch,
            "settings": space.settings,
            "images_at_most": images,
            "downloads": [dataclasses.asdict(download) for download in downloads],
            "memory": None if memory is None else dataclasses.asdict(memory),
        }
        print(json.dumps(plan_data, indent=2))
        return 0
    settings = "infinitely many: a parameter is continuous" if space.settings is None else f"{space.settings:,}"
    lines = limit_lines(limits, heldout, micro_batch, share, judged) or ["none: random weights have no quality"]
    rows: list[tuple[str, Any]] = [
        ("model", args.model),
        ("budget", args.budget.text),
        ("engine", args.engine),
        ("space", f"{args.space or 'default'}; structure stage from scale {space.semantic_end}"),
        *_parameter_rows(space),
        ("prompts", f"source {space.prompts.source}, search {search}, heldout {heldout}"),
        *(("limit", line) for line in lines),
        ("run directory", checked.run_dir),
        ("schedules", f"{schedules}, up to {most} if few keep the limits" if most > schedules else schedules),
        ("enqueued", ", ".join(known)),
        ("micro batch", micro_batch),
        ("settings", settings),
        ("images at most", f"{images:,}" if judged else "none, no image is judged"),
        *(("file", download.line) for download in downloads),
        ("memory", memory.line if memory else "fits anywhere"),
    ]
    for name, value in rows:
        print(f"{name:<16} {value}")
    print("dry run: nothing was loaded, measured or written")
    return 0


def _parameter_rows(space: SearchSpace) -> list[tuple[str, str]]:
    """Every searched parameter with its values, and the floors of metrics."""
    data: Mapping[str, Any] = space.to_data()
    rows = []
    for name, values in data["parameters"].items():
        text = ", ".join(map(str, values)) if isinstance(values, list) else f"{values['low']} to {values['high']}"
        rows.append((f"  {name}", text))
    floors = data["constraints"]["floors"]
    return [*rows, *(("  floor", f"{metric} {value:g}") for metric, value in floors.items())]
