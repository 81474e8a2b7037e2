"""Which schedules of a round go on to further prompts."""

import types

import numpy as np
import pytest

from stagevar.schedule import exact
from tests.fakes.studies import CHUNKS, GRIDS
from tuner.config.prompts import PromptSet
from tuner.config.quality import quality_limits
from tuner.evaluation.executor import Executor
from tuner.metrics.quality_spec import QualitySpec
from tuner.proposals.trial_sampler import STARTUP_TRIALS, Proposal
from tuner.results.candidate import Interval, LatencyStats
from tuner.study.ask_ahead import Asked, Fate
from tuner.study.options import SearchShortcuts
from tuner.study.prompt_rungs import PromptRungs

FULL = exact(len(GRIDS))
STEPS = FULL.expand(GRIDS, CHUNKS)
RIGHT, WRONG_ONCE = (1.0,) * 16, (1.0,) * 15 + (0.0,)


class Once(Executor):
    """One image is wrong, in the first micro-batch."""

    name = "once"

    def run(self, tasks):
        for task in tasks:
            row = np.array(RIGHT if task.batch else WRONG_ONCE)
            yield task, [{"geneval_nano": row, "quality": row} for _ in task.schedules]


def asked(key, preset=None):
    return Asked(Proposal(1, {}, preset), FULL, STEPS, key, Fate.NEW)


@pytest.mark.parametrize(("preset", "given_up"), [(None, True), ("stagevar-paper", True), ("own", False)])
def test_a_rank_on_few_prompts_gives_up_what_nobody_chose_for_the_space(preset, given_up):
    """One prompt of 16 fails: no limit is surely broken, but as slow as it is, every rival dominates the schedule."""
    rivals = {f"r{n}": (0.4, RIGHT * 4) for n in range(STARTUP_TRIALS)}
    ledger = types.SimpleNamespace(
        rivals=lambda: rivals,
        measured_baseline=types.SimpleNamespace(values={"geneval_nano": RIGHT * 4, "quality": RIGHT * 4}),
        metrics=quality_limits({"geneval_nano": QualitySpec(max_drop=0.05)}),
        space=types.SimpleNamespace(proposals=(("own", FULL),)),
    )
    prompts = PromptSet(("a photo",) * 64, tuple(range(64)), 16)
    prompt_rungs = PromptRungs(ledger, Once(), prompts, SearchShortcuts())
    latency = LatencyStats((), 50.0, None, 49.0, 51.0, 50.0, Interval(0.5, 0.49, 0.51, 0))
    found = prompt_rungs.evaluate([asked("a", preset)], {"a": latency})
    assert found.pruned == ({"a": "in the last quarter by non-dominated rank on 16 prompts"} if given_up else {})
    assert len(found.values["a"]["quality"]) == (16 if given_up else 64) == prompt_rungs.prompts_run
