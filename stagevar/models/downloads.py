"""Public files that loading a model fetches, with their sizes as far as the number of parameters tells.

Nothing is fetched or asked here. Sizes are those of float32 checkpoints, as the families publish them, so they are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagevar.models.hub import HubFile
from stagevar.models.loading import local_files, text_beside
from stagevar.models.parts import Part
from stagevar.models.registry import model_parts
from stagevar.models.request import LoadRequest

#: Parameters of text encoders' repositories: flan-t5-xl with its decoder, Stable Diffusion 2.1's text model, Qwen2's of 1.5 B.
_TEXT_PARAMETERS = {"infinity": 2_849_757_184, "star": 340_387_840, "hart": 1_543_714_304}
#: Files that are present if a hub folder is.
_MARKS = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "config.json", "text_encoder/config.json")


@dataclass(frozen=True)
class Download:
    """One file or folder of a hub.

    Attributes:
        part: what it is for.
        about_bytes: estimated size; None if unknown.
        cached: whether it is on this machine; None if unknown.
    """

    part: str
    source: str
    about_bytes: int | None = None
    cached: bool | None = False

    @property
    def line(self) -> str:
        size = "size unknown" if self.about_bytes is None else f"about {self.about_bytes / 1e9:.1f} GB"
        state = {True: "already here", False: "to be downloaded", None: "unknown whether it is here"}[self.cached]
        return f"{self.part}: {self.source}, {size}, {state}"


def model_downloads(request: LoadRequest) -> list[Download]:
    """What a request fetches from the hub: nothing for random weights; for local ones, what is not beside them.

    Raises:
        WeightsError: for local weights that are not there.
    """
    spec, found = request.spec, []
    if request.random or not spec.parts:
        return []
    tokenizer = request.tokenizer if request.weights is None else local_files(request)[1]
    fetched = {
        "transformer": spec.weights if request.weights is None else None,
        "tokenizer": spec.tokenizer if tokenizer is None and (request.weights or spec.weights) else None,
    }
    if any(fetched.values()):
        parts = model_parts(request)
        sizes = {"transformer": _float32_bytes(parts.transformer), "tokenizer": _float32_bytes(parts.tokenizer)}
        found += [_of(part, file, sizes[part]) for part, file in fetched.items() if file is not None]
    if spec.text is not None and request.text is None and text_beside(request) is None:
        found.append(_of("text encoder", spec.text, 4 * _TEXT_PARAMETERS[spec.family]))
    return found


def is_cached(file: HubFile) -> bool | None:
    """Whether a hub file, or a folder by one of its marks, is in the hub's cache; None without huggingface_hub."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    single = bool(file.path) and not file.path.endswith("/")
    probes = [file.path] if single else [file.path + name for name in _MARKS]
    return any(isinstance(try_to_load_from_cache(file.repo, probe, revision=file.revision), str) for probe in probes)


def _of(part: str, file: HubFile, about_bytes: int) -> Download:
    return Download(part, str(file), about_bytes, is_cached(file))


def _float32_bytes(part: Part) -> int:
    return 4 * sum(parameter.numel() for parameter in part.module.parameters())
