"""VAR's tokenizer: official names, the residual loop against its plain statement, the decoder in parts."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stagevar.errors import UsageError, WeightsError
from stagevar.models.checkpoint.weights import load_into
from stagevar.models.vq import tokenizer as vqvae
from stagevar.models.vq.tokenizer import VQVAE, VQVAE_RULES, phi_index
from stagevar.schedule.grids import STAR_SIDES, square
from tests import DATA
from tests.golden.checks import load_arrays, load_recipe

CASE = DATA / "golden/var_adaln.json"
GRIDS = square((1, 2, 3, 5))


@pytest.fixture(scope="module")
def vae() -> VQVAE:
    made = VQVAE(GRIDS, 64, 8, 32)
    load_recipe(made, {key: list(value.shape) for key, value in made.state_dict().items()}, prefix="vae:")
    return made.requires_grad_(False)


def test_names_and_shapes_are_the_official_ones(vae):
    official = json.loads(CASE.read_text())["vae_shapes"]
    unread = official.keys() - vae.state_dict().keys()
    assert unread == {"quantize.ema_vocab_hit_SV"}
    assert {k: list(v.shape) for k, v in vae.state_dict().items()} == {k: official[k] for k in official.keys() - unread}


def test_the_public_size():
    with torch.device("meta"):
        public = VQVAE(square(STAR_SIDES[1024]))
    assert sum(p.numel() for p in public.parameters()) == 108_948_355
    assert public.residual.final_grid == (64, 64) and public.stride == 16
    assert public.decoder.conv_in.weight.shape == (640, 32, 3, 3)


def test_code_sum_and_image_are_the_references(vae):
    golden = load_arrays(CASE)
    code_sum = vae.residual.zeros(2, "cpu")
    for scale in range(4):
        before = code_sum.clone()
        added = vae.residual.add(code_sum, torch.from_numpy(golden[f"idx_s{scale}"]).long(), scale)
        assert torch.equal(code_sum, before), "the input is not changed"
        code_sum = added
    assert np.abs(code_sum.numpy() - golden["f_hat"]).max() < 1e-5
    image01 = (vae.decode(code_sum).clamp(-1, 1) + 1) / 2
    assert np.abs(image01.numpy() - golden["image01"]).max() < 2e-4


@pytest.mark.parametrize(("scale", "phi"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_a_scale_is_enlarged_and_half_smoothed(vae, scale, phi):
    index = torch.randint(0, 64, (2, GRIDS[scale][0] ** 2), generator=torch.Generator().manual_seed(scale))
    side = GRIDS[scale][0]
    codes = vae.quantize.embedding.weight[index].reshape(2, side, side, 8).permute(0, 3, 1, 2)
    if scale < 3:
        codes = F.interpolate(codes, size=(5, 5), mode="bicubic")
    wanted = 0.5 * codes + 0.5 * vae.quantize.quant_resi.qresi_ls[phi](codes)
    added = vae.residual.add(torch.ones(2, 8, 5, 5), index, scale)
    torch.testing.assert_close(added, 1 + wanted, atol=1e-5, rtol=1e-5)


def test_scales_share_the_four_convolutions_by_relative_depth():
    # Scales 2 and 7 of ten lie half-way between two ticks: float64 rounding decides, as in the reference.
    assert [phi_index(s, 10) for s in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_index(s, 14) for s in range(14)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert phi_index(0, 1) == 0


def test_the_next_input_is_the_local_mean(vae):
    code_sum = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.residual.next_input(code_sum, 3), code_sum.flatten(2).transpose(1, 2))
    # Row or column i of 2 covers the positions from floor(5 i / 2) up to ceil(5 (i + 1) / 2).
    half = vae.residual.next_input(code_sum, 1)
    spans = (slice(0, 3), slice(2, 5))
    wanted = [code_sum[:, :, y, x].mean((2, 3)) for y in spans for x in spans]
    torch.testing.assert_close(half, torch.stack(wanted, dim=1))


def test_the_code_sum_keeps_its_precision_whatever_the_weights_have(vae):
    half = VQVAE(GRIDS, 64, 8, 32)
    half.load_state_dict(vae.state_dict())
    half.to(torch.bfloat16)
    code_sum = half.residual.add(half.residual.zeros(1, "cpu"), torch.zeros(1, 4, dtype=torch.long), 1)
    assert code_sum.dtype == torch.float32 and half.decode(code_sum).dtype == torch.float32


def test_large_batches_are_decoded_in_parts_with_the_same_result(vae, monkeypatch):
    # In float64: some CPUs choose a float32 convolution by batch size, which alone moves an image of this size by 1.1e-5.
    vae = copy.deepcopy(vae).double()
    latent = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(2))
    whole = vae.decode(latent)
    monkeypatch.setattr(vqvae, "MAX_DECODE_PIXELS", 2 * 80 * 80)
    calls = []
    hook = vae.decoder.register_forward_hook(lambda _, args, out: calls.append(args[0].shape[0]))
    parts = vae.decode(latent)
    hook.remove()
    assert calls == [2, 1]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_images_become_latents(vae):
    image = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = vae.encode(image)
    assert latent.shape == (2, 8, 3, 5) and latent.dtype == torch.float32
    assert not torch.equal(latent[0], vae.encode(image.flip(3))[0])


def test_files_with_code_statistics_load_and_others_are_refused(vae, tmp_path):
    state = {**vae.state_dict(), "quantize.ema_vocab_hit_SV": torch.zeros(10, 64)}
    torch.save(state, tmp_path / "vae.pth")
    with torch.device("meta"):
        empty = VQVAE(GRIDS, 64, 8, 32)
    load_into(empty, tmp_path / "vae.pth", what="vae", rules=VQVAE_RULES)
    latent = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(empty.decode(latent), vae.decode(latent))
    torch.save({**state, "quantize.other": torch.zeros(1)}, tmp_path / "vae.pth")
    with pytest.raises(WeightsError, match=r"quantize\.other"):
        load_into(empty, tmp_path / "vae.pth", what="vae", rules=VQVAE_RULES)


def test_a_width_that_does_not_fit_the_norms_is_refused():
    with pytest.raises(UsageError, match="base_ch 40"):
        VQVAE(GRIDS, 64, 8, 40)
