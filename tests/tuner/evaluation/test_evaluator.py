"""The prefix tree: bit for bit what each schedule gives alone, each distinct prefix run once."""

import numpy as np
import pytest
import torch

from stagevar.errors import UsageError
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact, skipvar
from stagevar.schedule.grids import square
from stagevar.testing.tiny import tiny_infinity
from tuner.config.prompts import load_prompts
from tuner.config.space import PromptSource
from tuner.evaluation.executor import Failed, QualityTask
from tuner.evaluation.local import LocalExecutor
from tuner.evaluation.model_evaluator import ModelEvaluator
from tuner.evaluation.prefix_tree import walk
from tuner.metrics.base import prompt_text
from tuner.metrics.quality_spec import QualitySpec

GRIDS = square((1, 2, 3, 4, 6))
SCHEDULES = [
    exact(5),
    StageSchedule(3, cfg_delay=0, rank_ratios=(0.4, 0.2)),
    StageSchedule(3, cfg_delay=0, rank_ratios=(0.4, 0.3)),
    StageSchedule(3, cfg_delay=0, branch="cond", rank_ratios=(0.4,), site="trunk"),
    StageSchedule(4, skip=(4,)),
    StageSchedule(2, cfg_delay=1, rank_ratios=(0.5,), projection="rows", rope="index"),
    StageSchedule(3, semantic_end=1, cfg_delay=0, rank_ratios=(0.4, 0.2)),
]


@pytest.fixture(scope="module")
def model():
    return tiny_infinity(GRIDS, name="tiny")


@pytest.fixture(scope="module")
def steps():
    return [schedule.expand(GRIDS, 2) for schedule in SCHEDULES]


@pytest.fixture
def prompts():
    return load_prompts(PromptSource(search=6, heldout=4, micro_batch=4))


def test_the_tree_gives_the_images_of_each_schedule_alone(model, steps):
    texts, seeds = ["a red circle", "two blue squares", "a star"], [5, 6, 7]
    sampler, found = Sampler(model), {}

    def leaf(members, images):
        found.update(dict.fromkeys(members, images))

    runs = walk(sampler, sampler.begin(texts, seeds), steps, leaf)
    for index, schedule in enumerate(steps):
        alone = Sampler(model)
        generation = alone.begin(texts, seeds)
        for step in schedule:
            alone.advance(generation, step)
        assert np.array_equal(found[index], alone.decode(generation)), SCHEDULES[index]
        assert np.array_equal(found[index], Sampler(model).generate(texts, seeds, schedule)), (
            "the deployed cache differs"
        )
    # Scales 0 and 1 once; scale 2 once; at 3: full, chunk, trunk, first of the early one; then the leaves.
    assert runs == len({schedule[: i + 1] for schedule in steps for i in range(5) if not schedule[i].skipped})
    assert runs < sum(not step.skipped for schedule in steps for step in schedule)


def test_order_of_schedules_does_not_matter(model, steps):
    texts, seeds = ["a red circle"], [1]

    def images(order):
        sampler, found = Sampler(model), {}

        def leaf(members, pixels):
            found.update({order[m]: pixels for m in members})

        walk(sampler, sampler.begin(texts, seeds), [steps[i] for i in order], leaf)
        return found

    forward, backward = images(list(range(len(steps)))), images(list(range(len(steps)))[::-1])
    assert all(np.array_equal(forward[i], backward[i]) for i in forward)


def test_quality_is_per_prompt_and_references_are_made_once(model, steps, prompts, tmp_path):
    evaluator = ModelEvaluator(
        model, prompts, {"psnr": QualitySpec(0.01)}, {"ssim": 0.1}, references_dir=tmp_path / "references"
    )
    values = evaluator.quality(steps[:3], "search", 0)
    assert [len(v["quality"]) for v in values] == [4, 4, 4]
    assert set(values[0]) == {"psnr", "ssim", "quality"}
    assert (values[0]["psnr"] == 100).all() and (values[1]["psnr"] < 100).all()
    assert np.allclose(values[1]["quality"], 0.01 * values[1]["psnr"])
    assert len(evaluator.quality(steps[:1], "search", 1)[0]["quality"]) == 2
    assert sorted(p.name for p in (tmp_path / "references").iterdir()) == ["search-0000.npy", "search-0001.npy"]
    again = ModelEvaluator(model, prompts, {"psnr": QualitySpec(0.01)}, {"ssim": 0.1})
    assert np.array_equal(again.quality(steps[1:2], "search", 0)[0]["psnr"], values[1]["psnr"])
    assert evaluator.scales_run < evaluator.scales_alone


def test_images_are_drawn_on_threads_of_their_own_and_stay_the_same(model, steps, prompts, monkeypatch):
    """Latency keeps its thread; what more threads draw is the same bit for bit."""
    one, more = (ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, drawing_threads=n) for n in (None, 3))
    used, decode = [], Sampler.decode
    monkeypatch.setattr(Sampler, "decode", lambda *args: (used.append(torch.get_num_threads()), decode(*args))[1])
    values = [evaluator.quality(steps[:3], "search", 0) for evaluator in (one, more)]
    assert set(used[: len(used) // 2]) == {1} and set(used[len(used) // 2 :]) == {3}
    assert torch.get_num_threads() == 1
    assert all(np.array_equal(a["psnr"], b["psnr"]) for a, b in zip(*values, strict=True))


def test_kept_scales_of_the_full_schedule_change_nothing_and_save_runs(model, steps, prompts):
    """Bit for bit, whatever is kept: later walks copy what the full schedule computed."""
    plain = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, keep_bytes=0)
    keeping = ModelEvaluator(model, prompts, {"psnr": QualitySpec()})
    for batch in (0, 1):
        keeping.quality(steps[:1], "search", batch)
        plain.quality(steps[:1], "search", batch)
    before = keeping.scales_run, plain.scales_run
    for chosen in (steps[1:3], steps[3:], steps[::-1]):
        for batch in (0, 1):
            ours, theirs = (e.quality(chosen, "search", batch) for e in (keeping, plain))
            for one, other in zip(ours, theirs, strict=True):
                assert all(np.array_equal(one[metric], other[metric]) for metric in one)
    assert keeping.scales_run - before[0] < plain.scales_run - before[1]
    assert set(keeping._kept) == {0, 1} and not plain._kept
    heldout = keeping.quality(steps[:2], "heldout", 0), plain.quality(steps[:2], "heldout", 0)
    assert np.array_equal(heldout[0][1]["psnr"], heldout[1][1]["psnr"]) and set(keeping._kept) == {0, 1}


def test_too_little_memory_keeps_nothing(model, steps, prompts):
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, keep_bytes=1000)
    evaluator.quality(steps[:1], "search", 0)
    assert not evaluator._kept


def test_a_scale_is_only_taken_over_from_the_same_past(model, steps):
    sampler = Sampler(model)
    generation = sampler.begin(["a star"], [1])
    for step in steps[0][:3]:
        sampler.advance(generation, step)
    kept = sampler.split(generation, [0])
    other = sampler.begin(["a star"], [1])
    sampler.advance_like(other, kept)
    sampler.advance(other, steps[5][1])
    sampler.advance(other, steps[5][2])
    with pytest.raises(ValueError, match="other steps"):
        sampler.advance_like(other, kept)
    sampler.rewind(other, 0)
    for _ in range(3):
        sampler.advance_like(other, kept)
    with pytest.raises(ValueError, match="no scale 3"):
        sampler.advance_like(other, kept)
    for step in steps[1][3:]:
        sampler.advance(other, step)
    assert np.array_equal(sampler.decode(other), Sampler(model).generate(["a star"], [1], steps[1]))


def test_step_times_cover_every_prefix_once_a_round(model, steps, prompts):
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()})
    found = evaluator.step_ms(steps[:5], 3)
    assert set(found) == {s[:depth] for s in steps[:5] for depth in range(len(s) + 1)}
    assert all(len(values) == 3 and all(v >= 0 for v in values) for values in found.values())
    with pytest.raises(ValueError, match="decision point"):
        evaluator.step_ms([skipvar(GRIDS, "ssim-0.84").expand(GRIDS, 2)], 1)


def test_random_weights_have_no_quality(steps, prompts):
    model = tiny_infinity(GRIDS)
    model.random_weights = True
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()})
    assert evaluator.facts.random_weights and evaluator.facts.higher_is_better == {}
    with pytest.raises(RuntimeError, match="random weights"):
        evaluator.quality(steps[:1], "search", 0)


def test_latency_times_every_schedule_in_turn(model, steps, prompts):
    timings = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}).latency(
        {"full": steps[0], "fast": steps[1]}, 3, 3
    )
    assert {name: len(t.samples_ms) for name, t in timings.items()} == {"full": 3, "fast": 3}
    assert all(ms > 0 for t in timings.values() for ms in t.samples_ms)


def test_a_broken_schedule_takes_no_other_with_it(model, steps, prompts):
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()})
    foreign = exact(5).expand(square((1, 2, 3, 4, 5)), 2)
    ((_, outcomes),) = LocalExecutor(evaluator).run([QualityTask((steps[0], foreign, steps[1]), "search", 0)])
    assert isinstance(outcomes[1], Failed) and outcomes[1].error.startswith("ValueError: ")
    assert np.array_equal(outcomes[2]["psnr"], evaluator.quality(steps[1:2], "search", 0)[0]["psnr"])


def test_prompt_sets_share_no_image(prompts):
    search, heldout = prompts["search"], prompts["heldout"]
    assert not set(zip(search.texts, search.seeds, strict=True)) & set(zip(heldout.texts, heldout.seeds, strict=True))
    assert search.batches == 2 and len(search.batch(1)[0]) == 2
    assert load_prompts(PromptSource(search=6, heldout=4, micro_batch=4))["search"].digest == search.digest
    assert load_prompts(PromptSource(search=6, heldout=4, micro_batch=2))["search"].digest != search.digest


def test_latency_is_timed_on_the_engine_of_the_study(model, steps, prompts, monkeypatch):
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, engine="compiled")
    assert evaluator.facts.engine == "compiled"
    seen = []

    check = evaluator.timer.check_engine

    def spy(sampler):
        seen.append(sampler.engine.name)
        check(sampler)

    monkeypatch.setattr(evaluator.timer, "check_engine", spy)
    evaluator.latency({"one": steps[0], "two": steps[1]}, 1, 1)
    evaluator.step_ms(steps[:2], 1)
    evaluator.scale_ms({"one": steps[0]}, 1)
    assert seen == ["compiled"] * 4


def test_an_engine_that_goes_on_eagerly_gives_no_figure(model, steps, prompts):
    from types import SimpleNamespace

    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()})
    with pytest.raises(RuntimeError, match="engine eager fell back to eager \\(out of memory\\); use --engine eager"):
        evaluator.timer.check_engine(
            SimpleNamespace(engine=SimpleNamespace(fallback_reason="out of memory", compiled=False))
        )


def test_an_engine_that_cannot_run_here_is_refused_at_once(model, prompts):
    with pytest.raises(UsageError, match="engine graph needs a CUDA device"):
        ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, engine="graph")


def test_heldout_images_are_those_that_deployment_serves(model, steps, prompts, tmp_path, monkeypatch):
    """A verdict is about the images of the deployed engine, one at a time; a search may draw others, faster."""
    from stagevar.engine import GraphEngine
    from tests.stagevar.engine.tape import TapeRecorder

    class Brighter(GraphEngine):
        """A recorded decoder whose kernels round otherwise."""

        def decode(self, code_sum_BdHW, decode):
            return super().decode(code_sum_BdHW, lambda codes: decode(codes) + 0.25)

    plain = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, references_dir=tmp_path / "plain")
    evaluator = ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, references_dir=tmp_path / "graph")
    evaluator.engine = "graph"
    monkeypatch.setattr(evaluator.timer, "new_sampler", lambda: Sampler(model, engine=Brighter(TapeRecorder())))
    two = steps[:2]
    found = evaluator.quality(two, "heldout", 0)
    texts, seeds = prompts["heldout"].batch(0)
    served = Sampler(model, engine=Brighter(TapeRecorder()))
    pairs = zip(texts, seeds, strict=True)
    images = np.concatenate([served.generate([prompt_text(text)], [seed], two[1]) for text, seed in pairs])
    assert np.array_equal(evaluator.images(two[1], "heldout", 0), images)
    assert not np.array_equal(plain.images(two[1], "heldout", 0), images)
    full = np.load(tmp_path / "graph" / "heldout-0000.npy")
    expected = evaluator.composite.score_parts(images, list(texts), full)["psnr"]
    assert np.array_equal(found[1]["psnr"], expected)
    assert np.array_equal(evaluator.images(two[1], "search", 0), plain.images(two[1], "search", 0))
    assert evaluator._serving is None, "its cache and recordings stay beside those of the search"


def test_a_study_says_which_engine_drew_the_heldout_images(model, prompts):
    assert ModelEvaluator(model, prompts, {"psnr": QualitySpec()}, engine="compiled").facts.heldout_engine == "compiled"
    assert ModelEvaluator(model, prompts, {"psnr": QualitySpec()}).facts.heldout_engine == "eager"
