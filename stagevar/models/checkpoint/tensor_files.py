"""Files of tensors, read and written: safetensors or torch, sharded or not; shapes first, values one at a time.

Nothing in a file is executed: safetensors, or torch.load with weights_only; both memory-mapped.
"""

from __future__ import annotations

import argparse
import json
import pickle
import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stagevar.errors import WeightsError, reason_of
from stagevar.models.checkpoint.kinds import kind_in_safetensors, kind_of
from stagevar.models.checkpoint.state_dicts import find_state_dict

SHARD_BYTES = 4 * 2**30
#: File names of transformers and diffusers, the preferred first.
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_INDICES = tuple(f"{stem}.{suffix}.index.json" for stem in _STEMS for suffix in ("safetensors", "bin"))
_SINGLES = tuple(f"{stem}.{suffix}" for suffix in ("safetensors", "bin") for stem in _STEMS)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


class TensorFile(ABC):
    """The tensors of one checkpoint, possibly sharded: shapes first, values one at a time.

    Args:
        shapes, kinds: by the name in the file; kinds are those of `checkpoint.kinds`.
    """

    def __init__(self, files: Iterable[Path], shapes: dict[str, tuple[int, ...]], kinds: Mapping[str, str]):
        self.files, self.shapes, self.kinds = tuple(files), shapes, kinds

    @abstractmethod
    def read(self, key: str, device: torch.device) -> Tensor:
        """The tensor on `device`, in the file's dtype; on the CPU a view of the mapped file."""


class _SafetensorsFile(TensorFile):
    def __init__(self, paths: list[Path], device: torch.device):
        shapes: dict[str, tuple[int, ...]] = {}
        kinds: dict[str, str] = {}
        self._handles: dict[str, safe_open] = {}
        for path in paths:
            try:
                handle = safe_open(str(path), framework="pt", device=str(device))
                for key in handle.keys():  # noqa: SIM118  the handle is not a mapping
                    entry = handle.get_slice(key)
                    shapes[key], kinds[key] = tuple(entry.get_shape()), kind_in_safetensors(entry.get_dtype())
                    self._handles[key] = handle
            except (SafetensorError, OSError, ValueError) as error:
                raise WeightsError(f"cannot read weights {path}: {read_error(error)}; download it again") from None
        super().__init__(paths, shapes, kinds)

    def read(self, key: str, device: torch.device) -> Tensor:
        return self._handles[key].get_tensor(key).to(device)


class _TorchFile(TensorFile):
    def __init__(self, paths: list[Path], nested: tuple[tuple[str, ...], ...], expected: Collection[str]):
        self._tensors: dict[str, Tensor] = {}
        for path in paths:
            loaded = _load_pickle(path)
            tensors = find_state_dict(loaded, nested, expected)
            if tensors is None:
                keys = ", ".join(map(str, list(loaded)[:6])) if isinstance(loaded, dict) else type(loaded).__name__
                raise WeightsError(
                    f"weights {path} hold no state dict of this model (found: {keys[:200] or 'nothing'})"
                )
            self._tensors.update(tensors)
        kinds = {key: kind_of(value) for key, value in self._tensors.items()}
        shapes = {key: () if kinds[key] == "nested" else tuple(value.shape) for key, value in self._tensors.items()}
        super().__init__(paths, shapes, kinds)

    def read(self, key: str, device: torch.device) -> Tensor:
        return self._tensors[key].to(device)


def read_error(error: BaseException) -> str:
    """The first sentence of a library's message."""
    return reason_of(error, 1000).split(". ")[0].rstrip(".")[:160]


def _load_pickle(path: Path) -> Any:
    """torch.load with weights_only, memory-mapped if the file's format allows."""
    # Trainers store their arguments next to the weights; a Namespace holds attributes and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used with files saved with" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "global" in str(error).lower():
                raise WeightsError(
                    f"weights {path} contain Python objects besides tensors; save a plain state dict instead"
                ) from None
            raise WeightsError(f"cannot read weights {path}: not a torch file, or corrupt; download it again") from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise WeightsError(f"cannot read weights {path}: {read_error(error)}; download it again") from None


def open_weights(
    path: Path | str,
    nested: tuple[tuple[str, ...], ...] = (),
    device: torch.device | str = "cpu",
    expected: Collection[str] = (),
) -> TensorFile:
    """Opens a .safetensors or torch file, a sharded folder or its index file, without reading tensor data.

    Args:
        nested, expected: see `find_state_dict`.

    Raises:
        WeightsError: if it is missing, truncated, corrupt, unsafe, or holds no state dict.
    """
    path, device = Path(path), torch.device(device)
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise WeightsError(f"no weights at {path}; give a file, a folder of shards, or 'random'")
    if path.name.endswith(".index.json"):
        paths, indexed = _shards(path)
    else:
        paths, indexed = [path], None
    if paths[0].suffix.lower() == ".safetensors":
        opened: TensorFile = _SafetensorsFile(paths, device)
    else:
        opened = _TorchFile(paths, nested, expected)
    if indexed is not None and len(opened.shapes) < len(indexed):
        raise WeightsError(f"shards of {path} hold {len(opened.shapes)} of {len(indexed)} tensors; download them again")
    return opened


def weights_files(folder: Path) -> list[Path]:
    """An index of shards or a file under a usual name, otherwise all weights files in a folder; none without any.

    Raises:
        WeightsError: for an unreadable folder.
    """
    for name in (*_INDICES, *_SINGLES):
        if (folder / name).is_file():
            return [folder / name]
    try:
        return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES and path.name[0] != "."]
    except OSError as error:
        raise WeightsError(f"folder {folder} cannot be read: {error.strerror or error}") from None


def weights_in(folder: Path) -> Path:
    """The weights of a folder: an index of shards or a file under a usual name, otherwise the only weights file in it.

    Raises:
        WeightsError: for an unreadable folder, and one without weights or with several candidates.
    """
    found = weights_files(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(f"folder {folder} holds {len(found)} weights files ({found[0].name}, ...); name one of them")
    raise WeightsError(f"folder {folder} holds no weights ({', '.join(_SINGLES[:4])} or *.pth); name a file")


def _shards(index: Path) -> tuple[list[Path], set[str]]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        paths = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"cannot read shard index {index}: {read_error(error)}; download it again") from None
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(f"shard {missing[0]} that {index} lists is missing; download it again")
    if not names:
        raise WeightsError(f"shard index {index} lists no weights; download it again")
    return paths, set(weight_map)


def save_weights(module: nn.Module, folder: Path, stem: str, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes a module as `stem`.safetensors, or as shards plus `stem`.safetensors.index.json above `shard_bytes`.

    One shard at a time is copied to memory. Returns the files to open (the index first when there is one).
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in module.state_dict().items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        # Clones, since two names may share storage (the tokenizer's quantizer is registered twice).
        save_file({key: value.detach().cpu().clone() for key, value in shard.items()}, folder / name)
    paths = [folder / name for name in names]
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = folder / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}, indent=1))
        paths.insert(0, index)
    return paths
