"""What each cell of a sweep occupies on the cluster that is there: GPUs that its file leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
