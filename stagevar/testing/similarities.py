"""The contract of image comparisons for `stagevar analyze`, as a class to inherit.

class TestMine(SimilarityContract):
    def similarity(self):
        return closeness()
"""

from __future__ import annotations

import numpy as np

from stagevar.analysis import Similarity


class SimilarityContract:
    """Inherit and give the similarity.

    Attributes:
        size: side of the test images in pixels.
    """

    size = 64

    def similarity(self) -> Similarity:
        raise NotImplementedError

    def images(self):
        """Four uint8 images (4, size, size, 3) of smooth colors, and the same images with noise added."""
        rng = np.random.default_rng(3)
        waves_BHW3 = np.sin(np.linspace(0, 3, self.size))[None, :, None, None] * rng.random((4, 1, self.size, 3))
        noisy_BHW3 = waves_BHW3 + rng.normal(0, 0.2, waves_BHW3.shape)
        return tuple((np.clip(x_BHW3, 0, 1) * 255).astype(np.uint8) for x_BHW3 in (waves_BHW3, noisy_BHW3))

    # ------------------------------------------------------------------ the contract

    def test_it_says_which_boundary_it_may_decide(self):
        assert self.similarity().stage in ("semantic", "structure")

    def test_one_finite_value_per_image_and_the_same_again(self):
        similarity, (clean, noisy) = self.similarity(), self.images()
        values_B = np.asarray(similarity.score(noisy, clean))
        assert values_B.shape == (4,) and np.isfinite(values_B).all()
        assert np.array_equal(values_B, similarity.score(noisy, clean))

    def test_an_image_is_1_like_itself_and_less_like_another(self):
        similarity, (clean, noisy) = self.similarity(), self.images()
        np.testing.assert_allclose(similarity.score(clean, clean), 1.0, atol=1e-4)
        assert (np.asarray(similarity.score(noisy, clean)) < 1).all()

    def test_the_batch_does_not_matter(self):
        similarity, (clean, noisy) = self.similarity(), self.images()
        alone = [similarity.score(noisy[i : i + 1], clean[i : i + 1])[0] for i in range(4)]
        np.testing.assert_allclose(similarity.score(noisy, clean), alone, rtol=1e-4, atol=1e-5)
