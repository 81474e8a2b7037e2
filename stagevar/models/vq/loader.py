"""Builds VAR and STAR models: modules on the meta device, then weights and prompts, then a LoadedModel."""

from __future__ import annotations

import torch

from stagevar.errors import UsageError
from stagevar.models.base import LoadedModel, NextScaleModel, TextEncoder
from stagevar.models.checkpoint.key_rules import STAR_RULES, VAR_RULES
from stagevar.models.checkpoint.weights import block_precision
from stagevar.models.loading import assemble, fill, made_up_text, ramped_sampling, text_beside
from stagevar.models.parts import Part, Parts
from stagevar.models.request import LoadRequest
from stagevar.models.star.text import ClipText, RandomClipText
from stagevar.models.star.transformer import STAR, STARConfig
from stagevar.models.var.transformer import VAR, ClassLabels, RandomLabels, VARConfig, guidance_ramp
from stagevar.models.vq.tokenizer import VQVAE, VQVAE_RULES
from stagevar.schedule.grids import square

#: Parameters of Stable Diffusion 2.1's text model: embeddings and 23 layers of width 1024; it runs in float32.
_CLIP_PARAMETERS = (49408 + 77) * 1024 + 23 * 12 * 1024 * 1024
#: The tokenizer's weights that turn pixels into latents and back, as opposed to its codebook.
_PIXEL_SIDE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def parts(request: LoadRequest) -> Parts:
    """The modules on the meta device. Codebook and smoothing convolutions stay float32: the code sum adds up in it.

    Raises:
        UsageError: for an aspect ratio: these families are square.
    """
    settings, star = request.spec.settings, request.spec.family == "star"
    if request.ratio != 1:
        raise UsageError(f"{request.spec.name} makes square images only; aspect ratio {request.ratio:g} must be 1")
    sides, codebook = settings["sides"], settings.get("codebook", {})
    grids = square(sides)
    with torch.device("meta"):
        transformer: NextScaleModel
        if star:
            transformer = STAR(STARConfig(sides=sides, **codebook, **settings["transformer"]))
        else:
            transformer = VAR(VARConfig(sides=sides, **codebook, **settings["transformer"]))
        tokenizer = VQVAE(grids, **codebook, base_ch=settings.get("base_ch", 160))
    return Parts(
        Part(transformer, STAR_RULES if star else VAR_RULES, block_precision(request.dtype)),
        Part(tokenizer, VQVAE_RULES, block_precision(request.dtype, _PIXEL_SIDE)),
        grids,
        (tokenizer.stride * sides[-1], tokenizer.stride * sides[-1]),
        4 * _CLIP_PARAMETERS if request.spec.text and not request.random else 0,
    )


def build(request: LoadRequest) -> LoadedModel:
    """See `stagevar.models.registry.load_model`."""
    made = parts(request)
    text = text_encoder(request, made)
    record = fill(made, request)
    transformer = made.transformer.module
    assert isinstance(transformer, NextScaleModel)
    transformer.set_grids(made.grids)
    if isinstance(text, ClipText):
        record["text"] = text.provenance()
    return assemble(made, request, text, ramped_sampling(request, len(made.grids), guidance_ramp), record)


def text_encoder(request: LoadRequest, made: Parts) -> TextEncoder:
    """What encodes prompts for a model of the family, from files given, found next to the weights, or on the hub."""
    config = made.transformer.module.config
    if isinstance(config, VARConfig):
        if request.text is not None:
            raise UsageError(
                f"{request.spec.name} reads class labels and has no text encoder; remove text {request.text}"
            )
        return RandomLabels(config.classes) if request.random else ClassLabels(config.classes)
    assert isinstance(config, STARConfig)
    if request.text is not None:
        return ClipText(request.text, device=request.device)
    beside = text_beside(request)
    if beside is not None:
        return ClipText(beside, device=request.device)
    if request.random or request.spec.text is None:
        made_up_text(request, "a folder text/ with tokenizer/ and text_encoder/ of a CLIP model of its width")
        return RandomClipText(config.text_dim)
    return ClipText(request.spec.text, device=request.device)
