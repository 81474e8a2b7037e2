"""--store: what studies share, when it is reused and why not, and that killed writers lose nothing."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from stagevar.errors import UsageError
from stagevar.schedule import StageSchedule
from tests.fakes.studies import CHUNKS, GRIDS, SPACE, FakeEvaluator, study
from tuner.cli.plan import store_folder
from tuner.config.quality import composite_specs, quality_limits
from tuner.evaluation.executor import QualityTask
from tuner.evaluation.local import LocalExecutor
from tuner.evaluation.store import Store, StoredCosts, StoredExecutor, cost_context, quality_context
from tuner.metrics.quality_spec import QualitySpec
from tuner.metrics.registry import CompositeQuality
from tuner.study.identity import RunConfig, identity_of
from tuner.testing.formulas import FormulaEvaluator


def expand(*args, **options):
    return StageSchedule(*args, **options).expand(GRIDS, CHUNKS)


FULL, SKIPS, CONDITIONAL = expand(6), expand(5, skip=(5,)), expand(4, cfg_delay=0, branch="cond")


class Counting(LocalExecutor):
    """Remembers the schedules that it was asked for."""

    def __init__(self, evaluator):
        super().__init__(evaluator)
        self.asked = []

    def run(self, tasks):
        self.asked += [(steps, task.split, task.batch) for task in tasks for steps in task.schedules]
        yield from super().run(tasks)


def stored(folder, path, facts=(), **options):
    """A StoredExecutor on a fake, its counting executor within."""
    one = study(path, {"points": lambda steps: 0.1}, **options)
    evaluator = one.evaluator
    evaluator.facts = dataclasses.replace(evaluator.facts, **dict(facts))
    inner = Counting(evaluator)
    limits = quality_limits(one.space.quality)
    return StoredExecutor(inner, Store(folder), evaluator.facts, one.space, one.prompts, limits), inner


def values(executor, *tasks):
    return dict(executor.run(tasks))


def test_only_what_the_store_lacks_is_run_and_the_values_are_the_same(tmp_path):
    first, asked = stored(tmp_path / "store", tmp_path / "a")
    task = QualityTask((FULL, SKIPS), "search", 0)
    before = values(first, task)
    assert len(asked.asked) == 2
    second, asked = stored(tmp_path / "store", tmp_path / "b")
    more = QualityTask((CONDITIONAL, FULL, SKIPS), "search", 0)
    after = values(second, task, more)
    assert asked.asked == [(CONDITIONAL, "search", 0)]
    for one, other in zip(before[task], after[more][1:], strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[m], other[m]) for m in one if m != "quality")
    assert (second.counts.reused, second.counts.made) == (4 * 8, 8)
    assert "3 results have the same" in second.reasons()[0] and "weights" in second.reasons()[0]


def test_two_tasks_that_lack_the_same_are_run_once_and_both_answered(tmp_path):
    executor, asked = stored(tmp_path / "store", tmp_path / "a")
    values(executor, QualityTask((FULL,), "search", 0))
    asked.asked.clear()
    one, other = QualityTask((FULL, SKIPS), "search", 0), QualityTask((SKIPS, FULL), "search", 0)
    found = values(executor, one, other)
    assert asked.asked == [(SKIPS, "search", 0)]
    assert np.array_equal(found[one][1]["geneval_nano"], found[other][0]["geneval_nano"])


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"provenance": {"weights": {"w": "01"}}}, "another weights"),
        ({"sampling": {"top_k": 3}}, "another sampling"),
        ({"device": {"name": "fake", "kind": "cuda", "threads": 1, "dtype": "bfloat16"}}, "another device and dtype"),
        ({"pixels": (64, 64)}, "another pixels"),
    ],
)
def test_results_of_other_settings_are_not_reused_and_it_says_why(tmp_path, facts, why):
    first, _ = stored(tmp_path / "store", tmp_path / "a")
    values(first, QualityTask((FULL,), "search", 0))
    second, asked = stored(tmp_path / "store", tmp_path / "b", facts)
    assert second.reasons() == [f"1 results have {why}: not reused"]
    values(second, QualityTask((FULL,), "search", 0))
    assert len(asked.asked) == 1


def test_another_version_of_the_code_other_prompts_and_other_metrics_are_not_reused(tmp_path, monkeypatch):
    first, _ = stored(tmp_path / "store", tmp_path / "a")
    values(first, QualityTask((FULL,), "search", 0))
    prompts, asked = stored(tmp_path / "store", tmp_path / "b", seed=1)
    values(prompts, QualityTask((FULL,), "search", 0))
    assert len(asked.asked) == 1 and "reused" in prompts.reasons()[0], "the same context, other prompts"
    monkeypatch.setattr("tuner.evaluation.store.code_digest", lambda: "other")
    code, asked = stored(tmp_path / "store", tmp_path / "c")
    assert code.reasons() == ["2 results have another code: not reused"]
    values(code, QualityTask((FULL,), "search", 0))
    assert len(asked.asked) == 1
    space = study(tmp_path / "d").space
    facts = first.executor.evaluator.facts
    other = dataclasses.replace(space, quality={"geneval_nano": QualitySpec(), "ssim": QualitySpec()})
    assert quality_context(facts, space, "search") != quality_context(facts, other, "search")


def test_another_text_encoder_is_not_reused_nor_resumed_with_but_another_folder_is(tmp_path):
    one = study(tmp_path / "a")

    def reading(path, digest):
        text = {"path": path, "sha256": {"model.safetensors": digest}}
        return dataclasses.replace(one.facts, provenance={**one.facts.provenance, "text": text})

    here, moved, other = reading("/a", "00"), reading("/b", "00"), reading("/a", "11")
    contexts = [quality_context(facts, one.space, "search") for facts in (here, moved, other)]
    assert contexts[0] == contexts[1] != contexts[2]
    identities = [identity_of(f, one.space, one.prompts, one.metrics, one.options) for f in (here, moved, other)]
    assert identities[0] == identities[1] != identities[2]
    asked, heldout = one.space.prompts, one.prompts["heldout"]
    (tmp_path / "old").mkdir(exist_ok=True)
    (tmp_path / "new").mkdir(exist_ok=True)
    RunConfig(tmp_path / "old", "").claim(one.identity(), asked, heldout, None)
    assert RunConfig(tmp_path / "old", "").claim(identities[0], asked, heldout, None), "older runs do not say"
    RunConfig(tmp_path / "new", "").claim(identities[0], asked, heldout, None)
    with pytest.raises(UsageError, match="text encoder"):
        RunConfig(tmp_path / "new", "").claim(identities[2], asked, heldout, None)


def test_limits_and_weights_change_no_result_and_the_composite_is_computed_anew(tmp_path):
    quality = {"ssim": QualitySpec(1.0, 0.1), "psnr": QualitySpec(0.5, 2.0)}
    one = study(tmp_path / "a")
    space = dataclasses.replace(one.space, quality=quality)
    loose = dataclasses.replace(space, quality={"ssim": QualitySpec(1.0, 0.3), "psnr": QualitySpec(0.5)})
    facts = one.evaluator.facts
    assert quality_context(facts, space, "search") == quality_context(facts, loose, "search")
    limits = quality_limits(quality)
    executor = StoredExecutor(Counting(one.evaluator), Store(tmp_path), facts, space, one.prompts, limits)
    rows = {"ssim": [0.3, 0.7], "psnr": [21.5, 33.25]}
    any_metric = SimpleNamespace(higher_is_better=True, needs_reference=False, needs_prompt=False)
    weights = {name: spec.weight for name, spec in composite_specs(quality, limits).items()}
    composite = CompositeQuality({name: (weight, any_metric) for name, weight in weights.items()})
    assert np.array_equal(executor._with_composite(rows)["quality"], composite.combine(rows))


def test_a_damaged_result_is_made_anew(tmp_path):
    first, _ = stored(tmp_path / "store", tmp_path / "a")
    task = QualityTask((FULL, SKIPS), "search", 0)
    values(first, task)
    files = [p for p in (tmp_path / "store").rglob("*.json") if p.name != "context.json"]
    assert len(files) == 2
    files[0].write_text(files[0].read_text()[:-20])
    held = json.loads(files[1].read_text())
    held["data"]["geneval_nano"][0] += 1
    files[1].write_text(json.dumps(held))
    second, asked = stored(tmp_path / "store", tmp_path / "b")
    values(second, task)
    assert len(asked.asked) == 2
    assert all(second.store.read(path) is not None for path in files), "written again"


def test_a_schedule_that_failed_is_not_kept(tmp_path):
    one = study(tmp_path / "a", {"broken": lambda steps: steps == SKIPS})
    limits = quality_limits(one.space.quality)
    executor = StoredExecutor(
        LocalExecutor(one.evaluator), Store(tmp_path / "store"), one.evaluator.facts, one.space, one.prompts, limits
    )
    [(_, outcomes)] = executor.run([QualityTask((FULL, SKIPS), "search", 0)])
    assert "broken" in outcomes[1].error
    assert sum(p.name != "context.json" for p in (tmp_path / "store").rglob("*.json")) == 1


# ------------------------------------------------------------------------------------------------ step costs


class Timed(FakeEvaluator):
    """Remembers the schedules whose steps it was asked to time."""

    asked: tuple = ()

    def step_ms(self, schedules, rounds):
        self.asked = tuple(schedules)
        return super().step_ms(schedules, rounds)


def test_step_costs_are_shares_and_only_those_missing_are_timed(tmp_path):
    prompts = study(tmp_path / "a").prompts
    first, second = Timed(prompts), Timed(prompts, seed=1, full_ms=250.0)
    before = StoredCosts(first, Store(tmp_path / "store")).step_ms([FULL, SKIPS], 3)
    after = StoredCosts(second, Store(tmp_path / "store")).step_ms([FULL, SKIPS, CONDITIONAL], 3)
    assert second.asked == (FULL, CONDITIONAL), "the full schedule is always beside what is timed"
    for found in (before, after):
        np.testing.assert_allclose(sum(np.asarray(found[FULL[: d + 1]]) for d in range(6)), 1.0)
    assert before[SKIPS] == after[SKIPS] and CONDITIONAL in after
    third = Timed(prompts, seed=2)
    assert StoredCosts(third, Store(tmp_path / "store")).step_ms([SKIPS, FULL], 3).keys() == before.keys()
    assert third.asked == ()


def test_step_costs_never_cross_from_one_device_to_another(tmp_path):
    prompts = study(tmp_path / "a").prompts
    here, there = Timed(prompts), Timed(prompts)
    gpu = {"name": "H100", "kind": "cuda", "dtype": "bfloat16"}
    here.facts = dataclasses.replace(here.facts, device=gpu)
    there.facts = dataclasses.replace(there.facts, device={**gpu, "name": "L4"})
    StoredCosts(here, Store(tmp_path / "store")).step_ms([FULL, SKIPS], 3)
    StoredCosts(there, Store(tmp_path / "store")).step_ms([FULL, SKIPS], 3)
    assert there.asked == (FULL, SKIPS)
    cpu = {"name": "cpu", "kind": "cpu", "threads": 1}
    assert "host" in cost_context(dataclasses.replace(here.facts, device=cpu))["device"], "CPUs have no telling name"


def test_everything_but_step_costs_is_the_evaluators_own(tmp_path):
    evaluator = study(tmp_path / "a").evaluator
    wrapped = StoredCosts(evaluator, Store(tmp_path / "store"))
    assert wrapped.facts is evaluator.facts
    assert np.array_equal(*(e.images(FULL, "search", 0) for e in (wrapped, evaluator)))
    assert np.array_equal(*(e.quality([FULL], "search", 0)[0]["quality"] for e in (wrapped, evaluator)))
    assert wrapped.scale_ms({"full": FULL}) is wrapped.scales_run is wrapped.scales_alone is None, "it offers none"
    evaluator.scale_ms = lambda schedules, rounds=5: dict.fromkeys(schedules, (1.0,))
    assert wrapped.scale_ms({"full": FULL}) == {"full": (1.0,)}


def test_an_evaluator_that_times_no_steps_gives_no_step_costs(tmp_path):
    assert StoredCosts(FormulaEvaluator(), Store(tmp_path / "store")).step_ms([FULL], 3) is None


# ------------------------------------------------------------------------------------------------ a whole study


def test_a_study_with_a_store_ends_as_one_without_and_the_next_one_draws_little(tmp_path):
    def run(name, with_store, **options):
        one = study(
            tmp_path / name,
            {"noise": 0.0},
            {"prompts": {**SPACE["prompts"], "heldout": 32}},
            trials=6,
            max_drop=0.3,
            **options,
        )
        if with_store:
            limits = quality_limits(one.space.quality)
            store = Store(tmp_path / "store")
            one.executor = StoredExecutor(one.executor, store, one.facts, one.space, one.prompts, limits)
        return one.run(), one.executor

    plain, _ = run("plain", False)
    first, executor = run("first", True)
    assert {c.key: c.values for c in first.candidates} == {c.key: c.values for c in plain.candidates}
    assert first.verdict == plain.verdict and first.picks == plain.picks
    drawn = executor.counts.made
    _, executor = run("second", True)
    assert executor.counts.made == 0 and executor.counts.reused == drawn
    _, executor = run("third", True, budget="80%")
    assert executor.counts.reused > 0 and executor.counts.made < 0.25 * drawn


WRITER = """
import sys
from pathlib import Path
from tuner.evaluation.store import Store
store = Store(Path(sys.argv[1]))
folder = store.open("quality", {"model": "fake"})
for index in range(400):
    store.write(folder / "b" / f"{index % 40}.json", {"geneval_nano": [index % 40 / 3] * 200})
    print(index % 40, flush=True)
"""


def test_two_writers_killed_at_any_moment_lose_nothing_that_they_had_written(tmp_path):
    rng = random.Random(0)
    written = set()
    for _ in range(3):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)
        ]
        for writer in writers:
            written.add(int(writer.stdout.readline()))
        time.sleep(rng.uniform(0, 0.05))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            written.update(int(line) for line in writer.communicate()[0].split(b"\n")[:-1])
    store = Store(tmp_path)
    folder = store.open("quality", {"model": "fake"})
    assert len(written) > 1
    for index in written:
        assert store.read(folder / "b" / f"{index}.json") == {"geneval_nano": [index / 3] * 200}
    for path in (folder / "b").glob("*.json"):
        assert store.read(path) is not None, "half a file under its final name"


# ------------------------------------------------------------------------------------------------ the option


def test_the_option_comes_before_the_environment_and_a_file_is_refused(tmp_path, monkeypatch):
    assert store_folder(None) is None
    monkeypatch.setenv("STAGEVAR_STORE", str(tmp_path / "shared"))
    assert store_folder(None) == tmp_path / "shared"
    assert store_folder(tmp_path / "own") == tmp_path / "own" and not (tmp_path / "own").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--store .*file cannot be written"):
        store_folder(tmp_path / "file")
    monkeypatch.setenv("STAGEVAR_STORE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"STAGEVAR_STORE .*file cannot be written"):
        store_folder(None)
