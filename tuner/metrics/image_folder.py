"""Scores folders of images with any metrics, row by row into a file, so that a broken run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stagevar.errors import UsageError
from stagevar.text_files import read_json
from tuner.metrics.base import Metric, Prompt, SetMetric
from tuner.metrics.prompt_sets import read_prompts

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class FolderImage:
    """One image file; `name` is its path inside the folder, `prompt` "" if the folder says nothing."""

    name: str
    path: Path
    prompt: Prompt

    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3), upright. Raises UsageError if the file is no image."""
        try:
            with Image.open(self.path) as image:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UsageError(f"{self.path}: not a readable image ({type(error).__name__})") from None


def read_folder(folder: str | Path, prompts: str | Path | None = None) -> list[FolderImage]:
    """Images of a folder in order of name, with their prompts.

    GenEval's layout: 00000/metadata.jsonl and 00000/samples/0000.png. Otherwise every image in the folder or below; its
    prompt comes from `prompts` (see `prompt_sets.read_prompts`): an entry whose "file" or "item_id" is the image's path
    or stem, else the entries in order if there is one per image, else "". Raises UsageError if there are no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: not a folder")
    numbered = sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and path.name.isdigit() and (path / "metadata.jsonl").is_file()
    )
    if numbered:
        found = [
            FolderImage(str(path.relative_to(folder)), path, metadata)
            for subfolder in numbered
            for metadata in [_metadata_of(subfolder)]
            for path in _images(subfolder / "samples")
        ]
    else:
        paths = _images(folder)
        known = read_prompts(prompts) if prompts is not None else []
        found = [
            FolderImage(str(path.relative_to(folder)), path, prompt)
            for path, prompt in zip(paths, _assign(folder, paths, known), strict=True)
        ]
    if not found:
        raise UsageError(f"--images {folder}: no images in it ({', '.join(_SUFFIXES)})")
    return found


def evaluate_folder(
    images: Sequence[FolderImage],
    metrics: Mapping[str, Metric],
    *,
    references: Mapping[str, Path] | None = None,
    progress: Path | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, Any]]:
    """Per metric: its summary, the number of images, its description and one row per image.

    references: image path by name, for metrics that compare. progress: a JSON lines file; rows found in it are not
    computed again if metric, description and the image's and reference's bytes are the same. Set metrics are one value.
    """
    finished = _Progress(progress)
    results = {}
    for name, metric in metrics.items():
        if metric.needs_reference and references is None:
            raise UsageError(f"{name} compares with reference images: pass their folder with --reference")
        if metric.needs_prompt and not images[0].prompt:
            raise UsageError(f"{name} needs prompts: use GenEval's layout or pass --prompts FILE")
        described = metric.describe()
        if isinstance(metric, SetMetric):
            value = _set_value(metric, images, references, batch_size)
            results[name] = {"summary": {name: value}, "images": len(images), "metric": described, "rows": []}
            continue
        rows = _rows(
            name, metric, described, images, references if metric.needs_reference else None, finished, batch_size
        )
        results[name] = {
            "summary": metric.summary(rows, [image.prompt for image in images]),
            "images": len(rows),
            "metric": described,
            "rows": [{"image": image.name, **row} for image, row in zip(images, rows, strict=True)],
        }
    return results


def match_references(images: Sequence[FolderImage], folder: str | Path) -> dict[str, Path]:
    """The reference of every image: the file of the same path in `folder`. Raises UsageError naming the first missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--reference {folder}: not a folder")
    matched = {}
    for image in images:
        candidates = [folder / image.name, *((folder / image.name).with_suffix(suffix) for suffix in _SUFFIXES)]
        existing = [path for path in candidates if path.is_file()]
        if not existing:
            raise UsageError(f"--reference {folder}: nothing for {image.name}")
        matched[image.name] = existing[0]
    return matched


def reference_set(folder: str | Path) -> dict[str, Path]:
    """All images of a folder by name, for set metrics, which need no pairs."""
    return {image.name: image.path for image in read_folder(folder)}


# Inside ------------------------------------------------------------------------------------------------------------


class _Progress:
    """Rows by key, read from and appended to a JSON lines file; a torn last line is dropped."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, {}
        if path is None:
            return
        if path.is_file():
            kept = b""
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    self.rows[entry["key"]] = entry["row"]
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                    continue
                kept += line if line.endswith(b"\n") else line + b"\n"
            path.write_bytes(kept)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from None

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        self.rows[key] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")


def _rows(
    name: str,
    metric: Metric,
    described: Mapping[str, Any],
    images: Sequence[FolderImage],
    references: Mapping[str, Path] | None,
    finished: _Progress,
    batch_size: int,
) -> list[dict[str, Any]]:
    keys = []
    for image in images:
        parts = [
            name,
            json.dumps(described, sort_keys=True),
            json.dumps(image.prompt, sort_keys=True),
            _digest(image.path),
            _digest(references[image.name]) if references else "",
        ]
        keys.append(hashlib.sha256("\n".join(parts).encode()).hexdigest())
    todo = [index for index, key in enumerate(keys) if key not in finished.rows]
    for batch in _batches(images, todo, batch_size):
        pixels = np.stack([array for _, array in batch])
        prompts = [images[index].prompt for index, _ in batch]
        reference = None
        if references is not None:
            reference = [
                FolderImage(images[index].name, references[images[index].name], "").pixels() for index, _ in batch
            ]
            if any(array.shape != pixels.shape[1:] for array in reference):
                raise UsageError(f"{name}: {images[batch[0][0]].name} and its reference differ in size")
            reference = np.stack(reference)
        for (index, _), row in zip(batch, metric.rows(pixels, prompts, reference), strict=True):
            finished.add(keys[index], row)
    return [finished.rows[key] for key in keys]


def _batches(
    images: Sequence[FolderImage], indices: Sequence[int], size: int
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Consecutive images of one size, at most `size` of them."""
    batch: list[tuple[int, np.ndarray]] = []
    for index in indices:
        pixels = images[index].pixels()
        if batch and (len(batch) == size or pixels.shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append((index, pixels))
    if batch:
        yield batch


def _set_value(
    metric: SetMetric, images: Sequence[FolderImage], references: Mapping[str, Path] | None, batch_size: int
) -> float:
    def stream(files: Sequence[FolderImage]) -> Iterator[np.ndarray]:
        for batch in _batches(files, range(len(files)), batch_size):
            yield np.stack([pixels for _, pixels in batch])

    reference = [FolderImage(name, path, "") for name, path in references.items()] if metric.needs_reference else None
    return metric.score_set(stream(images), None if reference is None else stream(reference))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def _metadata_of(subfolder: Path) -> dict[str, Any]:
    path = subfolder / "metadata.jsonl"
    metadata = read_json(path)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise UsageError(f"{path}: expected one JSON object with a text under 'prompt'")
    return metadata


def _assign(folder: Path, paths: Sequence[Path], prompts: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    if not prompts:
        return [""] * len(paths)
    by_name = {
        str(prompt[key]): prompt for prompt in prompts for key in ("file", "file_name", "item_id") if key in prompt
    }
    if by_name:
        chosen = []
        for path in paths:
            name = str(path.relative_to(folder))
            prompt = by_name.get(name) or by_name.get(path.name) or by_name.get(path.name.split(".")[0])
            if prompt is None:
                raise UsageError(f"--prompts: no entry for {name} (file or item_id)")
            chosen.append(prompt)
        return chosen
    if len(prompts) != len(paths):
        raise UsageError(
            f"--prompts: {len(prompts)} prompts for {len(paths)} images; give one per image, in order of "
            "name, or name the image under 'file'"
        )
    return list(prompts)
