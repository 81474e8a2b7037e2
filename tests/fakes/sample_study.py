"""Made-up but well-formed study results, for the tests of export and report: every verdict, no model, no search.

`python -m tests.fakes.sample_study DIR` writes one run directory per kind, with its report, to look at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from stagevar.schedule import StageSchedule, exact, paper, released, skip_only
from stagevar.schedule.grids import INFINITY_GRIDS, square
from tuner.config.quality import MetricLimit
from tuner.results.candidate import (
    Candidate,
    Failed,
    Failure,
    Finalist,
    Interval,
    LatencyStats,
    Measured,
    Sample,
    Verdict,
    Verification,
)
from tuner.results.result import EXIT_CODES, StudyResult

NANO_GRIDS = square((1, 2, 3, 4, 6, 8))
MAX_DROP = 0.02
LIMITS = (
    MetricLimit("checker", 0.7, MAX_DROP, "bounded", "share of prompts", 1.0),
    MetricLimit("ssim", 0.3, None, "continuous", "SSIM", 1.0),
)
KINDS = ("full", "one_trial", "infeasible", "latency_only", "all_failed", "baseline_meets_budget", "infinity")


def _steps(schedule: StageSchedule, grids, chunks: int) -> tuple[dict, ...]:
    from stagevar.profile import steps_to_data

    return tuple(steps_to_data(schedule.expand(grids, chunks)))


class _Maker:
    def __init__(self, grids, chunks: int, full_ms: float, prompts: int, rng: np.random.Generator, share: float):
        self.grids, self.chunks, self.full_ms, self.prompts, self.rng = grids, chunks, full_ms, prompts, rng
        self.budget_ms = share * full_ms
        self.tokens = 2 * sum(h * w for h, w in grids)
        self.base = rng.uniform(0.55, 0.95, prompts)

    def latency(self, processed: float, scale_ms, n: int = 9, baseline: bool = False) -> LatencyStats:
        ms = self.full_ms * (0.25 + 0.75 * processed / self.tokens)
        samples = tuple(float(v) for v in ms * self.rng.normal(1, 0.01, n))
        median = float(np.median(samples))
        ratio = (
            None if baseline else Interval(ms / self.full_ms, ms / self.full_ms * 0.985, ms / self.full_ms * 1.017, n)
        )
        shown = ms if baseline else median
        return LatencyStats(
            samples,
            median,
            float(np.quantile(samples, 0.9)),
            median * 0.99,
            median * 1.01,
            shown,
            ratio,
            3,
            True,
            scale_ms,
        )

    def candidate(
        self,
        schedule: StageSchedule,
        source: str,
        trial: int | None,
        params: dict,
        verified=None,
        quality: bool = True,
        broken: bool = False,
    ) -> Measured:
        expanded = schedule.expand(self.grids, self.chunks)
        processed = sum(step.processed_tokens(self.chunks) for step in expanded)
        baseline = trial is None
        key = hashlib.blake2b(repr(expanded).encode(), digest_size=5).hexdigest()
        scale_ms = tuple(
            0.0 if s.skipped else self.full_ms * (0.02 + 0.75 * s.processed_tokens(self.chunks) / self.tokens)
            for s in expanded
        )
        latency = self.latency(processed, scale_ms, baseline=baseline)
        drop = 0.028 * (1 - processed / self.tokens) ** 2 + 0.03 * sum(s.skipped for s in expanded)
        drop = 0.0 if baseline else drop + (0 if verified == "verified" else self.rng.normal(0, 0.003))
        values, differences, verdicts = {}, {}, []
        if quality:
            own = self.base - drop + (0 if baseline else self.rng.normal(0, 0.03, self.prompts))
            values = {"quality": tuple(own), "checker": tuple(own * 0.9), "ssim": tuple(1 - (self.base - own) ** 2)}
            if not baseline:
                differences = {
                    "quality": _interval(own - self.base),
                    "checker": _interval(0.9 * (own - self.base)),
                    "ssim": _interval(-((self.base - own) ** 2)),
                }
                verdicts.append(_verdict("drop:checker", MAX_DROP, "share of prompts", drop, drop + 0.006))
        verdicts.insert(0, _verdict("latency", self.budget_ms, "ms", latency.drift_corrected_ms, latency.high_ms))
        verification = None
        if verified:
            held = {k: tuple(v[: self.prompts // 2]) for k, v in values.items()}
            verification = Verification(
                self.prompts // 2,
                held,
                {k: dataclasses.replace(v, n=self.prompts // 2) for k, v in differences.items()},
                None if baseline or not quality else drop + 0.006,
                self.latency(processed, scale_ms, 25, baseline),
                latency.drift_corrected_ms * 1.012,
                tuple(verdicts),
                verified,
            )
        measured = Measured(
            key,
            params,
            schedule.to_dict(),
            _steps(schedule, self.grids, self.chunks),
            "stagevar",
            source,
            trial,
            sum(s.skipped for s in expanded),
            processed,
            latency,
            values,
            differences,
            tuple(verdicts),
            all(v.status == "met" for v in verdicts),
        )
        return measured if verification is None else measured.becomes(Finalist, verification=verification)


def _interval(values: np.ndarray) -> Interval:
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return Interval(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half, len(values))


def _verdict(name: str, limit: float, unit: str, value: float, bound: float) -> Verdict:
    return Verdict(name, limit, unit, value, bound, "met" if bound <= limit else "broken" if value > limit else "open")


def _draw(path: Path, prompt: str, wobble: float, size: int) -> None:
    """A colored disc on a gradient, a bit displaced, so that difference images show something."""
    y, x = np.mgrid[0:size, 0:size] / size
    seed = int(hashlib.blake2b(prompt.encode(), digest_size=4).hexdigest(), 16)
    color = np.random.default_rng(seed).uniform(60, 255, 3)
    inside = ((x - 0.5 - wobble) ** 2 + (y - 0.5) ** 2 < 0.09)[..., None]
    image = np.where(inside, color, 40 + 90 * (x + y)[..., None])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path)


def make(kind: str, run_dir: Path) -> StudyResult:
    """A study of that kind whose images lie in `run_dir`, saved there as study.json."""
    rng = np.random.default_rng(7)
    infinity = kind == "infinity"
    grids = INFINITY_GRIDS[1.0] if infinity else NANO_GRIDS
    share = {"baseline_meets_budget": 1.2, "infeasible": 0.3}.get(kind, 0.6)
    full_ms, prompts = (892.0, 64) if infinity else (142.0, 32)
    maker = _Maker(grids, 8 if infinity else 3, full_ms, prompts, rng, share)
    scales, quality = len(grids), kind != "latency_only"
    baseline = maker.candidate(exact(scales), "enqueued: full", None, {}, "baseline", quality)
    verdict = {
        "full": "verified",
        "one_trial": "inconclusive",
        "infeasible": "infeasible",
        "infinity": "verified",
        "all_failed": "failed",
    }.get(kind, kind)
    candidates: list[Candidate] = []
    sampled = {"one_trial": 0, "all_failed": 0}.get(kind, 26)
    if kind != "all_failed":
        presets = [("paper", paper(grids)), ("released", released(grids)), ("skip_only", skip_only(grids))]
        for name, schedule in presets[: 1 if kind == "one_trial" else 3]:
            candidates.append(maker.candidate(schedule, f"enqueued: {name}", len(candidates), {}, None, quality))
    while len(candidates) < sampled + 3 and sampled:
        params = {
            "structure_end": int(rng.integers(scales // 2, scales)),
            "guidance_off": bool(rng.random() < 0.7),
            "rank_ratio": round(float(rng.uniform(0.05, 0.9)), 3),
            "projection": str(rng.choice(["gaussian", "rows"])),
        }
        schedule = StageSchedule(
            params["structure_end"],
            cfg_delay=0 if params["guidance_off"] else None,
            branch="cond",
            rank_ratios=(params["rank_ratio"],),
            projection=params["projection"],
        )
        candidate = maker.candidate(schedule, "sampler", len(candidates), params, None, quality)
        if candidate.key not in {c.key for c in candidates}:
            candidates.append(candidate)
    failures = [
        Failure(
            len(candidates) + i,
            {"structure_end": 2, "note": "<script>alert(1)</script>"},
            "RuntimeError: out of memory <b>& more</b>",
        )
        for i in range({"all_failed": 5, "full": 2}.get(kind, 0))
    ]
    for failure in failures:
        candidates.append(
            baseline.becomes(
                Failed,
                key=f"fail{failure.trial}",
                params=failure.params,
                source="sampler",
                trial=failure.trial,
                latency=None,
                error=failure.error,
            )
        )
    picks: dict[str, str] = {}
    front: list[str] = [baseline.key]
    smallest, nearest = None, ()
    complete = sorted((c for c in candidates if isinstance(c, Measured)), key=lambda c: c.latency.drift_corrected_ms)
    if kind == "infeasible":
        smallest, nearest = 62.4, (complete[3].key, complete[5].key)
        front = [complete[5].key, baseline.key]
    elif kind == "baseline_meets_budget":
        picks = {"pick": baseline.key}
    elif complete:
        usable = [c for c in complete if c.feasible] or complete[len(complete) // 3 :]
        drop = (lambda c: -c.differences["quality"].mean) if quality else (lambda c: 0.0)
        best = float("inf")
        front = []
        for c in complete:
            if drop(c) < best:
                front.append(c.key)
                best = drop(c)
        front.append(baseline.key)
        chosen = usable[len(usable) // 2]
        picks = {"pick": chosen.key, "fastest": usable[0].key, "balanced": chosen.key, "best_quality": usable[-1].key}
        status = "open" if kind == "one_trial" else "verified"
        candidates = [
            maker.candidate(StageSchedule.from_dict(c.schedule), c.source, c.trial, c.params, status, quality)
            if c.key in picks.values()
            else c
            for c in candidates
        ]
    texts = [
        f"a photo of {n} {c} {s} & more"
        for n in ("one", "two")
        for c in ("red", "blue", "green", "striped")
        for s in ("circle", "square", "star", "cat <i>x</i>")
    ]
    shown = [baseline.key, *dict.fromkeys([*picks.values(), *nearest])] if quality else []
    samples = []
    for key in shown if kind != "all_failed" else []:
        for i, prompt in enumerate(texts[:6]):
            path = f"images/{key}/{i}.png"
            _draw(run_dir / path, prompt, 0.0 if key == baseline.key else 0.01 * (i + 1), 512 if infinity else 48)
            samples.append(Sample(prompt, i, key, path))
    result = StudyResult(
        command=f"stagevar-tune --model nano --budget {share:.0%} --out outputs/example",
        created="2026-11-23T01:00:00Z",
        model="infinity-2b" if infinity else "nano",
        random_weights=kind == "latency_only",
        provenance={"preset": "cpu", "source": "shipped", "model_hash": "1f" * 16},
        versions={"stagevar": "0.1.0", "torch": "2.15.0", "optuna": "5.0.0", "commit": "abc1234"},
        hashes={"model": "a1" * 16, "search_prompts": "b2" * 16, "heldout_prompts": "c3" * 16, "space": "d4" * 16},
        device={"name": "Some CPU @ 2.40GHz", "kind": "cpu", "threads": 1, "dtype": "float32"},
        engine="eager",
        includes="text encoding, all scales, decoding",
        grids=grids,
        chunks=maker.chunks,
        pixels=(48, 48),
        budget=f"{share:.0%}",
        budget_ms=full_ms * share,
        limits=LIMITS if quality else (),
        higher_is_better={"checker": True, "ssim": True} if quality else {},
        floors={},
        seed=0,
        micro_batch=16,
        search_prompts=tuple(texts[:prompts]),
        search_seeds=tuple(range(len(texts[:prompts]))),
        heldout_prompts=tuple(texts[:16]),
        heldout_seeds=tuple(range(16)),
        baseline=baseline,
        candidates=tuple(candidates),
        front=tuple(front),
        picks=picks,
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        reason={"infeasible": "no schedule keeps 42.6 ms within a drop of 0.02"}.get(kind, f"study is {verdict}"),
        stop_reason=f"{len(candidates)} trials were told",
        trials=len(candidates),
        sampled=sampled,
        phases_s={"load": 2.1, "baseline": 8.4, "search": 141.0, "verification": 52.7, "report": 1.8},
        failures=tuple(failures),
        samples=tuple(samples),
        smallest_budget_ms=smallest,
        nearest=nearest,
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    result.save(run_dir)
    return result


if __name__ == "__main__":
    from tuner.report.page import write_report

    for name in KINDS:
        print(write_report(make(name, Path(sys.argv[1]) / name), Path(sys.argv[1]) / name))
