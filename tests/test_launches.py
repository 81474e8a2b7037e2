"""Kernels that an image of Infinity-2B launches, counted on a made-up card: figures that may only fall."""

import pytest

from tests.launches import launches_per_scale

DEPTH = 32
#: (kernels of an image, of the block of a guided scale), compiled pieces, text rows padded as in a recorded graph.
#: Before constants were made once per prompt: 12,151 and 28 in full, 14,814 and 32 with the paper's schedule.
MOST = {"exact": (10_071, 24), "stagevar-paper": (12_662, 28)}


@pytest.mark.parametrize("schedule", MOST)
def test_an_image_launches_no_more_kernels_than_it_did(schedule):
    counts = launches_per_scale(schedule)
    image, block = MOST[schedule]
    assert sum(counts) <= image
    guided = counts[1]
    assert guided // DEPTH <= block, f"{guided} launches in a guided scale"
