"""Large text encoders of all families: loaded when a prompt needs them, freed before the model needs the memory.

Features are cached on disk, so that tuning loads an encoder once and encodes all its prompts. A server, whose prompts have no
end, keeps those of the last ones in memory instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stagevar.folders import cache_dir, visible
from stagevar.models.hub import HubFile, sha256_files


class FeatureCache:
    """Named tensors per text on disk, keyed by text, encoder identity and dtype.

    Args:
        identity: what makes two encoders give different features (revision or file hashes, dtype, length limit).
        folder: where to keep them (default: the user's cache; without one they are kept in memory).
    """

    def __init__(self, identity: str, folder: Path | None = None):
        self._identity = identity
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        cache = cache_dir()
        base = folder or (None if cache is None else cache / "text")
        self._folder = None if base is None else base / digest
        self._kept: dict[str, dict[str, Tensor]] = {}

    def _path(self, folder: Path, text: str) -> Path:
        return folder / (hashlib.sha256(f"{self._identity}\0{text}".encode()).hexdigest() + ".safetensors")

    def get(self, text: str) -> dict[str, Tensor] | None:
        """The features of a text, None when they are not cached or not readable."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self._folder is None:
            return self._kept.get(text)
        try:
            return load_file(self._path(self._folder, text))
        except (OSError, SafetensorError):
            return None

    def put(self, text: str, features: dict[str, Tensor]) -> None:
        """Stores features; a cache that cannot be written is left alone."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self._folder is None:
            self._kept[text] = features
            return
        path = self._path(self._folder, text)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in features.items()}, partial)
            partial.replace(path)
        except (OSError, SafetensorError):  # SafetensorError: its way of saying that the disk is full
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


class RecentFeatures:
    """Named tensors of the texts that were used last, in memory.

    Args:
        most: texts that are kept.
    """

    def __init__(self, most: int):
        self._most = most
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def get(self, text: str) -> dict[str, Tensor] | None:
        """The features of a text, None when they are not kept."""
        if text in self._kept:
            self._kept.move_to_end(text)
        return self._kept.get(text)

    def put(self, text: str, features: dict[str, Tensor]) -> None:
        """Keeps features; those of the text that was not used for longest make room."""
        # Copies, since a row may be a view of its whole batch.
        self._kept[text] = {name: value.clone() for name, value in features.items()}
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


class LazyEncoder(ABC):
    """A text encoder that is loaded when a prompt needs it and can be freed.

    Args:
        source: hub repository, or a local folder.
        device: where it runs.
        cache_folder: used instead of the user's cache.

    Attributes:
        loaded_files: patterns of a local folder's files that determine the features.
    """

    loaded_files: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: HubFile | Path | str, device: torch.device | str, cache_folder: Path | None):
        self.source = source if isinstance(source, HubFile) else Path(source)
        self.device = torch.device(device)
        self._cache_folder = cache_folder
        self._cache: FeatureCache | RecentFeatures | None = None
        self._loaded: tuple[Any, Any] | None = None

    @property
    def loaded(self) -> bool:
        """Whether the encoder is in memory."""
        return self._loaded is not None

    @abstractmethod
    def _load(self) -> tuple[Any, Any]:
        """Tokenizer and model, loaded unless they are in memory. Raises WeightsError if they are unavailable."""

    def load(self) -> None:
        """Loads the encoder now, whatever is cached. Raises WeightsError if it is unavailable."""
        self._load()

    def keep_recent(self, most: int) -> None:
        """From now on keeps features in memory alone, of the `most` texts that were used last: for texts without end."""
        self._cache = RecentFeatures(most)

    def provenance(self) -> dict[str, object]:
        """What profiles record: repository and revision, or the hashes of the local files."""
        if isinstance(self.source, HubFile):
            return {"repo": self.source.repo, "revision": self.source.revision}
        return {"path": str(self.source), "sha256": sha256_files(self._files(self.source))}

    def _files(self, folder: Path) -> Collection[Path]:
        return {path for pattern in self.loaded_files for path in visible(folder.glob(pattern))}

    @abstractmethod
    def _identity(self, known: dict[str, object]) -> list[object]:
        """What makes two encoders give different features, as plain data; `known` is the provenance without a path."""

    @abstractmethod
    def _run(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Features of the prompts, not from the cache."""

    def _features(self, prompts: Iterable[str], batch: int) -> dict[str, dict[str, Tensor]]:
        """By prompt: from the cache, or run in this order, `batch` at a time; a prompt that repeats is run once."""
        if self._cache is None:
            known = self.provenance()
            known.pop("path", None)
            self._cache = FeatureCache(json.dumps(self._identity(known), sort_keys=True), self._cache_folder)
        wanted = list(dict.fromkeys(prompts))
        found = {prompt: cached for prompt in wanted if (cached := self._cache.get(prompt)) is not None}
        todo = [prompt for prompt in wanted if prompt not in found]
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            for prompt, features in zip(part, self._run(part), strict=True):
                self._cache.put(prompt, features)
                found[prompt] = features
        return found

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Any:
        """Features of the prompts, from the cache if possible."""

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encodes prompts into the cache and frees the encoder; later `encode` calls for them load nothing."""
        self.encode(prompts)
        self.release()

    def release(self) -> None:
        """Frees the encoder's memory; it is loaded again when needed."""
        self._loaded = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
