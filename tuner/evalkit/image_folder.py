"""Scores folders of images with any metrics, row by row into a file, so that an interrupted run continues."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stagevar.errors import UsageError
from stagevar.folders import visible, visible_files
from stagevar.prompts.prompt_files import natural_key
from stagevar.text_files import read_json
from tuner.evalkit.pictures import read_picture
from tuner.metrics.base import Metric, Prompt, SetMetric
from tuner.metrics.prompt_sets import read_prompts

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: Picture files that are not read; a folder that has some of them would be scored only in part.
_OTHER_SUFFIXES = (".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".jpe", ".jfif", ".ppm", ".tga")
#: Keys under which an entry of a prompt file names its image.
_NAME_KEYS = ("file", "file_name", "item_id")


@dataclass(frozen=True)
class FolderImage:
    """One image file; `name` is its path inside the folder, `prompt` is "" if the folder has none."""

    name: str
    path: Path
    prompt: Prompt

    def pixels(self) -> np.ndarray:
        """Pixels (H, W, 3) uint8, upright. Raises UsageError if the file is not an image or has no unambiguous conversion."""
        return read_picture(self.path)


def read_folder(folder: str | Path, prompts: str | Path | None = None) -> list[FolderImage]:
    """Images of a folder with their prompts, in natural order of name: x-2 before x-10.

    GenEval's layout is 00000/metadata.jsonl and 00000/samples/0000.png. In any other folder, all images in it or below
    count, except hidden files and folders. Their prompts come from `prompts` (see `prompt_sets.read_prompts`): an entry
    whose "file" or "item_id" is the image's path or stem, else the entries in order if there is one per image, else "".
    Warns about prompts without an image and images that are left out.
    Raises UsageError if there are no images, or if it is unclear which prompt belongs to which image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: not a folder")
    numbered = sorted(
        (path for path in visible(folder.iterdir()) if path.is_dir() and path.name.isdecimal()),
        key=lambda path: natural_key(path.name),
    )
    if any((path / "metadata.jsonl").is_file() for path in numbered):
        if prompts is not None:
            warnings.warn(f"ignoring --prompts {prompts}: {folder} has GenEval's layout, which includes prompts")
        found = _geneval_images(folder, numbered)
    else:
        paths = _images(folder)
        known = read_prompts(prompts) if prompts is not None else []
        found = [
            FolderImage(_name_in(folder, path), path, prompt)
            for path, prompt in zip(paths, _assign(folder, paths, known), strict=True)
        ]
    if not found:
        raise UsageError(f"--images {folder} has no images ({', '.join(_SUFFIXES)})")
    return found


def evaluate_folder(
    images: Sequence[FolderImage],
    metrics: Mapping[str, Metric],
    *,
    references: Mapping[str, Path] | None = None,
    progress: Path | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, object]]:
    """Scores images with metrics.

    Args:
        images: to score.
        metrics: by name.
        references: image path by name, for metrics that compare.
        progress: a JSON lines file; its rows are not computed again if metric, description and the bytes of image and
            reference are the same.
        batch_size: images at once.

    Returns:
        Per metric: its summary, the number of images, its description and one row per image; one value for a set metric.
    """
    finished = _Progress(progress)
    results = {}
    for name, metric in metrics.items():
        if metric.needs_reference and references is None:
            raise UsageError(f"{name} compares with reference images: pass their folder with --reference")
        if metric.needs_prompt and not images[0].prompt:
            raise UsageError(f"{name} needs prompts: use GenEval's layout or pass --prompts FILE")
        for remark in metric.remarks([image.prompt for image in images]):
            warnings.warn(f"{name}: {remark}")
        described = metric.describe()
        if isinstance(metric, SetMetric):
            summary = _set_summary(name, metric, images, references, batch_size)
            results[name] = {"summary": summary, "images": len(images), "metric": described, "rows": []}
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
    """The reference of every image: the file with the same path in `folder`. Raises UsageError naming the first missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--reference {folder}: not a folder")
    matched = {}
    for image in images:
        candidates = [folder / image.name, *((folder / image.name).with_suffix(suffix) for suffix in _SUFFIXES)]
        existing = [path for path in candidates if path.is_file()]
        if not existing:
            raise UsageError(f"--reference {folder}: no reference for {image.name}; add one with the same name")
        matched[image.name] = existing[0]
    return matched


def reference_set(folder: str | Path) -> dict[str, Path]:
    """All images of a folder by name, for set metrics, which do not need pairs."""
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

    def add(self, key: str, row: Mapping[str, object]) -> None:
        self.rows[key] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")


def _rows(
    name: str,
    metric: Metric,
    described: Mapping[str, object],
    images: Sequence[FolderImage],
    references: Mapping[str, Path] | None,
    finished: _Progress,
    batch_size: int,
) -> list[dict[str, object]]:
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
        reference: np.ndarray | None = None
        if references is not None:
            theirs = [
                FolderImage(images[index].name, references[images[index].name], "").pixels() for index, _ in batch
            ]
            if any(array.shape != pixels.shape[1:] for array in theirs):
                raise UsageError(f"{name}: {images[batch[0][0]].name} and its reference differ in size")
            reference = np.stack(theirs)
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


def _set_summary(
    name: str,
    metric: SetMetric,
    images: Sequence[FolderImage],
    references: Mapping[str, Path] | None,
    batch_size: int,
) -> dict[str, float]:
    """The value of a set, with its interval if every image has a reference of the same name and the metric has one."""

    def stream(files: Sequence[FolderImage]) -> Iterator[np.ndarray]:
        for batch in _batches(files, range(len(files)), batch_size):
            yield np.stack([pixels for _, pixels in batch])

    if references is None or not metric.needs_reference:
        return {name: metric.score_set(stream(images))}
    reference = [FolderImage(key, path, "") for key, path in references.items()]
    if [image.name for image in images] == [image.name for image in reference]:
        pairs = metric.score_pairs(stream(images), stream(reference))
        if pairs is not None:
            return dict(zip((name, f"{name}_low", f"{name}_high"), pairs, strict=True))
    return {name: metric.score_set(stream(images), stream(reference))}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _name_in(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _images(folder: Path) -> list[Path]:
    """Visible images of a folder and below, in natural order. Warns about pictures of a kind that is not read."""
    paths, others = [], []
    for path in visible_files(folder):
        suffix = path.suffix.lower()
        if suffix in _SUFFIXES:
            paths.append(path)
        elif suffix in _OTHER_SUFFIXES:
            others.append(path)
    if others:
        warnings.warn(
            f"{len(others)} pictures are left out, the first {_name_in(folder, min(others))}: only "
            f"{', '.join(_SUFFIXES)} are read"
        )
    return sorted(paths, key=lambda path: [natural_key(part) for part in path.relative_to(folder).parts])


def _geneval_images(folder: Path, numbered: Sequence[Path]) -> list[FolderImage]:
    found, empty = [], []
    for subfolder in numbered:
        samples = subfolder / "samples"
        paths = _images(samples) if samples.is_dir() else []
        if not (subfolder / "metadata.jsonl").is_file():
            raise UsageError(f"{subfolder}: no metadata.jsonl beside its samples; every numbered folder needs one")
        metadata = _metadata_of(subfolder)
        found += [FolderImage(_name_in(folder, path), path, metadata) for path in paths]
        if not paths:
            empty.append(subfolder.name)
    if found and empty:
        warnings.warn(_without_image(empty, len(numbered)))
    return found


def _without_image(names: Sequence[str], total: int) -> str:
    return f"{len(names)} of {total} prompts have no image and are not scored; the first: {names[0]:.80}"


def _metadata_of(subfolder: Path) -> dict[str, object]:
    path = subfolder / "metadata.jsonl"
    metadata = read_json(path)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise UsageError(f"{path}: expected one JSON object with a text under 'prompt'")
    return metadata


def _assign(folder: Path, paths: Sequence[Path], prompts: Sequence[Mapping[str, object]]) -> list[Prompt]:
    """The prompt of each image."""
    if not prompts:
        return [""] * len(paths)
    if any(key in prompt for prompt in prompts for key in _NAME_KEYS):
        return _by_name(folder, paths, prompts)
    if len(prompts) != len(paths):
        raise UsageError(
            f"--prompts: {len(prompts)} prompts for {len(paths)} images; give one per image, in order of "
            "name, or name the image under 'file'"
        )
    _warn_of_gaps(folder, paths)
    return list(prompts)


def _by_name(folder: Path, paths: Sequence[Path], prompts: Sequence[Mapping[str, object]]) -> list[Prompt]:
    entries: dict[str, Mapping[str, object]] = {}
    for prompt in prompts:
        names = {str(prompt[key]).removeprefix("./") for key in _NAME_KEYS if key in prompt}
        if not names:
            raise UsageError(f"--prompts: {prompt['prompt']!r:.60} names no file, but others do; name one for each")
        for name in names:
            if entries.setdefault(name, prompt) != prompt:
                raise UsageError(f"--prompts: two different prompts for {name}; name each image once")
    chosen: list[Prompt] = []
    used = set()
    for path in paths:
        name = _name_in(folder, path)
        stems = (str(Path(name).with_suffix("")), path.stem, path.name.split(".")[0])
        key = next((key for key in (name, path.name, *stems) if key in entries), None)
        if key is None:
            raise UsageError(f"--prompts: no entry for {name} (file or item_id)")
        chosen.append(entries[key])
        used.add(id(entries[key]))
    unused = [prompt for prompt in prompts if id(prompt) not in used and prompt not in chosen]
    if unused:
        warnings.warn(_without_image([str(prompt["prompt"]) for prompt in unused], len(prompts)))
    return chosen


def _warn_of_gaps(folder: Path, paths: Sequence[Path]) -> None:
    """Warns about gaps in numbered images: prompts go to images in order, which is wrong if one was replaced."""
    matches = [re.fullmatch(r"(.*?)([0-9]+)", str(path.relative_to(folder).with_suffix(""))) for path in paths]
    if not all(matches) or len({match[1] for match in matches if match}) != 1:
        return
    numbers = [int(match[2]) for match in matches if match]
    gap = next((a for a, b in itertools.pairwise(numbers) if b != a + 1), None)
    if gap is not None:
        warnings.warn(
            f"the images' numbers are not consecutive after {gap}: prompts are assigned in order of number; if that is wrong, "
            "name the image of each prompt under 'file'"
        )
