"""Stage analysis: what is measured is what the sampler does, and the rules give the schedule that they state."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from stagevar.accelerators import Exact
from stagevar.analysis.bands import band_spectra
from stagevar.analysis.measure import ENERGIES, _divergence, analyze, nano_inputs
from stagevar.analysis.plots import draw
from stagevar.analysis.result import Curve, load_proposal
from stagevar.analysis.rules import Rules, begun_at, missing_upper, propose_ranks, propose_stages, settled
from stagevar.analysis.similarity import Similarity, find_similarity
from stagevar.errors import UsageError
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import BOTH, StageSchedule, exact
from stagevar.schedule.ranks import ratios_for_energy
from stagevar.testing.tiny import GRIDS, tiny_infinity

PROMPTS = ["a red circle", "two blue squares", "a green star above a cat", "nothing"]
SEEDS = [3, 1, 4, 1]


def likeness(images, finals):
    return 1 - np.abs(images.astype(float) - finals).mean(axis=(1, 2, 3)) / 255


def brightness(images, prompts):
    return images.astype(float).mean(axis=(1, 2, 3)) / 255


@pytest.fixture(scope="module")
def model():
    return tiny_infinity()


@pytest.fixture(scope="module")
def analysis(model):
    calls = []
    result = analyze(
        model, PROMPTS, SEEDS, similarities=[Similarity("likeness", likeness)], quality={"brightness": brightness},
        rules=Rules(semantic=0.9, structure=0.9, guidance=0.9, ranks=2.0), micro_batch=3, shown=2,
        progress=lambda *event: calls.append(event),
    )  # fmt: skip
    assert calls == [(what, i + 1, 6) for i, what in enumerate(["scales"] * 2 + ["ranks"] * 2 + ["ablation"] * 2)]
    return result


def test_partial_images_are_the_samplers_own(model, analysis):
    sampler = Sampler(model)
    generation = sampler.begin(PROMPTS[:3], SEEDS[:3])
    for scale, step in enumerate(exact(len(GRIDS)).expand(GRIDS, sampler.chunks)):
        sampler.advance(generation, step)
        assert np.array_equal(analysis.partials[:, scale], sampler.decode(generation)[:2])
    assert analysis.partials.shape == (2, 5, 24, 24, 3)


def test_curves_end_where_the_final_image_is(analysis):
    for name in ("low_frequency", "ssim", "likeness"):
        assert analysis.similarity[name].mean[-1] == pytest.approx(1.0)
        assert analysis.missing[name][0] == pytest.approx(1.0) and analysis.missing[name][-1] == 0
    assert analysis.similarity["psnr_db"].mean[-1] == 100
    assert analysis.stage_of == {
        "low_frequency": "none",
        "ssim": "structure",
        "psnr_db": "none",
        "likeness": "semantic",
    }
    for curve in [*analysis.similarity.values(), *analysis.frequency.values()]:
        assert len(curve.mean) == 5
        assert all(
            low <= mean + 1e-6 and mean <= high + 1e-6
            for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True)
        )


def test_guidance_relevance_is_what_one_branch_would_draw(model, analysis):
    assert set(analysis.guidance) == set(BOTH)
    flips = {}
    for branch in BOTH:
        sampler = Sampler(model)
        generation = sampler.begin(PROMPTS, SEEDS)
        steps = exact(len(GRIDS)).expand(GRIDS, sampler.chunks)
        for step in steps[:2]:
            sampler.advance(generation, step)
        drawn = {}
        for name, branches in (("both", BOTH), ("one", (branch,))):
            seen = []
            sampler.on_scale = lambda step, logits, tokens, seen=seen: seen.append(tokens)
            sampler.advance(generation, dataclasses.replace(steps[2], branches=branches))
            sampler.rewind(generation, 2)
            drawn[name] = seen[0]
        flips[branch] = (drawn["both"] != drawn["one"]).float().mean().item()
    for branch in BOTH:
        assert analysis.guidance[branch]["flips"].mean[2] == pytest.approx(flips[branch], abs=1e-6)
        assert all(v >= 0 for v in analysis.guidance[branch]["divergence"].mean)
    assert flips["uncond"] > 0


def test_without_guidance_one_branch_is_all_there_is():
    plain = analyze(tiny_infinity(guidance=1.0), PROMPTS[:2], SEEDS[:2], ablation_prompts=0, rank_prompts=0)
    cond = plain.guidance["cond"]
    assert max(cond["flips"].mean) == 0 and max(cond["image"].mean) == pytest.approx(0, abs=1e-9)
    assert max(cond["divergence"].mean) < 1e-6
    assert plain.proposal.branch == "cond" and plain.proposal.cfg_delay == 0
    assert plain.rank_ratio == {} and plain.proposal.rank_ratios is None and plain.ablation == []


def test_divergence_is_zero_for_equal_logits_and_counts_nats():
    same = torch.randn(2, 3, 4, 2)
    assert np.allclose(_divergence(same, same), 0)
    certain, even = torch.tensor([[[30.0, 0.0]]]), torch.zeros(1, 1, 2)
    assert _divergence(certain, even) == pytest.approx([np.log(2)])


def test_bands_separate_slow_from_fast_waves():
    x = np.arange(64) / 64
    slow, fast = (128 + 100 * np.cos(2 * np.pi * k * x) for k in (2, 12))
    for wave, inside in ((slow, True), (fast, False)):
        image = np.broadcast_to(wave[None, None, :, None], (1, 64, 64, 3)).astype(np.uint8)
        spectrum, low = band_spectra(image, (16, 16))
        energy = np.abs(spectrum) ** 2
        assert ((energy * low).sum() / energy.sum() > 0.99) == inside


def test_rank_table_agrees_with_a_plain_svd(model, analysis):
    inputs = {}

    class Spy(Exact):
        def around(self, context, updates):
            inner = super().around(context, updates)

            def around(site, x, positions, run):
                if site.kind == "chunk":
                    inputs[context.step.scale, site.index] = x
                return inner(site, x, positions, run)

            return around

    sampler = Sampler(model, Spy())
    shares = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        sampler.generate([prompt], [seed], exact(len(GRIDS)).expand(GRIDS, sampler.chunks))
        for x_MC in inputs[4, 1]:
            energy = torch.linalg.svdvals(x_MC.double()) ** 2
            cumulative = (energy / energy.sum()).cumsum(0)
            shares.append((1 + int((cumulative < 0.96).sum())) / 36)
    assert analysis.rank_ratio["0.96"]["6"][1] == pytest.approx(np.mean(shares), abs=1e-6)
    assert tuple(analysis.rank_ratio) == ENERGIES
    table = np.array([[row for side in sides.values() for row in side] for sides in analysis.rank_ratio.values()])
    assert (np.diff(table, axis=0) <= 1e-9).all(), "less energy never needs more tokens"
    assert (analysis.spectrum[..., -1] > 0.999).all() and (np.diff(analysis.spectrum, axis=-1) >= -1e-9).all()


def test_written_files_are_what_the_runtime_reads(model, analysis, tmp_path):
    folder = tmp_path / "new" / "folder"
    paths = [*analysis.save(folder), *draw(analysis, folder)]
    assert [path.name for path in paths] == ["analysis.yaml", "rank_ratio.json", "analysis.png", "partials.png"]
    data = yaml.safe_load(paths[0].read_text())
    assert data["kind"] == "stagevar-analysis" and data["weights"] == "trained"
    assert load_proposal(paths[0]) == analysis.proposal
    analysis.proposal.expand(GRIDS, analysis.chunks)
    table = json.loads(paths[1].read_text())["ratio"]
    assert ratios_for_energy(0.9, 36, analysis.chunks, table) == tuple(analysis.rank_ratio["0.90"]["6"])
    with Image.open(paths[2]) as curves, Image.open(paths[3]) as partials:
        assert curves.width > 1200
        assert partials.size == (5 * 96 + 4 * 4, 2 * 96 + 4)


def test_ablation_has_a_row_per_start_and_matches_a_straight_run(model, analysis):
    assert [row["first_accelerated_scale"] for row in analysis.ablation] == [1, 2, 3, 4]
    shares = [row["token_rows"] for row in analysis.ablation]
    assert shares == sorted(shares) and shares[0] < 0.6
    assert analysis.proposal.cfg_delay is not None and analysis.proposal.rank_ratios is not None
    sampler = Sampler(model)
    for start in (1, 3):
        steps = begun_at(analysis.proposal, start, model).expand(GRIDS, sampler.chunks)
        full = exact(len(GRIDS)).expand(GRIDS, sampler.chunks)
        # The analysis works in batches of three, which rounding may tell from one by one.
        scores = [
            likeness(sampler.generate([p], [s], steps), sampler.generate([p], [s], full))[0]
            for p, s in zip(PROMPTS, SEEDS, strict=True)
        ]
        assert analysis.ablation[start - 1]["likeness"]["mean"] == pytest.approx(np.mean(scores), abs=0.02)


# ---------------------------------------------------------------- the rules on curves made by hand


def curves(model, ssim, meaning, cond, uncond, n=6):
    """Measured arrays in which every prompt shows the same curve, and what follows from them."""
    rows = {"ssim": ssim, "meaning": meaning, "image:cond": cond, "image:uncond": uncond}
    return {name: np.tile(np.array(values, dtype=float), (n, 1)) for name, values in rows.items()}


def propose(model, measured, rules=None):
    rules = rules or Rules()
    stage_of = {"ssim": "structure", "meaning": "semantic"}
    missing = {name: missing_upper(1 - measured[name], measured[name], rules) for name in stage_of}
    return propose_stages(model, rules, measured, missing, stage_of)


def test_boundaries_follow_the_plateaus(model):
    measured = curves(
        model, ssim=[0, 0.3, 0.6, 0.8, 1], meaning=[0, 0.92, 0.95, 1, 1],
        cond=[0.5, 0.5, 0.5, 0.5, 0.2], uncond=[0.5, 0.5, 0.5, 0.5, 0.1],
    )  # fmt: skip
    schedule, reasons = propose(model, measured)
    assert (schedule.semantic_end, schedule.structure_end) == (2, 4)
    assert (schedule.cfg_delay, schedule.branch) == (0, "uncond"), "the branch that moves the image less"
    assert "from scale 3 (side 4) on" in reasons["structure_end"]
    stricter, _ = propose(model, measured, Rules(semantic=0.06))
    assert stricter.semantic_end == 3


def test_the_branch_with_the_earlier_cutoff_is_kept(model):
    measured = curves(model, [0, 0.9, 1, 1, 1], [0, 1, 1, 1, 1], [0.3, 0.3, 0.3, 0.2, 0.2], [0.3, 0.3, 0.3, 0.3, 0.1])
    schedule, _ = propose(model, measured)
    assert (schedule.structure_end, schedule.cfg_cutoff, schedule.branch) == (2, 3, "cond")


def test_without_a_plateau_only_the_last_scale_is_left(model):
    measured = curves(model, [0, 0.1, 0.2, 0.3, 1], [0, 0.1, 0.2, 0.3, 1], [1] * 5, [1] * 5)
    schedule, reasons = propose(model, measured)
    assert (schedule.semantic_end, schedule.structure_end, schedule.cfg_delay) == (4, 4, None)
    assert "no plateau" in reasons["structure_end"] and "guidance stays" in reasons["cfg_cutoff"]


def test_a_plateau_must_last():
    assert settled([1, 0.05, 0.3, 0.04, 0.0], 0.1) == 3
    assert settled([1, 0.5], 0.1) == 2


def test_disagreeing_prompts_delay_the_plateau():
    rng = np.random.default_rng(0)
    calm = 1 - np.tile([1.0, 0.09, 0.0], (12, 1))
    wild = calm.copy()
    wild[:, 1] += rng.permutation([-0.09, 0.09] * 6)
    upper = [missing_upper(1 - values, values, Rules())[1] for values in (calm, wild)]
    assert upper[0] == pytest.approx(0.09) and upper[1] > 0.1


def test_ranks_take_the_least_energy_that_costs_less_than_leaving_the_scales_out(model, analysis):
    schedule = StageSchedule(4, 2, cfg_delay=0)
    ssim_NK = np.tile([0.0, 0.5, 0.6, 0.7, 1.0], (4, 1))  # without scale 4 an image lacks 0.3
    trials = {
        ("0.99", "gaussian"): [np.full(4, 0.2)], ("0.96", "gaussian"): [np.full(4, 0.25)],
        ("0.99", "rows"): [np.full(4, 0.1)], ("0.96", "rows"): [np.full(4, 0.14)], ("0.92", "rows"): [np.full(4, 0.16)],
    }  # fmt: skip

    def ranks_for(ssim_NK, **rules):
        return propose_ranks(model, Rules(**rules), ssim_NK, trials, schedule, analysis.rank_ratio)

    proposed, why = ranks_for(ssim_NK)
    assert (proposed.projection, proposed.rope) == ("rows", "index")
    assert proposed.rank_ratios == (tuple(analysis.rank_ratio["0.96"]["6"]),)
    assert "energy 0.96" in why and "leaving out all scales from scale 4 (side 6) on" in why
    kept, why = ranks_for(ssim_NK, ranks=0.05)
    assert kept == schedule and "every token is kept" in why
    # The last scale adds so little here that every one of these reductions costs more than half of it.
    kept, why = ranks_for(np.tile([0.0, 0.5, 0.6, 0.85, 1.0], (4, 1)))
    assert kept == schedule and "every token is kept" in why


def test_ablation_shifts_cutoff_and_ranks_with_the_start(model):
    proposal = StageSchedule(3, 2, cfg_delay=1, rank_ratios=((0.5, 0.4), (0.3, 0.2)))
    earlier = begun_at(proposal, 1, model)
    idle = StageSchedule(4, 2, branch="cond")
    assert (begun_at(idle, 2, model).cfg_cutoff, begun_at(idle, 2, model).branch) == (2, "cond")
    assert (earlier.cfg_cutoff, earlier.semantic_end) == (2, 1)
    assert earlier.rank_ratios == ((0.5, 0.4),) * 3 + ((0.3, 0.2),)
    later = begun_at(proposal, 4, model)
    assert (later.cfg_cutoff, later.rank_ratios) == (5, ((0.3, 0.2),))
    assert begun_at(proposal, 3, model) == proposal


def test_intervals_shrink_with_prompts():
    rng = np.random.default_rng(0)
    wide, narrow = (Curve.of(rng.normal(size=(n, 1)), 0.95) for n in (8, 512))
    assert (narrow.high[0] - narrow.low[0]) < 0.3 * (wide.high[0] - wide.low[0])
    assert narrow.low[0] < 0 < narrow.high[0]


# ---------------------------------------------------------------- inputs


def test_nano_inputs_are_judged_by_the_pixels():
    prompts, seeds, quality = nano_inputs(7, seed=5)
    assert len(prompts) == 7 and seeds == list(range(5, 12))
    values = quality["checker"](np.zeros((7, 48, 48, 3), np.uint8), prompts)
    assert values.shape == (7,) and values.sum() == 0


def test_installed_similarities_are_found_by_name():
    nano = find_similarity("clip:model=nano")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    assert nano.stage == "semantic"
    assert nano.score(images, images) == pytest.approx([1, 1], abs=1e-5)
    assert (nano.score(images, 255 - images) < 0.999).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: find_similarity("clop"), "unknown similarity 'clop' .known: clip, dino"),
        (lambda m, d: find_similarity("clip:nano"), "name=value pairs"),
        (lambda m, d: find_similarity("clip:colour=red"), "no option 'colour'"),
        (lambda m, d: analyze(m, ["one"], [0]), "at least 2 prompts"),
        (lambda m, d: analyze(m, ["one", "two"], [0]), "a seed each"),
        (lambda m, d: Rules(semantic=1.5), "semantic 1.5 must lie between"),
        (lambda m, d: Rules(ranks=0), "ranks 0 must be above 0"),
        (lambda m, d: load_proposal(d / "absent.yaml"), "cannot be read"),
        (lambda m, d: load_proposal(__file__), "not plain YAML|not an analysis"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, call, message):
    with pytest.raises(UsageError, match=message) as error:
        call(model, tmp_path)
    assert "\n" not in str(error.value)


def test_unwritable_folder_is_one_line(analysis, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        analysis.save(tmp_path / "file" / "folder")
