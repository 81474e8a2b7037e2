"""What a model needs on this machine and what is missing, without loading or downloading anything."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from stagevar.errors import StagevarError, UsageError
from stagevar.models import memory
from stagevar.models.downloads import is_cached
from stagevar.models.hub import HubFile
from stagevar.models.loading import local_files, text_beside
from stagevar.models.registry import model_parts, resolve
from stagevar.models.request import LoadRequest, ModelRequest

if TYPE_CHECKING:
    from stagevar.models.parts import Parts


def check_model(model: ModelRequest) -> list[tuple[str, str]]:
    """Findings about a requested model, each ("ok" | "warn" | "fail", one line).

    They cover memory by use and whether it fits, packages that are not installed, and public files still to be
    downloaded.

    Raises:
        UsageError: for an unknown model or option value.
    """
    request = resolve(model)
    if not request.spec.parts:
        return [("ok", f"{model.name} ships in the package")]
    parts = model_parts(request)
    return [*_memory(request, parts), *_packages(request), *_files(request)]


def check_local(model: ModelRequest) -> None:
    """Raises WeightsError if the path of local weights lacks files that cannot be fetched; opens none."""
    request = resolve(model)
    if request.spec.parts and request.weights is not None and not request.random:
        local_files(request)


def _memory(request: LoadRequest, parts: Parts) -> list[tuple[str, str]]:
    needed = memory.estimate(parts, request)
    found = [("ok", f"{request.spec.name} on {request.device} in {str(request.dtype).removeprefix('torch.')}:")]
    found += [("ok", "  " + line) for line in needed.lines()]
    try:
        memory.require(needed, request.device, request.spec.name)
    except UsageError as error:
        return [*found, ("fail", str(error))]
    free = memory.available_bytes(request.device)
    return [*found, ("ok", "it fits" + (f": {free / memory.MIB:,.0f} MiB are free" if free is not None else ""))]


def _packages(request: LoadRequest) -> list[tuple[str, str]]:
    needed = {}
    if request.weights is None and request.spec.weights:
        needed["huggingface_hub"] = "fetching public weights"
    if (request.spec.text and not request.random) or text_beside(request) is not None:
        needed["transformers"] = "the text encoder"
    return [
        ("fail", f"{package} is missing ({use}): pip install 'stagevar-tune[infinity]'")
        for package, use in needed.items()
        if importlib.util.find_spec(package) is None
    ]


def _files(request: LoadRequest) -> list[tuple[str, str]]:
    spec = request.spec
    if request.random:
        return [("ok", "random weights: nothing to fetch; latency work only")]
    if request.weights is None and spec.weights is None:
        return [("fail", f"{spec.name} has no public weights; give --weights PATH, or --weights random")]
    if request.weights is not None:
        try:
            transformer, tokenizer = local_files(request)
        except StagevarError as error:
            return [("fail", str(error))]
        found = [("ok", f"weights {path}") for path in (transformer, tokenizer) if path is not None]
        if tokenizer is None and spec.tokenizer is not None:
            found.append(_hub_state("tokenizer", spec.tokenizer))
        return [*found, *_text_of(request)]
    wanted = {"weights": spec.weights, "tokenizer": spec.tokenizer, "text encoder": spec.text}
    return [_hub_state(part, file) for part, file in wanted.items() if file is not None]


def _text_of(request: LoadRequest) -> list[tuple[str, str]]:
    """The text encoder that goes with local weights."""
    spec, beside = request.spec, text_beside(request)
    if beside is not None:
        return [("ok", f"text encoder {beside}")]
    if spec.text is not None:
        return [_hub_state("text encoder", spec.text)]
    return [] if spec.family == "var" else [("warn", "no text encoder in text/ next to the weights: made-up features")]


def _hub_state(part: str, file: HubFile) -> tuple[str, str]:
    cached = is_cached(file)
    if cached is None:
        return "warn", f"{part} {file}: not known, huggingface_hub is missing"
    if cached:
        return "ok", f"{part} {file} is in the hub's cache"
    return "warn", f"{part} {file} will be fetched from the hub on first use"
