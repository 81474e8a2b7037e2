"""Kernels that an image of Infinity-2B launches, counted on a made-up card: figures that may only fall."""

import pytest

from tests.launches import DEPTH, launches_per_scale

#: (engine, schedule) -> at most so many kernels of an image, and of the block of a guided scale; text rows are padded as in a
#: recorded graph. Before constants were made once per prompt graph-compiled had 12,151 and 28 in full, and 14,814 and 32 with
#: the paper's schedule.
MOST = {
    ("graph-compiled", "exact"): (10_071, 24),
    ("graph-compiled", "stagevar-paper"): (12_662, 28),
    ("graph-kernels", "exact"): (5_800, 14),
    ("graph-kernels", "stagevar-paper"): (7_000, 18),
}


@pytest.mark.parametrize(("engine", "schedule"), MOST)
def test_an_image_launches_no_more_kernels_than_it_did(engine, schedule):
    counts = launches_per_scale(schedule, engine)
    image, block = MOST[engine, schedule]
    assert sum(counts) <= image
    guided = counts[1]
    assert guided // DEPTH <= block, f"{guided} launches in a guided scale"
