"""Runs every kernel in Triton's interpreter and prints how far it is from its twin, as JSON; TRITON_INTERPRET=1 is set.

A process of its own, because Triton reads that variable when it is imported.
"""

import itertools
import json

import torch

from stagevar.engine import decoder_kernels, kernels
from stagevar.tensors import noise
from tests.stagevar.engine.kernel_cases import CASES, DECODER_CASES, LEAST, MODELS, OFFSET, Numbers

#: Words of a draw at both ends of their range.
DRAW = (2**32 - 1, 1)


def _ulps(ours: torch.Tensor, twin: torch.Tensor) -> float:
    """Largest difference in units of the twin's rounding, at values of at least `LEAST`."""
    assert ours.dtype == twin.dtype and ours.shape == twin.shape
    unit = twin.float().abs().clamp_min(LEAST[twin.dtype]) * torch.finfo(twin.dtype).eps
    return float(((ours.float() - twin.float()).abs() / unit).max())


def gated_norm():
    for model, dtype in CASES:
        width, _ = MODELS[model]
        for tokens, updated, gated, shared in (
            (1, True, True, False),
            (9, True, False, True),
            (4, False, False, False),
        ):
            make = Numbers()
            x_RLC, update_RLC = make(2, tokens, width) * 4, make(2, tokens, width, dtype=dtype)
            gate_R1C = make(2, 1, width) if gated else None
            scale, shift = (make(1 if shared else 2, 1, width) for _ in range(2))
            given = (x_RLC, update_RLC if updated else None, gate_R1C, scale, shift, not shared, dtype)
            before = x_RLC.clone()
            ours = kernels.gated_norm_launch(kernels.gated_norm_kernel, *given)
            twin = kernels.gated_norm_twin(*given)
            assert torch.equal(x_RLC, before)
            yield (
                f"gated_norm {model} {dtype} {tokens} {updated} {gated}",
                [_ulps(a, b) for a, b in zip(ours, twin, strict=True)],
            )


def heads_into_cache():
    for model, dtype in CASES:
        width, heads = MODELS[model]
        c = width // heads
        for tokens, table in ((1, "shared"), (9, "by row"), (4, None)):
            make = Numbers()
            qkv, factor_H = make(2, tokens, 3 * width, dtype=dtype), make(heads).exp()
            cos_sin = None
            if table is not None:
                angles = make(2, tokens + 3, c // 2) if table == "by row" else make(tokens + 3, c // 2)
                # The part of a scale in the table of all scales: rows and sines are farther apart than its tokens.
                cos_sin = torch.stack([angles.cos(), angles.sin()])[..., 3:, :]
            # As large as the real cache, but for what is never touched.
            ours, twin = (torch.zeros(2, 2, heads, OFFSET + tokens + 2, c, dtype=dtype) for _ in range(2))
            place = slice(OFFSET, OFFSET + tokens)
            q = kernels.heads_into_cache_launch(
                kernels.heads_into_cache_kernel, qkv, factor_H, cos_sin, ours[0, :, :, place], ours[1, :, :, place]
            )
            q_twin = kernels.heads_into_cache_twin(qkv, factor_H, cos_sin, twin[0, :, :, place], twin[1, :, :, place])
            assert q.stride() == q_twin.stride()
            around = [OFFSET - 1, OFFSET + tokens]
            assert not ours[..., around, :].any()  # neither before nor behind its place
            pairs = ((q, q_twin), (ours[0, :, :, place], twin[0, :, :, place]))
            assert torch.equal(ours[1, :, :, place], twin[1, :, :, place])  # v is copied
            yield f"heads_into_cache {model} {dtype} {tokens} {table}", [_ulps(a, b) for a, b in pairs]


def draws():
    """In the dtype's rounding as the others; uniform draws are the same to the bit."""
    keys = noise.key_tensor([(seed, "x") for seed in (1, 2, 2**40)])
    words = torch.tensor([[1], [2], [1]])
    for count, word in ((1, 0), (700, words), (1025, 2)):
        for normal in (False, True):
            ours = kernels.draws_launch(kernels.draws_kernel, keys, count, DRAW, word, normal)
            twin = (noise.normal if normal else noise.uniform)(keys, count, DRAW, word)
            assert normal or torch.equal(ours, twin)
            yield f"draws torch.float32 {count} {normal}", [_ulps(ours, twin)]


def swished_norm():
    """Maps of the decoder's channels whose pixels fill more than one part, the last one not wholly; means are large."""
    for channels, dtype, batch, side in DECODER_CASES:
        make = Numbers()
        norm = torch.nn.GroupNorm(32, channels, eps=1e-6).requires_grad_(False).to(dtype)
        norm.weight.copy_(make(channels)), norm.bias.copy_(make(channels))
        x_BCHW = (make(batch, channels, side, side + 3) + 10 * make(batch, channels, 1, 1)).to(dtype)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        ours = decoder_kernels.swished_norm_launch(decoder_kernels.KERNELS, x_BCHW, norm)
        assert ours.stride() == x_BCHW.stride()
        pixels = decoder_kernels.rows_at_once(channels) * decoder_kernels._TILES
        assert side * (side + 3) > pixels and side * (side + 3) % pixels
        yield f"swished_norm {dtype} {channels}", [_ulps(ours, decoder_kernels.swished_norm_twin(x_BCHW, norm))]


if __name__ == "__main__":
    print(json.dumps(dict(itertools.chain(gated_norm(), heads_into_cache(), draws(), swished_norm()))))
