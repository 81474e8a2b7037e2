"""What each cell of a sweep occupies on the cluster that is there, and whether any node can hold it.

Ray waits forever for resources that no node has, so that is found out before the first cell starts. The answer counts at once,
as for a study's --gpu-kind: which nodes an autoscaler might add cannot be asked of Ray in advance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stagevar.errors import UsageError
from tuner.cluster.nodes import KIND_PREFIX, kind_of

#: Amounts by Ray's names of resources.
Resources = Mapping[str, float]


def with_default_gpus(wanted: Mapping[str, Resources], nodes: Sequence[Resources]) -> dict[str, Resources]:
    """Gives a GPU to each cell that states none, if any node has one.

    Studies that share a GPU would time each other, so a cell shares one only where the file says so.

    Args:
        wanted: resources by a cell's name; "GPU" is absent if its file does not say.
        nodes: resources of each living node.
    """
    if not any(node.get("GPU") for node in nodes):
        return dict(wanted)
    return {name: {"GPU": 1, **resources} for name, resources in wanted.items()}


def placed(wanted: Mapping[str, Resources], nodes: Sequence[Resources]) -> dict[str, Resources]:
    """The cells' resources with kinds of GPU spelled as Ray spells them. Raises UsageError for a cell that fits no node."""
    found: dict[str, Resources] = {}
    for name, resources in wanted.items():
        found[name] = {_spelled(resource, name, nodes): amount for resource, amount in resources.items()}
        if not any(_fits(found[name], node) for node in nodes):
            # Of the nodes that have the most of what is needed, the one with most GPUs, then CPUs.
            largest = max(nodes, key=lambda node: (_met(found[name], node), node.get("GPU", 0), node.get("CPU", 0)))
            raise UsageError(
                f"sweep cell {name} needs {_words(found[name])} on one node; the largest node has {_words(largest)}; change "
                "resources in the sweep file, or start a larger node first"
            )
    return found


def _spelled(resource: str, cell: str, nodes: Sequence[Resources]) -> str:
    """A resource by Ray's name, which distinguishes upper and lower case. Raises UsageError for a kind that no node has."""
    asked = kind_of([resource])
    if asked is None:
        return resource
    kinds = sorted({kind for node in nodes if node.get("GPU") and (kind := kind_of(node)) is not None})
    for kind in kinds:
        if kind.lower() == asked.lower():
            return KIND_PREFIX + kind
    known = ", ".join(kinds) or "no GPU of a known kind"
    raise UsageError(
        f"sweep cell {cell}: no GPU of kind {asked!r} in the cluster, which has {known}; "
        "correct gpus in the sweep file, or start such a node first"
    )


def _fits(resources: Resources, node: Resources) -> bool:
    return _met(resources, node) == len(resources)


def _met(resources: Resources, node: Resources) -> int:
    """How many of the amounts a node has."""
    return sum(amount <= node.get(name, 0) for name, amount in resources.items())


def _words(resources: Resources) -> str:
    """Such as "4 CPUs and 1 GPU of kind H100"."""
    kind = kind_of(resources)
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    text = f"{cpus:g} CPU{'' if cpus == 1 else 's'} and {gpus:g} GPU{'' if gpus == 1 else 's'}"
    return text + (f" of kind {kind}" if kind and gpus else "")
