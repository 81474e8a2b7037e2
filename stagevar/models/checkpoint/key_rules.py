"""How each family's files differ from its module, as data.

Source: file layouts of FoundationVision/Infinity, FoundationVision/VAR and Davinci-XLab/STAR-T2I (facts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class KeyRules:
    """How a family's files differ from its module.

    Attributes:
        nested: where in a checkpoint the state dict may be; the first match wins.
        dropped: patterns of keys that files contain and no model reads.
        optional: patterns of keys that a file may lack; those tensors are filled with zeros.
        rename: (key, expected) -> the module's name for a file's key.
        adapt: key -> function(value, wanted shape), for tensors of variable length.
    """

    nested: tuple[tuple[str, ...], ...] = ()
    dropped: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rename: Callable[[str, Collection[str]], str] = lambda key, expected: key
    adapt: Mapping[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = field(default_factory=dict)


def null_text(shape: tuple[int, ...]) -> Tensor:
    """The reference's untrained null-prompt rows (text_maxlen, text_dim), which pad a shorter trained table."""
    rows = torch.empty(shape)
    nn.init.trunc_normal_(rows, std=1.2, generator=torch.Generator().manual_seed(0))
    return rows / math.sqrt(shape[1])


def fit_null_text(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A null-prompt table cut, or padded from the untrained one, to the wanted number of rows."""
    if value.ndim != 2 or value.shape[1] != shape[1]:
        return value
    if value.shape[0] >= shape[0]:
        return value[: shape[0]]
    return torch.cat([value, null_text(shape)[value.shape[0] :].to(value)])


def add_wrappers(key: str, expected: Collection[str]) -> str:
    """Puts back the `.conv` or `.norm` wrapper that some tokenizer files leave out."""
    if key in expected:
        return key
    stem, _, leaf = key.rpartition(".")
    for wrapper in ("conv", "norm"):
        if f"{stem}.{wrapper}.{leaf}" in expected:
            return f"{stem}.{wrapper}.{leaf}"
    return key


_MASKS = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
INFINITY_RULES = KeyRules(
    nested=(("trainer", "gpt_fsdp"), ("trainer", "gpt_wo_ddp"), ("trainer", "gpt_ema_fsdp"), ("gpt_fsdp",)),
    dropped=_MASKS,
    adapt={"cfg_uncond": fit_null_text},
)
#: Quantizer entries hold no weight that decoding from bits reads, so any of them may be missing.
BSQVAE_RULES = KeyRules(
    nested=(("vae",), ("trainer", "vae"), ("ema",)),
    dropped=("quantizer.*", "quantize.*"),
    optional=("quantizer.lfq.mask", "quantize.lfq.mask"),
    rename=add_wrappers,
)
VAR_RULES = KeyRules(nested=(("trainer", "var_wo_ddp"),), dropped=_MASKS)
STAR_RULES = KeyRules(nested=(("trainer", "var_wo_ddp"),), dropped=_MASKS)
