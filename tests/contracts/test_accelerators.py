"""Every accelerator of the package against the published contract (stagevar.testing.accelerators)."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from stagevar.accelerators import Composite, Exact, FastVAR, SkipVAR, StageVAR
from stagevar.accelerators.skipvar import LinearClassifier, SkipRule, look
from stagevar.models.base import Sampling
from stagevar.schedule import LowRank, Pivotal, StageSchedule, exact
from stagevar.testing.accelerators import GRIDS, LAYERS, PROMPTS, SEEDS, AcceleratorContract, Drawing, expand, reduced
from stagevar.testing.tiny import tiny_infinity


@pytest.fixture(scope="module")
def model():
    return tiny_infinity(GRIDS)


def all_rows(tokens, cache_scale):
    return LowRank((tokens,) * 2, "rows", "index", "chunk")


def all_pivotal(tokens, cache_scale):
    return Pivotal(tokens, (0, 4), cache_scale)


class TestExact(AcceleratorContract):
    reduces = False

    def accelerator(self):
        return Exact()

    def active(self, model, rule_path):
        return expand(StageSchedule(5, cfg_delay=0, skip=(4,)), model.grids)

    def neutral(self, model, rule_path):
        return expand(exact(6), model.grids)


class TestStageVAR(AcceleratorContract):
    """As published: Gaussian projection per chunk, first positions, null branch."""

    def accelerator(self):
        return StageVAR()

    def active(self, model, rule_path):
        return expand(StageSchedule(4, cfg_delay=0, rank_ratios=(0.5, (0.2, 0.4))), model.grids)

    def neutral(self, model, rule_path):
        return reduced(model, [all_rows, all_rows])


class TestStageVARTrunkRows(AcceleratorContract):
    """Row selection around the whole trunk, own positions, conditional branch."""

    projection = "rows"

    def accelerator(self):
        return StageVAR()

    def active(self, model, rule_path):
        schedule = StageSchedule(
            4, cfg_delay=1, branch="cond", rank_ratios=(0.5,), projection=self.projection, rope="index", site="trunk"
        )
        return expand(schedule, model.grids)

    def neutral(self, model, rule_path):
        return reduced(model, [lambda tokens, cache: LowRank((tokens,), self.projection, "index", "trunk")])


class TestStageVARTrunkTop(TestStageVARTrunkRows):
    """The rows of the largest norm, which need no draw."""

    projection = "top"


class TestFastVAR(AcceleratorContract):
    def accelerator(self):
        return FastVAR()

    def active(self, model, rule_path):
        schedule = StageSchedule(3, accelerator="fastvar", rank_ratios=(0.6, 0.5), layers=LAYERS, skip=(5,))
        return expand(schedule, model.grids)

    def neutral(self, model, rule_path):
        return reduced(model, [all_pivotal, all_pivotal])


class TestFocusVAR(AcceleratorContract):
    """Fusing inside a chunk; without guidance (strength 1) it passes the conditional stream on as it is."""

    reduces = False
    neutral_sampling = Sampling((1.0,) * len(GRIDS), (1.0,) * len(GRIDS))

    def accelerator(self):
        return Composite()

    def active(self, model, rule_path):
        return expand(StageSchedule(4, cfg_delay=0, branch="cond", fuse_layer=3), model.grids)

    def neutral(self, model, rule_path):
        return self.active(model, rule_path)


class TestFocusVARWithOthers(AcceleratorContract):
    """A scale that is pruned and fuses at the edge of a chunk, behind a skipped one; rows are selected after it."""

    neutral_sampling = Sampling((1.0,) * len(GRIDS), (1.0,) * len(GRIDS))

    def accelerator(self):
        return Composite()

    def active(self, model, rule_path):
        schedule = StageSchedule(
            4,
            cfg_delay=0,
            branch="cond",
            fuse_layer=2,
            accelerator=("fastvar", "stagevar"),
            rank_ratios=(0.6, 0.4),
            projection="rows",
            rope="index",
            layers=LAYERS,
            skip=(3,),
        )
        return expand(schedule, model.grids)

    def neutral(self, model, rule_path):
        steps = list(reduced(model, [all_pivotal, all_rows]))
        steps[4] = dataclasses.replace(steps[4], fuse_layer=2)
        steps[5] = dataclasses.replace(steps[5], branches=("cond",))
        return tuple(steps)


class TestSkipVAR(AcceleratorContract):
    """The classifier is made to send the three test prompts different ways."""

    reduces = False

    def accelerator(self):
        return SkipVAR()

    def active(self, model, rule_path):
        write_rule(rule_path, model, splitting_rule(model))
        return expand(StageSchedule(6, decision=str(rule_path)), model.grids)

    def neutral(self, model, rule_path):
        write_rule(rule_path, model, (always(0), always(0)))
        return expand(StageSchedule(6, decision=str(rule_path)), model.grids)


class TestComposite(AcceleratorContract):
    """Pruning, then projection on one branch: two methods in one schedule."""

    def accelerator(self):
        return Composite()

    def active(self, model, rule_path):
        schedule = StageSchedule(
            3, cfg_delay=1, rank_ratios=(0.6, 0.4), accelerator=("fastvar", "stagevar", "fastvar"), layers=LAYERS
        )
        return expand(schedule, model.grids)

    def neutral(self, model, rule_path):
        return reduced(model, [all_pivotal, all_rows])


class TestCompositeWithDecision(AcceleratorContract):
    """A decision over a schedule that prunes before it and projects after it."""

    def accelerator(self):
        return Composite()

    def active(self, model, rule_path):
        write_rule(rule_path, model, splitting_rule(model))
        schedule = StageSchedule(
            2, rank_ratios=(0.6, 0.4), accelerator=("fastvar", "stagevar"), layers=LAYERS, decision=str(rule_path)
        )
        return expand(schedule, model.grids)

    def neutral(self, model, rule_path):
        write_rule(rule_path, model, (always(0), always(0)))
        steps = list(expand(StageSchedule(6, decision=str(rule_path)), model.grids))
        plain = reduced(model, [all_pivotal, all_rows])
        decision = steps[2].decision
        full = ("full", plain[3:])
        steps[2] = dataclasses.replace(
            steps[2], decision=dataclasses.replace(decision, outcomes=(full, *decision.outcomes[1:]))
        )
        steps[3:] = plain[3:]
        return tuple(steps)


# ------------------------------------------------------------------ SkipVAR's classifier for the tiny model


def always(label: int) -> LinearClassifier:
    return LinearClassifier((0.0,), (1.0,), (label,), ((0.0,),), (0.0,))


def splitting_rule(model) -> tuple[LinearClassifier, LinearClassifier]:
    """Skips two scales above the middle of the test prompts' first feature, else drops guidance for one."""
    sampler = Drawing(model, Exact())
    generation = sampler.begin(PROMPTS, SEEDS)
    for step in exact(6).expand(model.grids, 2)[:3]:
        sampler.advance(generation, step)
    features = look(model, generation.code_sum_before(2), generation.code_sum_BdHW, 4)[:, 0]
    middle = float(np.sort(features)[-2:].mean())
    skip = LinearClassifier((middle,), (1.0,), (0, 2), ((0.0,), (1.0,)), (0.0, 0.0))
    return skip, always(1)


def write_rule(path, model, classifiers) -> None:
    rule = SkipRule("test", model.name, len(model.grids), 4, *classifiers)
    path.write_text(json.dumps(rule.to_dict()))


def test_the_splitting_rule_splits(model, tmp_path):
    """The contract's SkipVAR cases are about rows that part, so they must."""
    steps = TestSkipVAR().active(model, tmp_path / "rule.json")
    _, generation = Drawing(model, SkipVAR()).draw(steps)
    assert set(generation.outcomes) == {"skip2", "cond1"}
