"""The contract that every accelerator must pass, on a tiny random Infinity, as classes to inherit.

For an accelerator that a package offers by entry point, inherit `PluggedContract` and return it:

    class TestMine(PluggedContract):
        def plugged(self):
            return Mine()

For one with its own place in schedules, inherit `AcceleratorContract` and give two schedules: `active`, which uses the
method, and `neutral`, a setting that takes the method's real path but must change nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from stagevar.accelerators import Accelerator, Composite, Exact
from stagevar.schedule import Plugged, exact
from stagevar.schedule.grids import INFINITY_GRIDS
from stagevar.tensors.noise import PromptNoise
from stagevar.testing.recorder import SEEDS, Recorder
from stagevar.testing.tiny import tiny_infinity

PROMPTS = ("a red ring", "two blue stars", "a cross")
#: Six scales, so that a decision has three open ones after two before it.
GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6))
LAYERS = (1, 3)


class Probe(Accelerator):
    """Passes everything on; keeps shapes in and out of every site, and how many outermost runs were reduced."""

    name = "probe"

    def __init__(self, inner: Accelerator):
        self.inner, self.reduced = inner, 0
        self.calls: list[Any] = []

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


class Drawing(Recorder):
    """A recorder whose runs end with the images."""

    def draw(self, schedule, prompts=PROMPTS, seeds=SEEDS, **options):
        """The images (B, H, W, 3) and their generation."""
        generation = self.begin(prompts, seeds, **options)
        return self.finish(generation, schedule), generation


class CountingNoise:
    """The keyed source; it also notes every draw's key, to show that none is made twice and none depends on order."""

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
    """Steps of a schedule for the tiny model's two chunks."""
    return schedule.expand(grids, 2)


class AcceleratorContract:
    """Inherit and give the accelerator and two schedules; `reduces` says whether `neutral` must reach reduced runs."""

    reduces = True
    #: What `neutral` and the full schedule run with; None for the model's own sampling.
    neutral_sampling = None

    def accelerator(self) -> Accelerator:
        raise NotImplementedError

    def active(self, model, rule_path) -> tuple:
        """Steps on the model's grids that use the method."""
        raise NotImplementedError

    def neutral(self, model, rule_path) -> tuple:
        """Steps that take the same path and must leave the logits unchanged."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def model(self):
        """The tiny Infinity that the schedules are for."""
        return tiny_infinity(GRIDS)

    @pytest.fixture
    def rule_path(self, tmp_path):
        """Where a schedule with a decision may write its classifier."""
        return tmp_path / "rule.json"

    # ------------------------------------------------------------------ the contract

    def test_shapes_are_kept_at_every_site(self, model, rule_path):
        steps = self.active(model, rule_path)
        probe = Probe(self.accelerator())
        images, generation = Drawing(model, probe).draw(steps)
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
        full = Drawing(model, Exact())
        images, _ = full.draw(expand(exact(len(GRIDS))), **options)
        probe = Probe(self.accelerator())
        neutral = Drawing(model, probe, forced=full.tokens)
        neutral_images, _ = neutral.draw(self.neutral(model, rule_path), **options)
        assert bool(probe.reduced) == self.reduces
        assert neutral.logits.keys() == full.logits.keys()
        for scale, logits in full.logits.items():
            assert (neutral.logits[scale] - logits).abs().max() < 1e-4, scale
        assert np.array_equal(neutral_images, images)

    def test_same_seed_same_image_other_seed_or_prompt_another(self, model, rule_path):
        steps = self.active(model, rule_path)
        images, _ = Drawing(model, self.accelerator()).draw(steps)
        again, _ = Drawing(model, self.accelerator()).draw(steps)
        assert np.array_equal(images, again)
        changed, _ = Drawing(model, self.accelerator()).draw(steps, seeds=(3, 40, 5))
        assert np.array_equal(changed[[0, 2]], images[[0, 2]]) and not np.array_equal(changed[1], images[1])
        changed, _ = Drawing(model, self.accelerator()).draw(steps, prompts=[PROMPTS[0], "two green stars", PROMPTS[2]])
        assert np.array_equal(changed[[0, 2]], images[[0, 2]]) and not np.array_equal(changed[1], images[1])

    def test_every_draw_has_its_own_key(self, model, rule_path):
        steps = self.active(model, rule_path)
        noise = CountingNoise()
        images, _ = Drawing(model, self.accelerator()).draw(steps, noise=noise)
        assert len(set(noise.keys)) == len(noise.keys), "a key drawn twice would correlate two draws"
        plain, _ = Drawing(model, self.accelerator()).draw(steps)
        assert np.array_equal(images, plain)

    def test_rewinding_replays_the_same_draws(self, model, rule_path):
        steps = self.active(model, rule_path)
        sampler = Drawing(model, self.accelerator())
        images, _ = sampler.draw(steps)
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
        sampler = Drawing(model, accelerator)
        first, _ = sampler.draw(steps)
        held = _tensors(accelerator)
        sampler.draw(steps, prompts=["noise", "fog", "rain"], seeds=[9, 9, 9])
        second, _ = sampler.draw(steps)
        assert np.array_equal(first, second)
        assert not held, "an accelerator holds no tensors"
        assert {name: set(vars(module)) for name, module in model.transformer.named_modules()} == modules
        assert all(torch.equal(buffers[name], tensor) for name, tensor in model.transformer.state_dict().items())

    def test_a_batch_row_is_the_single_prompt(self, model, rule_path):
        steps = self.active(model, rule_path)
        batch = Drawing(model, self.accelerator())
        batch_images, generation = batch.draw(steps)
        for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
            # Rows that a decision sends different ways are not batched any more; each way is compared below.
            rows = {s: t[row : row + 1] for s, t in batch.tokens.items() if t.shape[0] == len(PROMPTS)}
            single = Drawing(model, self.accelerator())
            single.forced = rows if len(rows) == len(batch.tokens) else None
            images, alone = single.draw(steps, [prompt], [seed])
            for scale in rows:
                assert (single.logits[scale][0] - batch.logits[scale][row]).abs().max() < 1e-4, (row, scale)
            assert np.array_equal(images[0], batch_images[row])
            if generation.outcomes is not None:
                assert alone.outcomes == generation.outcomes[row : row + 1]

    @pytest.mark.parametrize("ratio", sorted(INFINITY_GRIDS))
    def test_every_aspect_ratio(self, ratio, rule_path):
        grids = INFINITY_GRIDS[ratio][:6]
        model = tiny_infinity(grids)
        sampler = Drawing(model, self.accelerator())
        steps = self.active(model, rule_path)
        images, _ = sampler.draw(steps, PROMPTS[:1], SEEDS[:1])
        assert images.shape == (1, 4 * grids[-1][0], 4 * grids[-1][1], 3)
        assert all(torch.isfinite(logits).all() for logits in sampler.logits.values())
        again, _ = sampler.draw(steps, PROMPTS[:1], SEEDS[:1], steps=steps)
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


class PluggedContract(AcceleratorContract):
    """For an accelerator that schedules call by name (see stagevar.accelerators.plugged).

    Keeping every token must change nothing.
    """

    layers = LAYERS

    def plugged(self) -> Accelerator:
        raise NotImplementedError

    def accelerator(self):
        plugged = self.plugged()
        return Composite({plugged.name: plugged})

    def active(self, model, rule_path):
        return reduced(model, [self._keeping(0.5), self._keeping(0.3)])

    def neutral(self, model, rule_path):
        return reduced(model, [self._keeping(1.0), self._keeping(1.0)])

    def _keeping(self, share):
        name = self.plugged().name
        return lambda tokens, cache_scale: Plugged(max(1, int(share * tokens)), self.layers, cache_scale, name)
