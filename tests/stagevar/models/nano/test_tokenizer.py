"""The shipped tokenizer keeps what the checker reads, and its scales refine each other."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stagevar.models.nano import drawing, scenes
from stagevar.models.nano.checker import check_batch
from stagevar.models.nano.load import read_preset, shipped_folder
from stagevar.models.nano.presets import preset
from stagevar.models.nano.tokenizer import NanoTokenizer


@pytest.fixture(scope="module")
def shipped():
    tokenizer = NanoTokenizer(read_preset(shipped_folder())).eval()
    tokenizer.load_state_dict(load_file(shipped_folder() / "tokenizer.safetensors"))
    return tokenizer


@pytest.fixture(scope="module")
def partial(shipped):
    """Metadata of 300 fresh scenes, their pixels, and what every partial sum of scales decodes to."""
    world = scenes.sample(300, np.random.default_rng(123), split="heldout")
    pixels = drawing.draw(world, 64)
    with torch.inference_mode():
        sums = shipped.partial_sums(shipped.encode(torch.from_numpy(pixels) * 2 - 1))
        decoded = [(shipped.decode(s) / 2 + 0.5).clamp(0, 1).numpy() for s in sums]
    return world.metadata, pixels, decoded


def test_a_scene_is_decided_by_coarse_scales(partial):
    """After sides 8, 11 and 16 the checker accepts more and more, nearly all before the last."""
    metadata, _, decoded = partial
    accepted = [check_batch(image, metadata).mean() for image in decoded[-3:]]
    assert accepted[0] >= 0.75 and accepted[1] >= 0.92 and accepted[2] >= 0.99


def test_late_scales_still_add_detail(partial):
    _, pixels, decoded = partial
    errors = [((image - pixels) ** 2).mean() for image in decoded]
    assert errors == sorted(errors, reverse=True)
    psnr_db = [-10 * np.log10(error) for error in errors]
    assert psnr_db[-1] > 33 and psnr_db[-2] < psnr_db[-1] - 3


def test_partial_sums_are_the_residual_loop(shipped):
    """The tokenizer's training path and the runtime's quantizer agree on bits and sums."""
    pixels = torch.from_numpy(drawing.draw(scenes.sample(4, np.random.default_rng(0)))) * 2 - 1
    with torch.inference_mode():
        latent = shipped.encode(pixels)
        targets, _, code_sum = shipped.residual.quantize(latent)
        sums = shipped.partial_sums(latent)
    assert torch.allclose(sums[-1], code_sum, atol=1e-6)
    rebuilt = shipped.residual.zeros(4, "cpu")
    for scale, bits in enumerate(targets):
        rebuilt = shipped.residual.add(rebuilt, bits, scale)
        assert torch.allclose(rebuilt, sums[scale], atol=1e-6)


@pytest.mark.parametrize("name", ["64px", "96px", "micro"])
def test_shapes_of_every_preset(name):
    config = preset(name)
    tokenizer = NanoTokenizer(config)
    side = config.image_size // config.patch
    assert config.scales[-1] == side
    assert tokenizer.residual.final_grid == (side, side)
    image = torch.zeros(2, 3, config.image_size, config.image_size)
    latent = tokenizer.encode(image)
    assert latent.shape == (2, tokenizer.latent_dim, side, side)
    assert tokenizer.decode(latent).shape == image.shape


def test_presets_meet_their_bounds():
    from stagevar.models.infinity.transformer import Infinity

    shipped, large = preset("64px"), preset("96px")
    assert sum(s * s for s in shipped.scales[-2:]) / shipped.tokens >= 0.7
    assert large.image_size >= 96 and large.tokens > shipped.tokens
    for config in (shipped, large):
        with torch.device("meta"):
            assert sum(p.numel() for p in Infinity(config.infinity()).parameters()) <= 8e6
