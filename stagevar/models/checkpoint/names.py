"""Names of weights as trainers write them, matched to a module's own.

Every wrapper a trainer puts around a module adds a part to the names below it: as a prefix when it wraps the model, in the
middle when it wraps a block. Names are compared without these parts, on both sides, since a module may use one of them
itself (Infinity's `block_chunks.0.module.0`).

Source: names of the attributes that hold the wrapped module in PyTorch (DistributedDataParallel, torch.compile, FSDP,
checkpoint_wrapper, AveragedModel), FairScale, Lightning and PEFT (facts).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

#: Attributes in which wrappers keep the module that they wrap.
WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_wrapped_module",
        "_forward_module",
        "_original_module",
        "_module",
        "base_layer",
    }
)
#: Parts that all names of a file may share before the module's own begin, as `model.` or `base_model.model.`.
_MOST_PREFIXES = 4


def without_wrappers(name: str) -> str:
    """A name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def bare_names(shapes: Mapping[str, tuple[int, ...]], expected: Collection[str]) -> dict[str, str]:
    """File's name -> the same name without wrappers and without a prefix that all names share.

    Args:
        shapes: by the file's names. Counters (0-dimensional) that trainers keep next to weights need not share the
            prefix.
        expected: the module's names without wrappers; the prefix removed is the shortest one that makes the most of
            them appear.
    """
    bare = {name: without_wrappers(name) for name in shapes}
    split = [bare[name].split(".") for name, shape in shapes.items() if shape != ()]
    best, most = 0, _present(bare.values(), expected, 0)
    for length in range(1, _MOST_PREFIXES + 1):
        if not split or any(len(parts) <= length or parts[:length] != split[0][:length] for parts in split):
            break
        count = _present(bare.values(), expected, length)
        if count > most:
            best, most = length, count
    return {name: ".".join(own.split(".")[best:]) or own for name, own in bare.items()}


def _present(names: Iterable[str], expected: Collection[str], length: int) -> int:
    return sum(".".join(name.split(".")[length:]) in expected for name in names)
