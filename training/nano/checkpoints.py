"""Training checkpoints: a folder of safetensors shards, each under 16 MiB, and one JSON file that names them.

A checkpoint is written next to the old one and swapped in by renaming, so a killed run leaves a whole one behind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from stagevar.errors import WeightsError

MAX_SHARD_BYTES = 15 * 2**20


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors (split over shards) and a JSON-able state. One tensor larger than a shard gets a shard alone."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = MAX_SHARD_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = tensor.detach().contiguous()
        room -= size
    for index, shard in enumerate(shards):
        save_file(shard, new / f"shard-{index:02d}.safetensors")
    (new / "state.json").write_text(json.dumps({**state, "shards": len(shards)}, indent=1))
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint. Raises WeightsError if it is missing or torn."""
    if not (folder / "state.json").exists() and folder.with_name(folder.name + ".old").exists():
        folder = folder.with_name(folder.name + ".old")  # killed between the two renames
    try:
        state = json.loads((folder / "state.json").read_text())
        tensors: dict[str, Tensor] = {}
        for index in range(state["shards"]):
            tensors.update(load_file(folder / f"shard-{index:02d}.safetensors"))
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"no usable checkpoint in {folder} ({error}); start without --resume") from error
    return tensors, state
