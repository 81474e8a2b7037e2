"""Kernels that an image of Infinity-2B launches, counted on a made-up card: figures that may only fall."""

import pytest

from tests.stagevar.engine.launches import DEPTH, launches_of_begin, launches_per_scale

#: (engine, schedule) -> at most so many kernels of an image, and of the block of a guided scale; text rows are padded as in a
#: recorded graph. Before constants were made once per prompt graph-compiled had 12,151 and 28 in full, and 14,814 and 32 with
#: the paper's schedule, now 10,071 (eleven scales of 775, two of 773) and 11,382. A cache of its own per
#: branch cost graph-kernels 7,044 and 16.
MOST = {
    ("graph-compiled", "stagevar-paper"): (11_382, 24),
    ("graph-kernels", "exact"): (5_469, 13),
    ("graph-kernels", "stagevar-paper"): (6_084, 13),
}


@pytest.mark.parametrize(("engine", "schedule"), MOST)
def test_an_image_launches_no_more_kernels_than_it_did(engine, schedule):
    counts = launches_per_scale(schedule, engine)
    image, block = MOST[engine, schedule]
    assert sum(counts) <= image
    guided = counts[1]
    assert guided // DEPTH <= block, f"{guided} launches in a guided scale"


def test_beginning_an_image_launches_no_more_kernels_than_it_did():
    """Outside the recording of its text: 696 before there was one."""
    assert launches_of_begin() <= 9
