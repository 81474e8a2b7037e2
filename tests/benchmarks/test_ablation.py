"""The ablation's alternatives compute what they say, and its tables pick the rows they say."""

import pytest
import torch

from benchmarks.ablation import Alternative, equal_speed, norm_growth, rows
from stagevar.accelerators.base import Cached, ScaleContext
from stagevar.models.base import Site
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, LowRank, ScaleStep, exact
from stagevar.tensors.noise import PromptNoise
from stagevar.testing.tiny import GRIDS, tiny_infinity


def apply(projection, restoration, rank, run=lambda x, positions: x):
    """(x, result) of one reduced site of 16 tokens; `run` leaves its tokens as they are unless told otherwise."""
    x = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    site = Site("chunk", 0)
    context = ScaleContext(
        ScaleStep(3, (4, 4), BOTH, LowRank((rank,))),
        PromptNoise(["a"], [0], "cpu").at(3, BOTH),
        {site: Cached(torch.zeros(2, 16, 24), (4, 4), BOTH)},
    )
    return x, Alternative(projection, restoration).around(context, {})(site, x, None, run)


@pytest.mark.parametrize("projection", ["gaussian", "svd", "rows"])
def test_least_squares_of_full_rank_gives_the_tokens_back(projection):
    x, y = apply(projection, "least squares", 16)
    assert (x - y).abs().max() < 1e-3


def test_svd_is_the_best_low_rank_approximation():
    x, y = apply("svd", "least squares", 5)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    best = left[..., :5] * values[:, None, :5] @ right[:, :5]
    assert (y - best).abs().max() < 1e-4
    for other in ("gaussian", "rows"):
        assert (apply(other, "least squares", 5)[1] - x).norm() > (best - x).norm()


def test_restoration_by_rows_leaves_the_background_elsewhere():
    for projection in ("gaussian", "svd"):
        _, y = apply(projection, "rtr", 5)
        assert (y.abs().sum(-1) > 0).sum(dim=1).tolist() == [5, 5]


def test_the_alternative_with_the_methods_own_parts_is_the_method():
    model = tiny_infinity()
    schedule = rows(model, 0.4)[0]["projection alone"]
    steps = schedule.expand(GRIDS, 2)
    images = [
        Sampler(model, accelerator).generate(["a"], [0], steps)
        for accelerator in (None, Alternative("gaussian", "rtr"))
    ]
    assert (images[0] == images[1]).all()


def test_norm_growth_is_the_square_root_of_the_reduction():
    model = tiny_infinity()
    growth = norm_growth(model, rows(model, 0.1)[0]["projection alone"].expand(GRIDS, 2), ["a", "b", "c"])
    assert growth["measured"] == pytest.approx(growth["sqrt(M/r)"], rel=0.25) and growth["sqrt(M/r)"] > 2.5


def test_every_row_fits_the_model_and_differs():
    model = tiny_infinity()
    schedules, accelerators = rows(model, 0.25)
    assert accelerators.keys() <= schedules.keys()
    steps = [s.expand(GRIDS, 2) for name, s in schedules.items() if name not in accelerators]
    assert len(set(steps)) == len(steps) and exact(5).expand(GRIDS, 2) not in steps


def test_equal_speed():
    table = [
        {"name": "a 1", "ratio": 0.5},
        {"name": "a 2", "ratio": 0.7},
        {"name": "b", "ratio": 0.8},
        {"name": "a 3", "cpu_ratio": 0.4, "ratio": 0.8},
    ]
    assert equal_speed(table, "b", "a ")["name"] == "a 2", "processor time counts where there is one"
