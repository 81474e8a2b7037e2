"""SkipVAR: features, published classifiers, the decision in a schedule, splitting a batch, refitting."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from stagevar.accelerators import SkipVAR
from stagevar.accelerators.skipvar import (
    LinearClassifier,
    SkipRule,
    edge_change,
    edge_strength,
    high_frequency_share,
    load_rule,
    packaged_rules,
)
from stagevar.analysis.skipvar_fit import refit
from stagevar.engine import GraphEngine
from stagevar.errors import ScheduleError, UsageError
from stagevar.models.nano.load import read_preset, shipped_folder
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, StageSchedule, skipvar
from stagevar.schedule.grids import infinity_grids, square
from stagevar.testing.tiny import tiny_infinity
from tests.stagevar.engine.tape import TapeRecorder

SQUARE, _ = infinity_grids("1M")
GRIDS = square((1, 2, 3, 4, 5, 6))
PROMPTS, SEEDS = ["a red ring", "two blue stars", "a cross", "x"], [3, 4, 5, 6]


# ------------------------------------------------------------------ features


def test_edge_strength_is_sobel_with_zero_border():
    ramp = torch.arange(6.0).expand(1, 3, 5, 6)
    strength = edge_strength(ramp)[0]
    assert torch.allclose(strength[1:4, 1:5], torch.full((3, 4), 8.0)), "slope 1 gives 1+2+1 on either side"
    # At the top row, the kernel's upper third sees zeros: 3 * 2 across, and the row below counted once each, down.
    expected = [math.hypot(3 * 2, (x - 1) + 2 * x + (x + 1)) for x in range(1, 5)]
    assert torch.allclose(strength[0, 1:5], torch.tensor(expected))
    assert edge_change(ramp, ramp).item() == 0
    assert edge_change(ramp, 2 * ramp).item() == pytest.approx(strength.mean().item(), rel=1e-6)


def test_high_frequency_share_by_counting_frequencies():
    size = 32
    x = np.mgrid[:size, :size][1]

    def share(frequency):
        wave = torch.tensor(np.cos(2 * np.pi * frequency * x / size), dtype=torch.float32)
        return high_frequency_share(wave.expand(1, 3, -1, -1)).item()

    # int(0.4 * 32 / 2) = 6: frequency 6 is inside, 7 outside.
    assert share(6) < 1e-3 and share(7) > 0.999
    image = np.random.RandomState(0).randn(2, 3, 20, 28)
    got = high_frequency_share(torch.tensor(image)).numpy()
    for row in range(2):
        amplitude = np.abs(np.fft.fftshift(np.fft.fft2(image[row].mean(0))))
        total = outside = 0.0
        for i in range(20):
            for j in range(28):
                total += amplitude[i, j]
                outside += amplitude[i, j] * (math.hypot(i - 10, j - 14) > 4)
        assert got[row] == pytest.approx(outside / total, rel=1e-5)


# ------------------------------------------------------------------ classifiers


def test_published_rules_and_their_decisions():
    rules = packaged_rules()["infinity-2b"]
    assert {"ssim-0.84", "ssim-0.86", "ssim-0.88", "ssim-0.84-edges"} == set(rules)
    rule = rules["ssim-0.84"]
    assert (rule.model, rule.scales, rule.image_scale) == ("infinity-2b", 13, 4)
    features = np.array([[0.1664910763502121, 0.5315351486206055], [0.02, 0.35], [0.11, 0.5], [0.25, 0.6]])
    assert rule.outcomes(features[:1]) == ["cond3"], "the reference's own run"
    assert rule.outcomes(features[1:2]) == ["skip3"], "few edges left to change: skip most"
    # A stricter target never skips more.
    grid = np.array([[a, b] for a in np.linspace(0, 0.3, 13) for b in np.linspace(0.3, 0.7, 9)])
    skipped = {name: rules[name].skip.predict(grid) for name in ("ssim-0.84", "ssim-0.86", "ssim-0.88")}
    assert skipped["ssim-0.88"].mean() < skipped["ssim-0.86"].mean() < skipped["ssim-0.84"].mean()


def test_nanos_rules_fit_the_shipped_model():
    grids = read_preset(shipped_folder()).grids
    rules = packaged_rules()["nano"]
    for name, rule in rules.items():
        assert load_rule(name, "nano", len(grids)) == rule and rule.image_scale < len(grids)
    assert skipvar(grids).decision in rules, "the preset runs on nano"


def test_a_linear_classifier_by_hand():
    classifier = LinearClassifier((1.0, 0.0), (2.0, 1.0), (0, 3), ((1.0, 0.0), (-1.0, 1.0)), (0.0, 0.5))
    # (3, 0) standardises to (1, 0): scores 1 and -0.5; (1, 1) to (0, 1): scores 0 and 1.5.
    assert classifier.predict(np.array([[3.0, 0.0], [1.0, 1.0]])).tolist() == [0, 3]
    first_only = LinearClassifier((1.0,), (2.0,), (0, 3), ((1.0,), (-1.0,)), (0.0, 0.5))
    assert first_only.predict(np.array([[3.0, 9.0], [-3.0, 9.0]])).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": None}, "skip"),
        ({"scales": "many"}, "invalid literal"),
        ({"mean": [0.1]}, "do not match"),
        ({"scale": [0.0, 1.0]}, "not positive"),
        ({"classes": [0, 1, 2, 4]}, "within 0 to 3"),
        ({"coefficients": [[1, 2]]}, "one row per class"),
        ({"intercepts": [0, 0, 0, math.nan]}, "NaN is not a valid JSON number"),
        ({"intercepts": [0, 0, 0, "x"]}, "malformed"),
    ],
    ids=str,
)
def test_malformed_rules_are_refused_in_one_line(change, message, tmp_path):
    data = load_rule("ssim-0.86", "infinity-2b", 13).to_dict()
    for key, value in change.items():
        (data if key in data else data["skip"])[key] = value
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message) as caught:
        load_rule(str(path), "infinity-2b", 13)
    assert "\n" not in str(caught.value)


def test_rules_by_name_and_file(tmp_path):
    rule = load_rule("ssim-0.88", "infinity-2b", 13)
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(rule.to_dict()))
    assert dataclasses.replace(load_rule(str(path), "infinity-2b", 13), name="ssim-0.88") == rule
    with pytest.raises(UsageError, match=r"unknown skip classifier 'ssim-0\.9'; known: ssim-0\.84"):
        load_rule("ssim-0.9", "infinity-2b", 13)
    with pytest.raises(UsageError, match="cannot be read"):
        load_rule(str(tmp_path / "absent.json"), "infinity-2b", 13)
    with pytest.raises(
        UsageError, match="fitted for infinity-2b with 13 scales, not for infinity-2b with 10; refit it"
    ):
        load_rule("ssim-0.88", "infinity-2b", 10)
    with pytest.raises(
        UsageError, match="fitted for infinity-2b with 13 scales, not for infinity-8b with 13; refit it"
    ):
        load_rule("ssim-0.88", "infinity-8b", 13)


# ------------------------------------------------------------------ the decision in a schedule


def test_a_schedule_holds_one_decision_with_seven_continuations():
    steps = skipvar(SQUARE).expand(SQUARE, 8)
    assert [s.scale for s in steps if s.decision] == [9]
    decision = steps[9].decision
    assert [name for name, _ in decision.outcomes] == [
        "full",
        *(f"{w}{k}" for w in ("skip", "cond") for k in (1, 2, 3)),
    ]
    assert decision.continuation("full") == steps[10:]
    assert [s.skipped for s in decision.continuation("skip2")] == [False, True, True]
    assert [s.branches for s in decision.continuation("cond1")] == [BOTH, BOTH, ("cond",)]
    assert hash(steps) == hash(skipvar(SQUARE).expand(SQUARE, 8))
    assert steps != skipvar(SQUARE, "ssim-0.88").expand(SQUARE, 8)


def test_a_decision_keeps_what_the_schedule_says_elsewhere():
    schedule = StageSchedule(10, rank_ratios=(0.5,), skip=(12,), decision="ssim-0.84")
    late = schedule.expand(SQUARE, 8)[9].decision.continuation("cond2")
    assert late[0].reduction is not None and late[0].branches == BOTH
    assert late[1].reduction is not None and late[1].branches == ("cond",)
    assert late[2].skipped
    assert StageSchedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("parameters", "grids", "message"),
    [
        ({"cfg_delay": 0}, SQUARE, "both drop a branch"),
        ({"skip": (9,)}, SQUARE, "skipped scale 9 is where the decision looks"),
        ({}, SQUARE[:4], "at least 5 scales; the model has 4"),
        ({"decision": 3}, SQUARE, "decision 3 must be"),
    ],
)
def test_impossible_mixes_are_refused_with_a_reason(parameters, grids, message):
    with pytest.raises(ScheduleError, match=message):
        StageSchedule(len(grids), **{"decision": "ssim-0.84", **parameters}).expand(grids, 8)


def test_a_classifier_is_refused_on_a_model_it_was_not_fitted_for():
    sampler = Sampler(tiny_infinity(GRIDS))
    steps = skipvar(GRIDS).expand(GRIDS, 2)
    generation = sampler.begin(PROMPTS, SEEDS)
    with pytest.raises(UsageError, match="was fitted for infinity-2b with 13 scales, not for tiny with 6"):
        sampler.finish(generation, steps)
    assert generation.scale == 0, "refused before anything ran"


# ------------------------------------------------------------------ deciding, splitting, regrouping


class Scripted(SkipVAR):
    """Sends the rows where the test says."""

    def __init__(self, outcomes):
        self.outcomes = outcomes

    def check(self, model, decision):
        pass

    def decide(self, model, decision, before, after):
        return self.outcomes


def test_rows_regroup_and_each_gets_its_own_continuation():
    model = tiny_infinity(GRIDS)
    steps = skipvar(GRIDS).expand(GRIDS, 2)
    outcomes = ["skip2", "full", "skip2", "cond3"]
    together = Sampler(model, Scripted(outcomes)).generate(PROMPTS, SEEDS, steps)
    for row, outcome in enumerate(outcomes):
        way = (*(dataclasses.replace(s, decision=None) for s in steps[:3]), *steps[2].decision.continuation(outcome))
        alone = Sampler(model).generate(PROMPTS[row : row + 1], SEEDS[row : row + 1], way)
        assert np.array_equal(together[row], alone[0]), outcome
    assert not np.array_equal(together, Sampler(model, Scripted(["full"] * 4)).generate(PROMPTS, SEEDS, steps))


def test_decisions_under_the_graph_engine():
    """Replayed scales feed the same decision, and rows that part go on."""
    model = tiny_infinity(GRIDS)
    steps = skipvar(GRIDS).expand(GRIDS, 2)
    for outcomes in (["skip1"] * 4, ["skip2", "full", "skip2", "cond3"]):
        expected = Sampler(model, Scripted(outcomes)).generate(PROMPTS, SEEDS, steps)
        sampler = Sampler(model, Scripted(outcomes), GraphEngine(TapeRecorder()))
        for _ in range(2):
            assert np.array_equal(sampler.generate(PROMPTS, SEEDS, steps), expected)


def test_an_open_decision_must_be_taken():
    sampler = Sampler(tiny_infinity(GRIDS), Scripted(["full"] * 4))
    steps = skipvar(GRIDS).expand(GRIDS, 2)
    generation = sampler.begin(PROMPTS, SEEDS)
    with pytest.raises(ValueError, match="no decision follows the 0 scales"):
        sampler.decide(generation)
    for step in steps[:3]:
        sampler.advance(generation, step)
    with pytest.raises(ValueError, match="scale 3 comes after an open decision"):
        sampler.advance(generation, steps[3])
    assert sampler.decide(generation) == ("full",) * 4
    sampler.advance(generation, steps[3])
    sampler.rewind(generation, 3)
    sampler.advance(generation, steps[3])
    sampler.rewind(generation, 2)
    assert generation.outcomes is None, "before the decision it is open again"


def test_a_split_generation_is_independent():
    model = tiny_infinity(GRIDS)
    sampler = Sampler(model)
    steps = StageSchedule(4, cfg_delay=1, rank_ratios=(0.4,)).expand(GRIDS, 2)
    whole = sampler.begin(PROMPTS, SEEDS)
    for step in steps[:3]:
        sampler.advance(whole, step)
    part = sampler.split(whole, [2, 0])
    expected = sampler.finish(whole, steps)
    sampler.begin(["other"] * 4, SEEDS)  # overwrites the shared cache
    got = sampler.finish(part, steps)
    assert np.array_equal(got, expected[[2, 0]])
    sampler.rewind(part, 1)
    assert np.array_equal(sampler.finish(part, steps), expected[[2, 0]]), "its past can be replayed too"


# ------------------------------------------------------------------ refitting


def _similarity(images, references):
    """1 where the change is small against the image itself; tiny's decoder shows codes, so any share will do."""
    error = np.abs(images.astype(float) - references.astype(float)).mean(axis=(1, 2, 3))
    return 1 - error / 255


def test_refit_learns_labels_that_follow_from_the_images(tmp_path):
    model = tiny_infinity(GRIDS)
    sampler = Sampler(model)
    prompts, seeds = [f"prompt {i}" for i in range(24)], list(range(24))
    fit = refit(sampler, prompts, seeds, 0.93, name="tiny-0.93", image_scale=4, batch=8, similarity=_similarity)
    assert fit.features_N2.shape == (24, 2) and set(fit.skip_N) <= {0, 1, 2, 3}
    # Labels are what the continuations really do.
    steps = skipvar(GRIDS).expand(GRIDS, 2)
    full = Sampler(model, Scripted(["full"])).generate(prompts[:1], seeds[:1], steps)
    for kind, label in (("skip", fit.skip_N[0]), ("cond", fit.guidance_N[0])):
        good = [0]
        for count in (1, 2, 3):
            image = Sampler(model, Scripted([f"{kind}{count}"])).generate(prompts[:1], seeds[:1], steps)
            good += [count] * bool(_similarity(image, full)[0] >= 0.93)
        assert label == max(good)
    path = tmp_path / "tiny.json"
    fit.save(path)
    data = json.loads(path.read_text())
    assert data["fit"]["prompts"] == 24 and sum(data["fit"]["skip_labels"]) == 24
    # The file is a decision that this model accepts, and that another one refuses.
    decided = sampler.begin(prompts[:4], seeds[:4])
    sampler.finish(decided, skipvar(GRIDS, str(path)).expand(GRIDS, 2))
    assert decided.outcomes == tuple(fit.rule.outcomes(fit.features_N2[:4]))
    with pytest.raises(UsageError, match="was fitted for tiny with 6 scales, not for other"):
        other = tiny_infinity(GRIDS, name="other")
        Sampler(other).generate(["a"], [0], skipvar(GRIDS, str(path)).expand(GRIDS, 2))


def test_refit_separates_separable_labels():
    from stagevar.analysis.skipvar_fit import _fit

    rng = np.random.RandomState(0)
    for classes in ((2,), (0, 3), (0, 1, 2, 3)):
        labels = rng.choice(classes, 200)
        features = np.stack([labels + 0.05 * rng.randn(200), 5 - labels + 0.05 * rng.randn(200)], axis=1)
        classifier = _fit(features, labels)
        assert classifier.classes == classes
        assert (classifier.predict(features) == labels).all()
        # What is written to a file is what was fitted.
        rule = SkipRule("r", "m", 6, 4, classifier, None)
        assert SkipRule.from_dict("r", json.loads(json.dumps(rule.to_dict()))) == rule


def test_refit_refuses_what_means_nothing(tmp_path):
    model = tiny_infinity(GRIDS)
    with pytest.raises(UsageError, match="random weights"):
        refit(Sampler(dataclasses.replace(model, random_weights=True)), ["a"] * 8, list(range(8)))
    with pytest.raises(UsageError, match="3 prompts are too few to fit on; give at least 8"):
        refit(Sampler(model), ["a"] * 3, [0, 1])
    with pytest.raises(UsageError, match="9 prompts and 8 seeds"):
        refit(Sampler(model), ["a"] * 9, list(range(8)))


def test_schedule_refuses_a_file_that_could_not_be_named(tmp_path):
    fit = refit(
        Sampler(tiny_infinity(GRIDS)),
        [str(i) for i in range(8)],
        list(range(8)),
        similarity=lambda a, b: np.ones(len(a)),
    )
    assert set(fit.skip_N) == {3} and fit.rule.guidance is None
    assert fit.rule.outcomes(fit.features_N2) == ["skip3"] * 8
    with pytest.raises(UsageError, match=r"must end in \.json"):
        fit.save(tmp_path / "rule.yaml")


def test_features_are_finite_for_a_flat_image():
    flat = torch.zeros(1, 3, 8, 8)
    assert edge_change(flat, flat).item() == 0 and high_frequency_share(flat).item() == 0
