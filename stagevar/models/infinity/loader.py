"""Builds the Infinity models: transformer, BSQ-VAE and text encoder, at a resolution and aspect ratio.

Source: FoundationVision/Infinity tools/run_infinity.py (facts): the blocks run in bfloat16 on a GPU; word embedding,
text layers, shared AdaLN and head stay in float32.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch

from stagevar.models.base import ImageTokenizer, LoadedModel, TextEncoder
from stagevar.models.checkpoint.key_rules import BSQVAE_RULES, INFINITY_RULES
from stagevar.models.checkpoint.weights import block_precision, everywhere
from stagevar.models.infinity.config import InfinityConfig
from stagevar.models.infinity.text import RandomText, T5Text
from stagevar.models.infinity.tokenizer import BSQVAE
from stagevar.models.infinity.transformer import Infinity
from stagevar.models.loading import assemble, default_sampling, fill, made_up_text, text_beside
from stagevar.models.parts import Part, Parts
from stagevar.models.request import LoadRequest
from stagevar.models.variants import variant
from stagevar.schedule.grids import infinity_grids

#: Parameters of flan-t5-xl's encoder: embeddings and 24 layers of width 2048 with gated feed-forwards of 5120.
_T5_PARAMETERS = 32128 * 2048 + 24 * (4 * 2048 * 2048 + 3 * 2048 * 5120)
#: Of these, the feed-forwards' output layers, which transformers keeps in float32 where the rest is float16.
_T5_WIDE = 24 * 2048 * 5120


def parts(request: LoadRequest) -> Parts:
    """The modules on the meta device."""
    settings = request.spec.settings
    grids, _ = infinity_grids(request.resolution, request.ratio)
    token_bits = settings["latent_dim"] * (4 if settings["patchify"] else 1)
    with torch.device("meta"):
        transformer = Infinity(InfinityConfig(token_bits=token_bits, **settings["transformer"]))
        tokenizer = BSQVAE(settings["latent_dim"], grids, settings["patchify"], settings.get("base_ch", 128))
    text_bytes = 0
    if request.spec.text and not request.random:
        text_bytes = 2 * (_T5_PARAMETERS + _T5_WIDE) if request.device.type == "cuda" else 4 * _T5_PARAMETERS
    return Parts(
        Part(transformer, INFINITY_RULES, block_precision(request.dtype)),
        Part(tokenizer, BSQVAE_RULES, everywhere(request.dtype)),
        grids,
        pixels_at(request.resolution, request.ratio),
        text_bytes,
    )


def build(request: LoadRequest) -> LoadedModel:
    """See `stagevar.models.registry.load_model`."""
    made = parts(request)
    text: TextEncoder = text_encoder(request, made)
    record = fill(made, request)
    transformer = made.transformer.module
    assert isinstance(transformer, Infinity)
    transformer.set_grids(*infinity_grids(request.resolution, request.ratio))
    made.tokenizer.module.to(memory_format=torch.channels_last)
    if isinstance(text, T5Text):
        record["text"] = text.provenance()
    return assemble(made, request, text, default_sampling(request, len(made.grids)), record)


def pixels_at(resolution: str, ratio: float) -> tuple[int, int]:
    """(height, width) in pixels of a pixel budget at a template ratio. Raises UsageError for an unknown budget."""
    rows, columns = infinity_grids(resolution, ratio)[0][-1]
    return 16 * rows, 16 * columns


def at_ratio(model: LoadedModel, resolution: str, ratio: float) -> LoadedModel:
    """The same loaded model at another height / width of its resolution: new tables of positions, every weight shared.

    Raises:
        UsageError: for an unknown pixel budget.
    """
    grids, finest = infinity_grids(resolution, ratio)
    transformer = variant(model.transformer, lambda name, module: None)
    tokenizer = variant(cast(BSQVAE, model.tokenizer), lambda name, module: None)
    transformer.set_grids(grids, finest)  # type: ignore[call-arg]
    tokenizer.set_grids(grids)
    return dataclasses.replace(
        model,
        transformer=transformer,
        tokenizer=cast(ImageTokenizer, tokenizer),
        grids=grids,
        pixels=pixels_at(resolution, ratio),
    )


def text_encoder(request: LoadRequest, made: Parts) -> TextEncoder:
    """What encodes prompts for a model of the family, from files given, found next to the weights, or on the hub."""
    config = made.transformer.module.config
    assert isinstance(config, InfinityConfig)
    if request.text is not None:
        return T5Text(request.text, device=request.device, max_length=config.text_maxlen)
    beside = text_beside(request)
    if beside is not None:
        return T5Text(beside, device=request.device, max_length=config.text_maxlen)
    if request.random or request.spec.text is None:
        made_up_text(request, "a folder text/ with a T5 encoder of its width")
        return RandomText(config.text_dim, config.text_maxlen)
    return T5Text(request.spec.text, device=request.device, max_length=config.text_maxlen)
