"""`--dry-run`: a study's plan, in words or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tuner.cli.plan import Plan, error_share_of
from tuner.config.quality import quality_limits


def print_plan(checked: Plan) -> int:
    from tuner.config import costs
    from tuner.config.prompts import set_sizes
    from tuner.statistics.provable import limit_lines, limits_table

    space, args = checked.space, checked.args
    limits = () if args.weights == "random" else quality_limits(space.quality, args.max_drop)
    judged = args.weights != "random" and args.effort != "instant"
    (search, heldout), micro_batch = set_sizes(space.prompts), space.prompts.micro_batch
    share = error_share_of(args.effort)
    schedules, most = args.trials, args.most_trials
    if args.effort == "instant":
        from tuner.study.instant import TIMED

        schedules = most = TIMED
    downloads, memory = costs.downloads_of(checked.model, space.quality), costs.memory_plan(checked.model, micro_batch)
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
        "enqueued": ["the full schedule", *space.known],
        "searched": [p.name for p in space.parameters],
        "micro_batch": micro_batch,
        "settings": space.settings,
        "images_at_most": costs.images_at_most(args.most_trials, search, heldout) if judged else 0,
        "downloads": [dataclasses.asdict(download) for download in downloads],
        "memory": None if memory is None else dataclasses.asdict(memory),
    }
    if args.json:
        print(json.dumps(plan_data, indent=2))
    else:
        for key, value in plan_data.items():
            if key == "limits":
                for line in limit_lines(limits, heldout, micro_batch, share, judged) or [
                    "none: random weights have no quality"
                ]:
                    print(f"{'limit':<16} {line}")
                continue
            if key in ("without_limit", "searched", "schedules_at_most"):
                continue
            if key == "schedules" and most > value:
                value = f"{value}, up to {most} if few keep the limits"
            if key == "space":
                for line in _space_lines(value):
                    print(line)
                continue
            if key == "downloads":
                for download in downloads:
                    print(f"{'file':<16} {download.line}")
                continue
            if key == "memory":
                value = memory.line if memory else "fits anywhere"
            if key in ("settings", "images_at_most"):
                value = "infinitely many: a parameter is continuous" if value is None else f"{value:,}"
            if key == "images_at_most" and not judged:
                value = "none, no image is judged"
            if isinstance(value, dict):
                value = [f"{name} {entry}" for name, entry in value.items()]
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{key.replace('_', ' '):<16} {text}")
        print("dry run: nothing was loaded, measured or written")
    return 0


def _space_lines(space: Mapping[str, Any]) -> list[str]:
    """Where the space comes from, and every searched parameter with its values."""
    lines = [f"{'space':<16} {space['source']}; structure stage from scale {space['semantic_end']}"]
    for name, values in space["parameters"].items():
        text = ", ".join(map(str, values)) if isinstance(values, list) else f"{values['low']} to {values['high']}"
        lines.append(f"  {name:<14} {text}")
    floors = space["constraints"]["floors"]
    return [*lines, *(f"  {'floor':<14} {metric} {value:g}" for metric, value in floors.items())]
