"""Builds HART models: modules on the meta device, then weights and prompts, then a LoadedModel.

Source: mit-han-lab/hart-0.7b-1024px as its code reads it (facts): `llm/` holds the transformer, of which `ema_model.bin` is
the copy that its scripts use, and `tokenizer/` the autoencoder and a discriminator, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from stagevar.errors import UsageError, WeightsError
from stagevar.models import memory
from stagevar.models.base import LoadedModel, TextEncoder
from stagevar.models.checkpoint.key_rules import KeyRules
from stagevar.models.checkpoint.names import bare_names
from stagevar.models.checkpoint.tensor_files import open_weights
from stagevar.models.checkpoint.weights import block_precision
from stagevar.models.hart.text import QwenText, RandomLanguageText
from stagevar.models.hart.tokenizer import HybridVAE
from stagevar.models.hart.transformer import HART, HARTConfig, guidance_ramp
from stagevar.models.hub import HubFile
from stagevar.models.loading import (
    assemble,
    fill,
    local_transformer,
    locate,
    made_up_text,
    ramped_sampling,
    text_beside,
)
from stagevar.models.parts import Part, Parts
from stagevar.models.request import LoadRequest
from stagevar.schedule.grids import square

TRANSFORMER_RULES = KeyRules(dropped=("lvl_1L", "attn_bias_for_masking"))
#: Parameters of Qwen2-VL-1.5B's language model: embeddings and 28 layers of width 1536, keys and values of 256.
_QWEN_PARAMETERS = 151936 * 1536 + 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
#: The tokenizer's weights that turn pixels into latents and back, as opposed to its codebook.
_PIXEL_SIDE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def _without_vae(key: str, expected: Collection[str]) -> str:
    return key.removeprefix("vae.")


TOKENIZER_RULES = KeyRules(
    dropped=("*quantize.ema_vocab_hit_SV", "disc.*", "*decoder2.*", "*post_quant_conv2.*"), rename=_without_vae
)


def parts(request: LoadRequest) -> Parts:
    """The modules on the meta device; what the published settings leave open follows from local weights.

    The codebook stays float32, since the code sum adds up in it, and so does the diffusion head: its first step
    multiplies a difference of nearly equal numbers by 20,000, which 16 bits would decide by rounding.

    Raises:
        UsageError: for an aspect ratio: the family is square.
    """
    if request.weights is None or request.random:
        return _parts(request, None)
    try:
        return _parts(request, local_transformer(request))
    except WeightsError:
        return _parts(request, None)  # `fill` says what is wrong with the files


def _parts(request: LoadRequest, weights: Path | None) -> Parts:
    spec, settings = request.spec, request.spec.settings
    if request.ratio != 1:
        raise UsageError(f"{spec.name} makes square images only; aspect ratio {request.ratio:g} must be 1")
    sides, codebook = settings["sides"], settings.get("codebook", {})
    shown = {} if weights is None else _shown(weights)
    with torch.device("meta"):
        transformer = HART(HARTConfig(sides=sides, **codebook, **{**settings["transformer"], **shown}))
        tokenizer = HybridVAE(square(sides), **codebook, base_ch=settings.get("base_ch", 160))
    text_bytes = 0
    if spec.text and not request.random:
        text_bytes = (2 if request.device.type == "cuda" else 4) * _QWEN_PARAMETERS
    return Parts(
        Part(transformer, TRANSFORMER_RULES, block_precision(request.dtype)),
        Part(tokenizer, TOKENIZER_RULES, block_precision(request.dtype, _PIXEL_SIDE)),
        square(sides),
        (tokenizer.stride * sides[-1], tokenizer.stride * sides[-1]),
        text_bytes,
    )


def _shown(weights: Path) -> dict[str, bool]:
    """Settings that show in the names of a file's weights; none if it is not a HART transformer's."""
    shapes = open_weights(weights).shapes
    keys = bare_names(shapes, ("word_embed.weight", "decoder_norm.weight", "head.weight")).values()
    if "decoder_norm.weight" not in keys:
        return {}
    return {
        "context_norm": "context_norm.weight" in keys,
        "level_table": "lvl_embed.weight" in keys,
        "cosine": any(key.endswith("attn.scale_mul_1H11") for key in keys),
    }


def build(request: LoadRequest) -> LoadedModel:
    """See `stagevar.models.registry.load_model`."""
    made = parts(request)
    if request.weights is None:
        memory.require(memory.estimate(made, request), request.device, request.spec.name)  # before anything is fetched
        made = _parts(request, locate(request)[0])
    text = text_encoder(request, made)
    record = fill(made, request)
    transformer = made.transformer.module
    assert isinstance(transformer, HART)
    transformer.set_grids(made.grids)
    if isinstance(text, QwenText):
        record["text"] = text.provenance()
    return assemble(made, request, text, ramped_sampling(request, len(made.grids), guidance_ramp), record)


def text_encoder(request: LoadRequest, made: Parts) -> TextEncoder:
    """What encodes prompts for a model of the family, from files given, found next to the weights, or on the hub."""
    config = made.transformer.module.config
    assert isinstance(config, HARTConfig)
    source: HubFile | Path | None = request.text or text_beside(request)
    if source is None and not request.random:
        source = request.spec.text
    if source is None:
        made_up_text(request, "a folder text/ with a language model of its width, as transformers saves it")
        return RandomLanguageText(config.text_dim, config.text_tokens)
    return QwenText(source, device=request.device, length=config.text_tokens)
