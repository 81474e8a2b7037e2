"""The BSQ-VAE against the official key tables, golden decoder output and its own plain path."""

import gzip
import itertools
import json
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stagevar.errors import UsageError
from stagevar.models.infinity import tokenizer as bsqvae
from stagevar.models.infinity.tokenizer import BSQVAE
from tests import DATA

SQUARE = ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16))


def fill_by_recipe(vae: BSQVAE) -> BSQVAE:
    """The golden files' weights: every value from the CRC of its name (see the recipe in tests/golden)."""
    with torch.no_grad():
        for key, value in vae.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = np.random.RandomState(zlib.crc32(f"vae:{key}".encode())).standard_normal(tuple(value.shape))
            if key.endswith("bias"):
                weight = 0.05 * noise
            elif value.ndim == 1:
                weight = 1 + 0.1 * noise
            else:
                weight = noise / np.sqrt(np.prod(value.shape[1:]))
            value.copy_(torch.from_numpy(weight.astype(np.float32)))
    return vae


@pytest.fixture(scope="module")
def small() -> BSQVAE:
    return fill_by_recipe(BSQVAE(3, SQUARE, patchify=True, base_ch=32))


@pytest.mark.parametrize(
    ("table", "latent_dim", "patchify", "encoder_params", "decoder_params"),
    [("d32", 32, False, 45.03e6, 65.09e6), ("d14", 14, True, 33.14e6, 48.48e6)],
)
def test_state_dict_equals_the_official_table(table, latent_dim, patchify, encoder_params, decoder_params):
    expected = json.loads(gzip.decompress((DATA / "bsqvae_key_shapes.json.gz").read_bytes()))[table]
    with torch.device("meta"):
        vae = BSQVAE(latent_dim, SQUARE, patchify)
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == expected
    assert sum(p.numel() for p in vae.encoder.parameters()) == pytest.approx(encoder_params, rel=2e-4)
    assert sum(p.numel() for p in vae.decoder.parameters()) == pytest.approx(decoder_params, rel=2e-4)


@pytest.mark.parametrize(("case", "latent_dim", "patchify"), [("base", 8, False), ("patch", 3, True)])
def test_decoder_matches_the_reference(case, latent_dim, patchify):
    golden = np.load(DATA / "bsqvae_golden.npz")
    vae = fill_by_recipe(BSQVAE(latent_dim, SQUARE, patchify, base_ch=32))
    image = vae.decode(torch.from_numpy(golden[f"{case}_summed_codes"]))
    assert image.shape == (1, 3, 256, 256)
    np.testing.assert_allclose(image[..., ::4, ::4].numpy(), golden[f"{case}_decoder_raw"], atol=2e-4, rtol=0)


def test_encode_gives_a_latent_that_the_residual_loop_takes(small):
    image = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = small.encode(image)
    assert latent.shape == (2, 3, 32, 32)
    targets, inputs, code_sum = small.residual.quantize(latent)
    assert [tuple(bits.shape) for bits in targets] == [(2, h * w, 12) for h, w in SQUARE]
    assert [tuple(x.shape[1:]) for x in inputs] == [(h * w, 12) for h, w in SQUARE[1:]]
    assert small.decode(code_sum).shape == image.shape


def test_downsampling_pads_right_and_bottom_only(small):
    """The reference pads asymmetrically; symmetric padding would shift every latent by half a position."""
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    conv = small.encoder.down[0].downsample.conv.conv
    wanted = F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(small.encoder.down[0].downsample(x), wanted)
    assert wanted.shape[-2:] == (4, 4)


def test_large_batches_are_decoded_in_parts_with_the_same_result(small, monkeypatch):
    latent = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    whole = small.decode(latent)
    monkeypatch.setattr(bsqvae, "MAX_DECODE_PIXELS", 2 * 64 * 64)
    calls = []
    hook = small.decoder.register_forward_hook(lambda _, args, out: calls.append(args[0].shape[0]))
    parts = small.decode(latent)
    hook.remove()
    assert calls == [2, 1]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_tiling_reproduces_any_local_decoder_exactly():
    """With a decoder that looks at one latent position only, blending must give the plain result at every pixel."""
    vae = BSQVAE(3, SQUARE, patchify=True, base_ch=32)
    vae.decoder = torch.nn.Upsample(scale_factor=8, mode="nearest")
    latent = torch.randn(1, 3, 40, 23, generator=torch.Generator().manual_seed(3))
    tiled = vae._decode_tiled(latent, tile_pixels=128, overlap_pixels=32)
    torch.testing.assert_close(tiled, vae.decoder(latent), atol=1e-6, rtol=1e-6)


def test_images_above_the_limit_are_tiled(small, monkeypatch):
    monkeypatch.setattr(bsqvae, "MAX_DECODE_PIXELS", 64 * 64)
    sizes = []
    monkeypatch.setattr(small, "_decode_tiled", lambda z: sizes.append(tuple(z.shape)) or torch.zeros(1, 3, 80, 80))
    assert small.decode(torch.zeros(2, 3, 10, 10)).shape == (2, 3, 80, 80)
    assert sizes == [(1, 3, 10, 10)] * 2


@pytest.mark.parametrize("length", [5, 16, 17, 40, 129])
def test_tiles_cover_every_position(length):
    starts = bsqvae._tile_starts(length, 16, 4)
    covered = {i for start in starts for i in range(start, min(start + 16, length))}
    assert covered == set(range(length))
    assert all(b - a <= 12 for a, b in itertools.pairwise(starts))


def test_a_width_that_does_not_fit_the_norms_is_refused():
    with pytest.raises(UsageError, match="base_ch 40"):
        BSQVAE(8, SQUARE, base_ch=40)


@pytest.mark.parametrize(("dtype", "channels_last"), itertools.product([torch.float32, torch.bfloat16], [True, False]))
def test_decoding_in_another_precision_and_layout(small, dtype, channels_last):
    """Near the plain one (bfloat16 keeps 8 bits), which stays as it was, as does encoding."""
    latent = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    plain = small.decode(latent)
    other = small.decoding_as(dtype, channels_last)
    weight = other.decoder.up[0].block[0].conv1.conv.weight
    assert weight.dtype == dtype and weight.is_contiguous(memory_format=other.memory_format)
    error = (other.decode(latent) - plain).abs().max() / plain.std()
    assert error < (1e-3 if dtype == torch.float32 else 0.3)
    assert torch.equal(small.decode(latent), plain) and small.memory_format == torch.channels_last
    assert other.encoder.conv_in.conv.weight is small.encoder.conv_in.conv.weight and other.dtype == torch.float32
