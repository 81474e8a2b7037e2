"""What Ray's list of nodes says about their GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

#: What Ray puts before a GPU's kind in the name of a resource.
KIND_PREFIX = "accelerator_type:"


def kind_of(resources: Iterable[str]) -> str | None:
    """The kind of GPU among the names of a node's resources, or of those that are asked for; None if none is named."""
    return next((name.removeprefix(KIND_PREFIX) for name in resources if name.startswith(KIND_PREFIX)), None)


def gpu_kinds(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The kind of GPU of every node that has any, by Ray's accelerator type."""
    return {node: kind_of(resources) or "unnamed" for node, resources in nodes.items() if resources.get("GPU")}


def gpus_listed(nodes: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str]) -> str:
    """The cluster's GPUs for a message, such as "8 x H100, 4 x L40"."""
    totals: Counter[str] = Counter()
    for node, kind in kinds.items():
        totals[kind] += int(nodes[node]["GPU"])
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(totals.items()))
