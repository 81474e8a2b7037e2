"""From a load request to filled modules: where the files are, what fits, and what is recorded about them.

Shared by every family whose models are a transformer file and a tokenizer file.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

from stagevar.errors import UsageError, WeightsError
from stagevar.models import hub, memory
from stagevar.models.base import ImageTokenizer, LoadedModel, NextScaleModel, Provenance, Sampling, TextEncoder
from stagevar.models.checkpoint.random_weights import randomize
from stagevar.models.checkpoint.tensor_files import weights_files, weights_in
from stagevar.models.checkpoint.weights import fit
from stagevar.models.hub import HubFile
from stagevar.models.parts import Parts
from stagevar.models.request import LoadRequest
from stagevar.models.spec import ModelSpec

#: File that marks a folder written by `stagevar convert`.
MARK = "stagevar.json"
#: How a family's public files are named, transformer and tokenizer, so that a local pair under other names is found too.
_FILE_NAMES = {
    "infinity": ("infinity_*", "infinity_vae*"),
    "hart": ("hart_*", "hart_vae*"),
    "star": ("star_*", "vae_*"),
    "var": ("var_*", "vae_*"),
}
#: Where a copy of a family's whole repository has its transformer, from its root or from a folder in it, and its tokenizer.
_IN_COPIES: dict[str, tuple[tuple[str, ...], str]] = {"hart": (("llm/ema_model.bin", "ema_model.bin"), "tokenizer")}
#: Folders of a family's text encoder next to local weights, and what such a folder holds.
_TEXT_FOLDERS = {
    "infinity": (("flan-t5-xl", "flan-t5-xl-official", "text"), "config.json"),
    "star": (("CLIP", "stable-diffusion-2-1", "text"), "text_encoder"),
    "hart": (("Qwen2-VL-1.5B-Instruct", "text"), "config.json"),
}


def default_sampling(request: LoadRequest, scales: int) -> Sampling:
    """The model's sampling defaults with what the request changes."""
    spec = request.spec
    return Sampling(
        guidance=Sampling.per_scale(spec.guidance if request.guidance is None else request.guidance, scales),
        temperature=Sampling.per_scale(
            spec.temperature if request.temperature is None else request.temperature, scales
        ),
        top_k=spec.top_k,
        top_p=spec.top_p,
    )


def ramped_sampling(request: LoadRequest, scales: int, ramp: Callable[[float, int], tuple[float, ...]]) -> Sampling:
    """The defaults; a single guidance number is the value at the end of the ramp, the references' cfg plus 1.

    Args:
        ramp: (cfg, scales) -> guidance per scale.
    """
    sampling = default_sampling(request, scales)
    asked = request.spec.guidance if request.guidance is None else request.guidance
    if isinstance(asked, int | float):
        sampling = dataclasses.replace(sampling, guidance=ramp(asked - 1, scales))
    return sampling


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if name and (folder / name).exists()), None)


def _converted(folder: Path, stem: str) -> Path | None:
    return _first(folder, f"{stem}.safetensors.index.json", f"{stem}.safetensors")


def _tokenizer_names(spec: ModelSpec) -> tuple[str, ...]:
    copies = (_IN_COPIES[spec.family][1],) if spec.family in _IN_COPIES else ()
    if spec.tokenizer is None:
        return copies
    # The reference's notebooks spell the d32 file with one more underscore than the hub does.
    return (spec.tokenizer.name, spec.tokenizer.name.replace("d32reg", "d32_reg"), *copies)


def _named_alike(folder: Path, pattern: str, but: str = "") -> Path | None:
    """The one weight file of a folder whose name follows a pattern, None without any. Raises WeightsError for several."""
    files = [
        path
        for suffix in (".pth", ".pt", ".safetensors")
        for path in sorted(folder.glob(pattern + suffix))
        if not (but and path.match(but + suffix))
    ]
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise WeightsError(f"folder {folder} has several candidate files ({names}); give the path of one")
    return files[0] if files else None


def text_beside(request: LoadRequest) -> Path | None:
    """The folder of the text encoder next to local weights, as in a copy of the public files; None without one."""
    if request.weights is None or request.random or request.spec.family not in _TEXT_FOLDERS:
        return None
    names, part = _TEXT_FOLDERS[request.spec.family]
    given = Path(request.weights)
    folders = (base / name for base in (given, given.parent) for name in names)
    return next((folder for folder in folders if (folder / part).exists()), None)


def made_up_text(request: LoadRequest, needed: str) -> None:
    """Warns if a model with trained weights uses made-up text features: its images then have nothing to do with prompts."""
    if not request.random:
        warnings.warn(
            f"{request.spec.name} uses made-up text features, so its images do not follow the prompts: there is no "
            f"text encoder next to its weights ({needed})",
            stacklevel=4,
        )


def local_transformer(request: LoadRequest) -> Path:
    """Where the transformer's weights are, or should be, for a request that gives a path; fetches nothing.

    Raises:
        WeightsError: if there is nothing at the path, or a folder without a transformer.
    """
    spec, given = request.spec, Path(request.weights or "")
    if not given.exists():
        raise WeightsError(f"no weights at {given}; give a file, a folder of shards, or 'random'")
    found = None
    if given.is_dir():
        _check_mark(given, spec.name)
        found = _converted(given, "transformer") or (spec.weights and _first(given, spec.weights.name))
        found = found or _first(given, *_IN_COPIES.get(spec.family, ((), ""))[0])
        found = found or _named_alike(given, *_FILE_NAMES.get(spec.family, ("transformer",)))
    place = found or given
    if place.is_dir() and spec.family in _FILE_NAMES:
        if all(_is_tokenizer(file, spec) for file in weights_files(place)):
            raise WeightsError(
                f"folder {place} holds no transformer of {spec.name}: none of {', '.join(_transformer_names(spec))}, nor "
                "shards with their index; give a file or folder that does"
            )
        weights_in(place)  # refuses several candidates
    return place


def _transformer_names(spec: ModelSpec) -> list[str]:
    """Names under which a folder may hold a model's transformer, for messages."""
    public = [] if spec.weights is None else [spec.weights.name + "/" * spec.weights.path.endswith("/")]
    copies = _IN_COPIES.get(spec.family, ((), ""))[0]
    return list(dict.fromkeys([*public, *copies, f"{_FILE_NAMES[spec.family][0]}.pth", "transformer.safetensors"]))


def _is_tokenizer(file: Path, spec: ModelSpec) -> bool:
    """Whether a weights file is named as a family's tokenizer is."""
    return file.name in _tokenizer_names(spec) or any(
        file.match(pattern + ".*") for pattern in ("tokenizer", _FILE_NAMES[spec.family][1])
    )


def local_files(request: LoadRequest) -> tuple[Path, Path | None]:
    """Transformer and tokenizer of a request that gives a path, None for a tokenizer to fetch; fetches nothing.

    Raises:
        WeightsError: as `local_transformer`, and for a tokenizer that is neither here nor public.
    """
    spec, given = request.spec, Path(request.weights or "")
    transformer = local_transformer(request)
    if request.tokenizer is not None:
        return transformer, Path(request.tokenizer)
    near = given if given.is_dir() else given.parent
    tokenizer = None
    # Shards are in their own folder, so the tokenizer may be next to it.
    for folder in (near, near.parent):
        tokenizer = tokenizer or _converted(folder, "tokenizer") or _first(folder, *_tokenizer_names(spec))
    if tokenizer is None and spec.family in _FILE_NAMES:
        pattern = _FILE_NAMES[spec.family][1]
        tokenizer = _named_alike(near, pattern)
        if tokenizer is None and spec.tokenizer is None:
            raise WeightsError(
                f"no tokenizer next to weights {given}, and {spec.name} has no public one; put its file there as "
                f"{pattern}.pth or tokenizer.safetensors"
            )
    return transformer, tokenizer


def locate(request: LoadRequest) -> tuple[Path, Path, dict[str, str]]:
    """Paths of the transformer's and the tokenizer's weights, and where they came from. Fetches what is not local."""
    spec, sources = request.spec, {}

    def public(part: str, file: HubFile | None) -> Path:
        if file is None:
            raise UsageError(f"{spec.name} has no public {part}; give --weights PATH, or --weights random")
        path, commit = hub.fetch(file)
        sources[part] = f"{file.repo}/{file.path}@{commit}"
        return path

    if request.weights is None:
        transformer, tokenizer = public("weights", spec.weights), request.tokenizer
    else:
        transformer, tokenizer = local_files(request)
    if tokenizer is None:
        tokenizer = public("tokenizer", spec.tokenizer)
    return transformer, tokenizer, sources


def _check_mark(folder: Path, name: str) -> None:
    mark = folder / MARK
    if not mark.is_file():
        return
    try:
        made_for = json.loads(mark.read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(f"{mark} cannot be read; convert the weights again") from None
    if made_for != name:
        raise WeightsError(f"folder {folder} holds {made_for}, not {name}")


def kv_option(request: LoadRequest) -> dict[str, str]:
    """The record of an unusual KV cache."""
    return {} if request.kv_cache == "model" else {"kv_cache": request.kv_cache}


def fill(parts: Parts, request: LoadRequest) -> Provenance:
    """Puts weights into a model's modules on the request's device, and returns what profiles record about them.

    The record holds "weights" (SHA-256 of each part's content), "weight_files" (SHA-256 of every file), "sources" (hub
    files with their commits), "load" (options that load the same model again), and "random_seed" instead of files.

    Raises:
        UsageError: if the model cannot fit.
        WeightsError: for files that are missing, damaged or another model's.
    """
    name = request.spec.name
    modules = ((parts.transformer, name), (parts.tokenizer, f"{name}'s tokenizer"))
    needed = memory.estimate(parts, request)
    options: dict[str, object] = {"resolution": request.resolution, "ratio": request.ratio, **kv_option(request)}
    record: Provenance = {"weights": {}, "load": options}
    if request.random or request.weights is None:
        memory.require(needed, request.device, name)  # before anything is downloaded
    if request.random:
        for part, _ in modules:
            randomize(part.module, request.seed, device=request.device, precision=part.precision)
        record["random_seed"] = request.seed
        return record
    *paths, sources = locate(request)
    fits = [
        fit(part.module, path, what=what, rules=part.rules, device=request.device)
        for (part, what), path in zip(modules, paths, strict=True)
    ]
    memory.require(needed, request.device, name)  # after the files: a fault there should be heard first
    read = [found.load(part.precision) for (part, _), found in zip(modules, fits, strict=True)]
    digests = {name: hub.sha256_part(files) for name, files in zip(("transformer", "tokenizer"), read, strict=True)}
    every = sorted({hub.sha256_file(path) for files in read for path in files})
    record |= {"weights": digests, "weight_files": every, "sources": sources}
    return record


def assemble(
    parts: Parts, request: LoadRequest, text: TextEncoder, sampling: Sampling, record: Provenance
) -> LoadedModel:
    """The loaded model from modules that `fill` gave their weights, with the record that it returned."""
    transformer = parts.transformer.module
    assert isinstance(transformer, NextScaleModel)
    return LoadedModel(
        name=request.spec.name,
        transformer=transformer,
        tokenizer=cast(ImageTokenizer, parts.tokenizer.module),
        text=text,
        sampling=sampling,
        grids=parts.grids,
        pixels=parts.pixels,
        device=request.device,
        dtype=request.dtype,
        random_weights=request.random,
        kv_cache=request.kv_cache,
        provenance=record,
    )
