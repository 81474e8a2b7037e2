"""The counter-based streams: known answers, independence from layout, and their distributions."""

import pytest
import torch

from stagevar.models.base import Site
from stagevar.tensors.noise import PromptNoise, hash_words, key_tensor, normal, philox4x32, uniform

KEY = key_tensor([(0, "a prompt")])


def _words(counter, key):
    as_tensors = [torch.tensor([w], dtype=torch.int64) for w in (*counter, *key)]
    return [int(w) for w in philox4x32(tuple(as_tensors[:4]), tuple(as_tensors[4:]))]


def test_philox_known_answers():
    # Random123's kat_vectors for philox4x32-10.
    assert _words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _words([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert _words(counter, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("count", [1, 24, 507, 6144])
@pytest.mark.parametrize("words", [0, torch.tensor([[1], [2], [2]])])
def test_the_short_way_on_a_cpu_draws_the_same_bits(count, words):
    keys_R2 = key_tensor([(1, "a"), (2**32 - 1, "b"), (0, "")])
    plain = uniform(keys_R2, count, (5, 2**32 - 1), words, philox=lambda counter, key: philox4x32(counter, key))
    assert torch.equal(uniform(keys_R2, count, (5, 2**32 - 1), words), plain)


def test_uniform_is_open_and_flat():
    draws = uniform(KEY, 400_000, hash_words("a"))[0].double()
    assert draws.min() > 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 400_000**0.5
    counts = torch.histc(draws, 20, 0, 1)
    chi2 = ((counts - 20_000) ** 2 / 20_000).sum()
    assert chi2 < 43.8  # 0.999 quantile of chi-squared with 19 degrees of freedom


def test_normal_moments():
    draws = normal(KEY, 300_001, hash_words("b"))[0].double()
    assert draws.shape == (300_001,)
    assert abs(draws.mean()) < 4 / 300_000**0.5
    assert abs(draws.var() - 1) < 4 * (2 / 300_000) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / 300_000) ** 0.5


def test_a_row_does_not_depend_on_its_batch():
    alone = PromptNoise(["b"], [7], "cpu").at(3, ("cond", "uncond"))
    batch = PromptNoise(["a", "b", "c"], [7, 7, 7], "cpu").at(3, ("cond", "uncond"))
    assert torch.equal(alone.uniform("bits", (5, 4))[0], batch.uniform("bits", (5, 4))[1])
    site = Site("chunk", 2)
    # Rows are branch by branch: prompt b is row 1 of the conditional and row 4 overall of the unconditional half.
    assert torch.equal(
        alone.site_normal("projection", site, (6, 2)), batch.site_normal("projection", site, (6, 2))[[1, 4]]
    )
    only_uncond = PromptNoise(["b"], [7], "cpu").at(3, ("uncond",)).site_uniform("index", site, (6,))
    assert torch.equal(only_uncond[0], alone.site_uniform("index", site, (6,))[1])


def test_every_part_of_the_key_matters():
    base = PromptNoise(["a"], [1], "cpu").at(2, ("cond",))
    first = base.site_uniform("index", Site("chunk", 0), (8,))
    others = [
        PromptNoise(["a"], [2], "cpu").at(2, ("cond",)).site_uniform("index", Site("chunk", 0), (8,)),
        PromptNoise(["b"], [1], "cpu").at(2, ("cond",)).site_uniform("index", Site("chunk", 0), (8,)),
        PromptNoise(["a"], [1], "cpu").at(3, ("cond",)).site_uniform("index", Site("chunk", 0), (8,)),
        PromptNoise(["a"], [1], "cpu").at(2, ("uncond",)).site_uniform("index", Site("chunk", 0), (8,)),
        base.site_uniform("index", Site("chunk", 1), (8,)),
        base.site_uniform("other", Site("chunk", 0), (8,)),
        base.uniform("index", (8,)),
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_refresh_overwrites_the_keys_in_place():
    source, other = PromptNoise(["a"], [1], "cpu"), PromptNoise(["b"], [2], "cpu")
    keys = source.keys_B2
    source.refresh(other)
    assert source.keys_B2 is keys
    assert torch.equal(source.at(0, ("cond",)).uniform("bits", (4,)), other.at(0, ("cond",)).uniform("bits", (4,)))


def test_sub_batch_keeps_its_streams():
    source = PromptNoise(["a", "b", "c"], [1, 2, 3], "cpu")
    whole = source.at(1, ("cond",)).uniform("bits", (4,))
    assert torch.equal(source.rows([2, 0]).at(1, ("cond",)).uniform("bits", (4,)), whole[[2, 0]])
