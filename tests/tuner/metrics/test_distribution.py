"""FID, KID and IS: closed forms, a set against itself and against a shifted one, the per-image split, the Inception."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stagevar.errors import UsageError
from tests.fakes.metric_models import Lookup, exact_gaussian, numbered_images
from tuner.metrics.distribution import (
    Cmmd,
    Fid,
    FidDinov2,
    InceptionFeatures,
    InceptionScore,
    Kid,
    frechet_distance,
)

COUNT = 96
A, B = numbered_images(0, COUNT), numbered_images(COUNT, COUNT)


def covariance(rng, dimensions):
    root = rng.standard_normal((dimensions, dimensions))
    return root @ root.T / dimensions + 0.2 * np.eye(dimensions)


def closed_form(mean_a, cov_a, mean_b, cov_b):
    """|difference of means|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by symmetric eigenvalues."""
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


@pytest.fixture(scope="module")
def gaussians():
    rng = np.random.default_rng(0)
    moments = [(rng.standard_normal(6), covariance(rng, 6)) for _ in range(2)]
    table = np.concatenate([exact_gaussian(rng, COUNT, *moment) for moment in moments])
    return Lookup(table), closed_form(*moments[0], *moments[1])


def test_fid_of_gaussians_is_the_closed_form(gaussians):
    extractor, expected = gaussians
    fid = Fid(extractor=extractor)
    assert fid.score_set([A[:50], A[50:]], [B]) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(fid.features(A), fid.features(B)) == pytest.approx(expected, rel=1e-9)


def test_fid_of_one_dimension_is_the_textbook_formula():
    rng = np.random.default_rng(1)
    table = np.concatenate(
        [
            exact_gaussian(rng, COUNT, np.array([1.0]), np.array([[4.0]])),
            exact_gaussian(rng, COUNT, np.array([-2.0]), np.array([[9.0]])),
        ]
    )
    assert Fid(extractor=Lookup(table)).score_set([A], [B]) == pytest.approx(3.0**2 + (2 - 3) ** 2, rel=1e-4)


def test_a_set_is_at_no_distance_from_itself_and_a_shift_adds_its_square():
    rng = np.random.default_rng(2)
    sample = rng.standard_normal((COUNT, 5))
    shift = np.array([0.5, 0, 0, -1.0, 0])
    extractor = Lookup(np.concatenate([sample, sample + shift]))
    fid, kid = Fid(extractor=extractor), Kid(extractor=extractor, subsets=4)
    assert fid.score_set([A], [A]) == pytest.approx(0.0, abs=1e-4)
    assert fid.score_set([A], [B]) == pytest.approx(1.25, rel=1e-4)
    assert kid.score_set([A], [A]) < 0.05 < kid.score_set([A], [B])


def test_kid_of_the_whole_set_is_the_u_statistic(gaussians):
    extractor, _ = gaussians
    kid = Kid(extractor=extractor, subsets=2, subset_size=COUNT)
    x, y = (kid.features(images).numpy() for images in (A, B))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    off = ~np.eye(COUNT, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    assert kid.score_set([A], [B]) == pytest.approx(expected, rel=1e-5)
    assert kid.score(A, [""] * COUNT, B).mean() == pytest.approx(expected, rel=1e-9)


def test_kid_is_the_same_every_time_and_leaves_the_global_stream_alone(gaussians):
    kid = Kid(extractor=gaussians[0], subsets=3, subset_size=20)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert kid.score_set([A], [B]) == kid.score_set([A], [B])
    assert torch.equal(before, torch.get_rng_state())


def test_fid_contributions_are_jackknife_values(gaussians):
    extractor, expected = gaussians
    values = Fid(extractor=extractor).score(A, [""] * COUNT, B)
    assert values.mean() == pytest.approx(expected, rel=0.1)
    outlier = Lookup(np.concatenate([np.zeros((COUNT, 3)) + 0.01 * np.arange(COUNT)[:, None], np.ones((COUNT, 3))]))
    moved = outlier.table.clone()
    moved[7] += 50
    outlier.table = moved
    assert Fid(extractor=outlier).score(A, [""] * COUNT, B).argmax() == 7


def test_inception_score_of_sure_and_balanced_classes_is_their_number():
    logits = np.full((COUNT, 4), -40.0)
    logits[np.arange(COUNT), np.arange(COUNT) % 4] = 40.0
    metric = InceptionScore(extractor=Lookup(logits), splits=1)
    assert metric.score_set([A]) == pytest.approx(4.0, rel=1e-5)
    assert np.exp(metric.score(A, [""] * COUNT).mean()) == pytest.approx(4.0)
    assert InceptionScore(extractor=Lookup(logits * 0), splits=1).score_set([A]) == pytest.approx(1.0)


def test_too_few_images_and_missing_references_are_refused(gaussians):
    extractor, _ = gaussians
    with pytest.raises(UsageError, match="reference"):
        Fid(extractor=extractor).score_set([A])
    with pytest.raises(UsageError, match="at least 2"):
        Fid(extractor=extractor).score_set([A[:1]], [B])
    with pytest.raises(UsageError, match="at least 2"):
        Kid(extractor=extractor).score(A[:1], [""], B[:1])
    with pytest.raises(UsageError, match="extractor 'vgg'"):
        Fid(extractor="vgg")
    with pytest.raises(UsageError, match="class probabilities"):
        InceptionScore(extractor="clip")


def test_the_inception_of_torch_fidelity_loads_from_a_local_file(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            """Keep the random weights: the real ones are not here."""

    torch.save({}, tmp_path / "empty.pt")
    torch.manual_seed(0)
    random = Empty("inception-v3-compat", ["2048"], str(tmp_path / "empty.pt"))
    torch.save(random.state_dict(), tmp_path / "inception.pt")
    features = InceptionFeatures("2048", str(tmp_path / "inception.pt"))
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    assert features(images).shape == (2, 2048)
    assert torch.allclose(features(images), random(images)[0].flatten(1), atol=1e-4)
    with pytest.raises(UsageError, match="does not exist"):
        Fid(weights=str(tmp_path / "none.pt"))
    with pytest.raises(UsageError, match="cannot be loaded"):
        Fid(weights=str(tmp_path / "empty.pt"))


# ---------------------------------------------------------------- CMMD


def plain_cmmd(x_ND, y_MD):
    """Pair by pair, as the paper writes it."""

    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * 10.0**2))

    x_ND, y_MD = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x_ND, y_MD))
    parts = [
        np.mean([kernel(a, b) for a in one for b in other]) for one, other in ((x_ND, x_ND), (y_MD, y_MD), (x_ND, y_MD))
    ]
    return 1000 * (parts[0] + parts[1] - 2 * parts[2])


@pytest.mark.parametrize("seed", range(5))
def test_cmmd_is_the_papers_sum_over_pairs(seed):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((2 * COUNT, 4)) + np.repeat([[0.0], [rng.uniform(0, 2)]], COUNT, axis=0)
    cmmd = Cmmd(extractor=Lookup(table))
    expected = plain_cmmd(table[:40], table[COUNT : COUNT + 30])
    assert cmmd.score_set([A[:25], A[25:40]], [B[:30]]) == pytest.approx(expected, rel=1e-9)
    assert cmmd.score(A, [""] * COUNT, B).mean() == pytest.approx(cmmd.score_set([A], [B]), rel=1e-9)
    assert cmmd.score_set([A], [A]) == pytest.approx(0, abs=1e-9)


def test_cmmds_interval_covers_the_distance_of_large_sets_nine_times_in_ten():
    """Pairs of one distribution and one a little off; the truth from twenty times as many."""
    rng = np.random.default_rng(0)

    def pairs(count):
        x = rng.standard_normal((count, 3)) + 1
        return x, x + 0.5 * rng.standard_normal((count, 3)) + [0.8, 0, 0]

    x, y = pairs(4000)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    truth = 1000 * sum(s * np.exp((a @ b.T - 1) / 100).mean() for s, a, b in ((1, x, x), (1, y, y), (-2, x, y)))
    covered = 0
    for _ in range(60):
        cmmd = Cmmd(extractor=Lookup(np.concatenate(pairs(COUNT))))
        value, low, high = cmmd.score_pairs([A], [B])
        assert value == pytest.approx(cmmd.score_set([A], [B]), rel=1e-9)
        assert low <= value <= high
        covered += low <= truth <= high
    assert covered >= 52


def test_cmmd_refuses_sets_that_are_none():
    cmmd = Cmmd(extractor=Lookup(np.ones((2 * COUNT, 2))))
    for call, message in (
        (lambda: cmmd.score_set([A]), "compares two sets"),
        (lambda: cmmd.score_set([], [B]), "no images"),
        (lambda: cmmd.score_pairs([A], [B[:5]]), "needs at least 3 pairs"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_fid_of_dinov2_is_fid_of_its_class_tokens(gaussians):
    extractor, expected = gaussians
    assert FidDinov2(extractor=extractor).score_set([A], [B]) == pytest.approx(expected, rel=1e-4)
