"""What Ray's list of nodes says about their GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_KIND_PREFIX = "accelerator_type:"


def gpu_kinds(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The kind of GPU of every node that has any, by Ray's accelerator type."""
    kinds: dict[str, str] = {}
    for node, resources in nodes.items():
        if resources.get("GPU"):
            names = [name.removeprefix(_KIND_PREFIX) for name in resources if name.startswith(_KIND_PREFIX)]
            kinds[node] = names[0] if names else "unnamed"
    return kinds


def gpus_listed(nodes: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str]) -> str:
    """The cluster's GPUs for a message, such as "8 x H100, 4 x L40"."""
    totals: Counter[str] = Counter()
    for node, kind in kinds.items():
        totals[kind] += int(nodes[node]["GPU"])
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(totals.items()))
