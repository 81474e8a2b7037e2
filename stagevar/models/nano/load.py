"""Loads nano: the shipped weights of the package, or a folder of other trained weights.

A folder holds tokenizer.safetensors, transformer.safetensors, text_encoder.safetensors and nano.json, which names the
preset that the shapes come from.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import torch

from stagevar.errors import UsageError, WeightsError
from stagevar.models.base import LoadedModel, Provenance
from stagevar.models.checkpoint.random_weights import randomize
from stagevar.models.checkpoint.weights import block_precision, everywhere, load_into
from stagevar.models.hub import sha256_files
from stagevar.models.infinity.transformer import Infinity
from stagevar.models.loading import default_sampling, kv_option
from stagevar.models.nano.presets import NanoPreset, preset
from stagevar.models.nano.text import NanoTextEncoder
from stagevar.models.nano.tokenizer import NanoTokenizer
from stagevar.models.request import LoadRequest


def shipped_folder() -> Path:
    """Where the package keeps nano's weights."""
    return Path(str(files("stagevar.models.nano") / "weights"))


def read_preset(folder: Path) -> NanoPreset:
    """The preset that a folder of weights was trained with. Raises WeightsError if it does not say."""
    try:
        return preset(json.loads((folder / "nano.json").read_text())["preset"])
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(f"folder {folder} has no readable nano.json that names a preset") from None


def build(request: LoadRequest) -> LoadedModel:
    """See `stagevar.models.registry.load_model`."""
    folder = shipped_folder() if request.weights in (None, "random") else Path(request.weights)
    if not folder.is_dir():
        raise UsageError(f"--weights {folder} is not a folder; nano's weights are a folder with nano.json")
    if request.ratio != 1.0:
        raise UsageError(f"aspect ratio {request.ratio} is not supported: nano draws square images only")
    config = read_preset(folder)
    transformer, tokenizer, text = Infinity(config.infinity()), NanoTokenizer(config), NanoTextEncoder(config)
    parts = (
        (transformer, "transformer", block_precision(request.dtype)),
        (tokenizer, "tokenizer", everywhere(torch.float32)),
        (text, "text_encoder", everywhere(torch.float32)),
    )
    record: Provenance = {"weights": {}, "load": kv_option(request)}
    if request.random:
        for module, _, precision in parts:
            randomize(module, request.seed, device=request.device, precision=precision)
        record["random_seed"] = request.seed
    else:
        read = [
            path
            for module, stem, precision in parts
            for path in load_into(
                module,
                folder / f"{stem}.safetensors",
                what=f"nano's {stem.replace('_', ' ')}",
                device=request.device,
                precision=precision,
            )
        ]
        record["weights"] = sha256_files(read)
    transformer.set_grids(config.grids)
    return LoadedModel(
        name=request.spec.name,
        transformer=transformer,
        tokenizer=tokenizer,
        text=text,
        sampling=default_sampling(request, len(config.scales)),
        grids=config.grids,
        pixels=(config.image_size, config.image_size),
        device=request.device,
        dtype=request.dtype,
        random_weights=request.random,
        kv_cache=request.kv_cache,
        provenance=record,
    )
