"""The contract that every accelerator passes, on a tiny random Infinity.

A new accelerator adds one subclass of `AcceleratorContract` with two schedules: `active`, which uses the method, and
`neutral`, its setting that must change nothing although it goes through the method's real path.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from stagevar.accelerators import Accelerator, Composite, Exact, FastVAR, SkipVAR, StageVAR
from stagevar.accelerators.skipvar import LinearClassifier, SkipRule, look
from stagevar.models.base import Sampling
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import LowRank, Pivotal, StageSchedule, exact
from stagevar.schedule.grids import INFINITY_GRIDS
from stagevar.tensors.noise import PromptNoise
from tests.tiny import tiny_infinity

PROMPTS, SEEDS = ["a red ring", "two blue stars", "a cross"], [3, 4, 5]
#: Six scales, so that a decision has three open ones after two before it.
GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6))
LAYERS = (1, 3)


@pytest.fixture(scope="module")
def model():
    return tiny_infinity(GRIDS)


class Probe(Accelerator):
    """Passes everything on; keeps shapes in and out of every site, and how many outermost runs were reduced."""

    name = "probe"

    def __init__(self, inner: Accelerator):
        self.inner, self.calls, self.reduced = inner, [], 0

    def around(self, context, updates):
        hook = self.inner.around(context, updates)

        def around(site, x, positions, run):
            def counted(small, small_positions):
                self.reduced += small_positions is not None and positions is None
                return run(small, small_positions)

            y = hook(site, x, positions, counted)
            self.calls.append((context.step.scale, site, tuple(x.shape), tuple(y.shape)))
            return y

        return around

    def check(self, model, decision):
        self.inner.check(model, decision)

    def decide(self, model, decision, before, after):
        return self.inner.decide(model, decision, before, after)


class Recorder(Sampler):
    """Keeps guided logits and tokens per scale; `forced` tokens replace the drawn ones (teacher forcing)."""

    def __init__(self, model, accelerator, forced=None):
        super().__init__(model, accelerator)
        self.forced, self.logits, self.tokens = forced, {}, {}

    def on_scale(self, step, logits_BLV, tokens):
        self.logits[step.scale] = logits_BLV
        if self.forced is not None:
            tokens.copy_(self.forced[step.scale])
        self.tokens[step.scale] = tokens.clone()

    def run(self, schedule, prompts=PROMPTS, seeds=SEEDS, **options):
        generation = self.begin(prompts, seeds, **options)
        return self.finish(generation, schedule), generation


class CountingNoise:
    """The keyed source that also notes every draw's key, to show that none is made twice and none depends on order."""

    def __init__(self, prompts=PROMPTS, seeds=SEEDS):
        self.source, self.keys = PromptNoise(prompts, seeds, "cpu"), []

    def rows(self, indices):
        part = CountingNoise()
        part.source, part.keys = self.source.rows(indices), self.keys
        return part

    def at(self, scale, branches):
        return _CountingScale(self, scale, branches)


class _CountingScale:
    def __init__(self, noise, scale, branches):
        self.noise, self.scale, self.branches = noise, scale, branches
        self.inner = noise.source.at(scale, branches)

    def _note(self, *key):
        for identity in self.noise.source.identities:
            self.noise.keys.append((identity, self.scale, *key))

    def uniform(self, purpose, shape):
        self._note(purpose)
        return self.inner.uniform(purpose, shape)

    def site_uniform(self, purpose, site, shape):
        self._note(purpose, site)
        return self.inner.site_uniform(purpose, site, shape)

    def site_normal(self, purpose, site, shape):
        self._note(purpose, site)
        return self.inner.site_normal(purpose, site, shape)


def expand(schedule, grids=GRIDS):
    return schedule.expand(grids, 2)


class AcceleratorContract:
    """Subclasses say which accelerator, which schedules, and whether `neutral` must reach reduced runs."""

    reduces = True
    #: What `neutral` and the full schedule run with; None for the model's own sampling.
    neutral_sampling = None

    def accelerator(self) -> Accelerator:
        raise NotImplementedError

    def active(self, model, rule_path) -> tuple:
        """Steps on the model's grids that use the method."""
        raise NotImplementedError

    def neutral(self, model, rule_path) -> tuple:
        """Steps that go the same way and must leave the logits as they are."""
        raise NotImplementedError

    @pytest.fixture
    def rule_path(self, tmp_path):
        return tmp_path / "rule.json"

    # ------------------------------------------------------------------ the contract

    def test_shapes_are_kept_at_every_site(self, model, rule_path):
        steps = self.active(model, rule_path)
        probe = Probe(self.accelerator())
        images, generation = Recorder(model, probe).run(steps)
        assert images.shape == (3, 24, 24, 3)
        assert generation.code_sum_BdHW.shape == (3, 4, 6, 6)
        assert {site.kind for _, site, _, _ in probe.calls} == {"trunk", "chunk", "attn", "cross", "mlp"}
        for scale, site, before, after in probe.calls:
            layers = {"trunk": range(4), "chunk": model.transformer.chunk_layers[site.index % 2]}.get(site.kind, ())
            # Only where the branches are fused inside it, a site puts out half the rows that it takes.
            fused = steps[scale].fuse_layer and steps[scale].fuse_layer in layers
            assert after == (before[0] // 2 if fused else before[0], *before[1:]), (scale, site)
        assert bool(probe.reduced) == self.reduces

    def test_neutral_setting_is_exact_through_the_real_path(self, model, rule_path):
        options = {} if self.neutral_sampling is None else {"sampling": self.neutral_sampling}
        full = Recorder(model, Exact())
        images, _ = full.run(expand(exact(len(GRIDS))), **options)
        probe = Probe(self.accelerator())
        neutral = Recorder(model, probe, forced=full.tokens)
        neutral_images, _ = neutral.run(self.neutral(model, rule_path), **options)
        assert bool(probe.reduced) == self.reduces
        assert neutral.logits.keys() == full.logits.keys()
        for scale, logits in full.logits.items():
            assert (neutral.logits[scale] - logits).abs().max() < 1e-4, scale
        assert np.array_equal(neutral_images, images)

    def test_same_seed_same_image_other_seed_or_prompt_another(self, model, rule_path):
        steps = self.active(model, rule_path)
        images, _ = Recorder(model, self.accelerator()).run(steps)
        again, _ = Recorder(model, self.accelerator()).run(steps)
        assert np.array_equal(images, again)
        changed, _ = Recorder(model, self.accelerator()).run(steps, seeds=[3, 40, 5])
        assert np.array_equal(changed[[0, 2]], images[[0, 2]]) and not np.array_equal(changed[1], images[1])
        changed, _ = Recorder(model, self.accelerator()).run(steps, prompts=[PROMPTS[0], "two green stars", PROMPTS[2]])
        assert np.array_equal(changed[[0, 2]], images[[0, 2]]) and not np.array_equal(changed[1], images[1])

    def test_every_draw_has_its_own_key(self, model, rule_path):
        steps = self.active(model, rule_path)
        noise = CountingNoise()
        images, _ = Recorder(model, self.accelerator()).run(steps, noise=noise)
        assert len(set(noise.keys)) == len(noise.keys), "a key drawn twice would correlate two draws"
        plain, _ = Recorder(model, self.accelerator()).run(steps)
        assert np.array_equal(images, plain)

    def test_rewinding_replays_the_same_draws(self, model, rule_path):
        steps = self.active(model, rule_path)
        sampler = Recorder(model, self.accelerator())
        images, _ = sampler.run(steps)
        generation = sampler.begin(PROMPTS, SEEDS)
        for step in steps[:2]:
            sampler.advance(generation, step)
        for step in expand(exact(len(GRIDS)))[2:5]:
            sampler.advance(generation, step)
        sampler.rewind(generation, 2)
        assert np.array_equal(sampler.finish(generation, steps), images)

    def test_no_state_survives_a_run(self, model, rule_path):
        steps = self.active(model, rule_path)
        accelerator = self.accelerator()
        modules = {name: set(vars(module)) for name, module in model.transformer.named_modules()}
        buffers = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
        sampler = Recorder(model, accelerator)
        first, _ = sampler.run(steps)
        held = _tensors(accelerator)
        sampler.run(steps, prompts=["noise", "fog", "rain"], seeds=[9, 9, 9])
        second, _ = sampler.run(steps)
        assert np.array_equal(first, second)
        assert not held, "an accelerator holds no tensors"
        assert {name: set(vars(module)) for name, module in model.transformer.named_modules()} == modules
        assert all(torch.equal(buffers[name], tensor) for name, tensor in model.transformer.state_dict().items())

    def test_a_batch_row_is_the_single_prompt(self, model, rule_path):
        steps = self.active(model, rule_path)
        batch = Recorder(model, self.accelerator())
        batch_images, generation = batch.run(steps)
        for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
            # Rows that a decision sends different ways are not batched any more; each way is compared below.
            rows = {s: t[row : row + 1] for s, t in batch.tokens.items() if t.shape[0] == len(PROMPTS)}
            single = Recorder(model, self.accelerator())
            single.forced = rows if len(rows) == len(batch.tokens) else None
            images, alone = single.run(steps, [prompt], [seed])
            for scale in rows:
                assert (single.logits[scale][0] - batch.logits[scale][row]).abs().max() < 1e-4, (row, scale)
            assert np.array_equal(images[0], batch_images[row])
            if generation.outcomes is not None:
                assert alone.outcomes == generation.outcomes[row : row + 1]

    @pytest.mark.parametrize("ratio", sorted(INFINITY_GRIDS))
    def test_every_aspect_ratio(self, ratio, rule_path):
        grids = INFINITY_GRIDS[ratio][:6]
        model = tiny_infinity(grids)
        sampler = Recorder(model, self.accelerator())
        steps = self.active(model, rule_path)
        images, _ = sampler.run(steps, PROMPTS[:1], SEEDS[:1])
        assert images.shape == (1, 4 * grids[-1][0], 4 * grids[-1][1], 3)
        assert all(torch.isfinite(logits).all() for logits in sampler.logits.values())
        again, _ = sampler.run(steps, PROMPTS[:1], SEEDS[:1], steps=steps)
        assert np.array_equal(again, images), "the deployment cache holds the schedule and gives the same image"


def _tensors(value, depth=3) -> list:
    """Tensors reachable from an object's attributes."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v, depth - 1)] if depth else []
    if isinstance(value, list | tuple | set):
        return [t for v in value for t in _tensors(v, depth - 1)] if depth else []
    return _tensors(vars(value), depth - 1) if depth and hasattr(value, "__dict__") else []


def reduced(model, reductions):
    """Full steps with these reductions at the last scales; the scale before them keeps what Pivotal restores from."""
    steps = list(exact(len(model.grids)).expand(model.grids, 2))
    first = len(steps) - len(reductions)
    steps[first - 1] = dataclasses.replace(steps[first - 1], keeps=(0, 4))
    for scale, make in enumerate(reductions, start=first):
        steps[scale] = dataclasses.replace(steps[scale], reduction=make(steps[scale].tokens, first - 1))
    return tuple(steps)


def all_rows(tokens, cache_scale, site="chunk"):
    return LowRank((tokens,) * (2 if site == "chunk" else 1), "rows", "index", site)


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

    def accelerator(self):
        return StageVAR()

    def active(self, model, rule_path):
        schedule = StageSchedule(
            4, cfg_delay=1, branch="cond", rank_ratios=(0.5,), projection="rows", rope="index", site="trunk"
        )
        return expand(schedule, model.grids)

    def neutral(self, model, rule_path):
        return reduced(model, [lambda tokens, cache: all_rows(tokens, cache, "trunk")])


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
    sampler = Recorder(model, Exact())
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
    _, generation = Recorder(model, SkipVAR()).run(steps)
    assert set(generation.outcomes) == {"skip2", "cond1"}
