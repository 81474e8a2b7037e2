"""One study: the full schedule first, then the search, then verification and verdict.

No torch and no optuna here: schedules are judged by an `Evaluator`, proposed by a `Proposer`, and everything found is
on disk (trials.jsonl, fsync) before the sampler is told, so a study continues after kill -9 at any moment.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from stagevar.errors import InfrastructureError, OutOfDeviceMemory, UsageError
from stagevar.files import write_text_atomically
from tuner.config.costs import FINALISTS_PER_KIND, images_at_most
from tuner.config.limits import Budget
from tuner.config.prompts import PromptSet, set_sizes
from tuner.config.quality import MetricLimit, limited, quality_limits
from tuner.config.space import SearchSpace
from tuner.evaluation.evaluator import Evaluator
from tuner.evaluation.executor import Executor, Failed, NotMeasured, QualityTask
from tuner.evaluation.local import LocalExecutor, first_line
from tuner.metrics.declarations import DECLARATIONS
from tuner.proposals.trial_sampler import Proposal
from tuner.results import pareto
from tuner.results.result import (
    EXIT_CODES,
    OF_TIME,
    Candidate,
    Failure,
    Sample,
    StudyResult,
    Verdict,
    Verification,
    build,
)
from tuner.results.run_dir import CONFIG_FILE
from tuner.statistics.bounds import ALPHA, indistinguishable
from tuner.statistics.looks import claims, judgement_alpha
from tuner.statistics.provable import MOST_PROMPTS, prompts_to_decide
from tuner.study.ledger import Ledger
from tuner.study.progress import Progress
from tuner.study.search import Savings, Search
from tuner.study.verification import BASELINE, LEAST_GAIN, Verifier, latency_stats

BASELINE_ROUNDS = 15


@dataclass(frozen=True)
class Options:
    """What a user asks of a study.

    max_drop: largest drop per metric; a number is the primary metric's, and what is not said comes from the space.
    trials: distinct schedules to evaluate, the full one not counted. time_budget_s: tuning time, verification included.
    sampler, storage: see Proposer. command: what reproduces the study. versions: for the record. samples: prompts whose images
    are kept for the report. patience: schedules without a larger feasible hypervolume after which the search ends; None
    never. savings: how the search costs less than measuring everything.
    """

    budget: Budget
    max_drop: float | Mapping[str, float] | None = None
    trials: int = 30
    time_budget_s: float | None = None
    seed: int = 0
    sampler: str = "auto"
    storage: str | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    samples: int = 6
    patience: int | None = None
    savings: Savings = field(default_factory=Savings)


class Study:
    """Drives one run directory from wherever it stands to its verdict.

    Args:
        run_dir: exists and is locked by the caller (`journal.driver_lock`), its files repaired.
        prompts: "search" and "heldout". stop: asked between rounds whether to end now.
    """

    def __init__(
        self,
        run_dir: Path,
        space: SearchSpace,
        options: Options,
        evaluator: Evaluator,
        prompts: Mapping[str, PromptSet],
        executor: Executor | None = None,
        progress: Progress | None = None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.run_dir, self.options, self.evaluator, self.prompts = run_dir, options, evaluator, prompts
        self.executor = executor or LocalExecutor(evaluator)
        self.progress = progress or Progress(quiet=True)
        self.stop = stop
        self.facts = evaluator.facts
        self.quality = not self.facts.random_weights
        self.space = space.runnable(self.facts.refused)
        if self.space is not space:
            for name, why in self.facts.refused.items():
                self.progress.say(f"precision {name} is not searched: it cannot run here ({why})")
        space = self.space
        space.fit(self.facts.grids)
        self.metrics = quality_limits(space.quality, options.max_drop)
        self.ledger = Ledger(run_dir, space, self.facts, options.budget, self.metrics)
        self.judged_on: list[int] = []
        self.told = 0
        self.stop_reason = ""
        self.search_facts: dict[str, Any] = {}
        self._began = time.monotonic()

    # ------------------------------------------------------------------------------------------------ identity

    def identity(self) -> dict[str, Any]:
        """What must not change between the parts of one study; what a resume compares."""
        facts = self.facts
        return {
            "model": facts.model,
            "weights": facts.provenance.get("weights", "random" if facts.random_weights else None),
            "pixels": facts.pixels,
            "device": facts.device,
            "engine": facts.engine,
            # Not in runs whose engine was eager, which is all that runs of before drew with.
            **({} if facts.heldout_engine == "eager" else {"held-out engine": facts.heldout_engine}),
            "sampling": facts.sampling,
            "space": {k: v for k, v in dataclasses.asdict(self.space).items() if k != "proposals" or v},
            "search prompts": self.prompts["search"].digest,
            "held-out prompts": self.prompts["heldout"].digest,
            "budget": self.options.budget.text,
            "max_drop": {m.metric: m.max_drop for m in self.metrics},
            "seed": self.options.seed,
            "storage": self.options.storage,
            "savings": {name: getattr(self.options.savings, name) for name in ("table", "rungs")},
        }

    def check_identity(self) -> bool:
        """Writes the identity of a new run; compares that of an old one. Returns whether the run is an old one.

        An old run may go on with more held-out prompts, if those it had are the first of them; that becomes its identity.
        Raises UsageError that says what differs.
        """
        path = self.run_dir / CONFIG_FILE
        mine = json.loads(json.dumps(self.identity()))
        if not path.exists():
            # Kept beside the identity, so that a resumed run keeps its engine instead of comparing engines again.
            choice = self.facts.engine_choice
            kept = {} if choice is None else {"engine_choice": dataclasses.asdict(choice)}
            self._write_config({"identity": mine, "command": self.options.command, "judged_on": [], **kept})
            return False
        try:
            config = json.loads(path.read_text())
            theirs = config["identity"]
            had = int(theirs["space"]["prompts"]["heldout"])
            if "judged_on" not in config:  # a run of before, which kept no account: its judgement counts all the same
                judged = any(record["kind"] == "verification" for record in self.ledger.evidence.read())
                config["judged_on"] = [had] if judged else []
            self.judged_on = [int(count) for count in config["judged_on"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} is damaged; start anew with another --out, or with --fresh") from None
        new = json.loads(json.dumps(mine))
        for identity in (theirs, mine):
            # Where the prompts lie and how they were asked for does not matter: their contents are compared.
            for name in ("source", "added"):
                identity.get("space", {}).get("prompts", {}).pop(name, None)
        differing = difference(theirs, mine)
        if not differing:
            return True
        heldout = self.prompts["heldout"]
        if len(heldout) > had and heldout.first(had).digest == theirs.get("held-out prompts"):
            theirs["held-out prompts"] = mine["held-out prompts"]
            theirs["space"]["prompts"]["heldout"] = mine["space"]["prompts"]["heldout"]
            differing = difference(theirs, mine)
            if not differing:
                self._write_config({**config, "identity": new, "command": self.options.command})
                return True
        asked = self.space.prompts
        if asked.source == "geneval" and asked.heldout > had and not asked.added:
            raise UsageError(
                f"{self.run_dir} has {had} held-out prompts, whose order depends on their number; "
                f"write --heldout {had}+{asked.heldout - had} to add to them"
            )
        raise UsageError(
            f"{self.run_dir} holds another study: {'; '.join(differing[:3])}; choose another --out, or --fresh"
        )

    def _write_config(self, config: Mapping[str, Any]) -> None:
        write_text_atomically(self.run_dir / CONFIG_FILE, json.dumps(config, indent=1) + "\n")

    def _note_judged(self) -> None:
        """Writes on how many prompts the run was judged, each time; the verdict is told after that only."""
        config = json.loads((self.run_dir / CONFIG_FILE).read_text())
        if self.judged_on != config.get("judged_on", []):
            self._write_config({**config, "judged_on": self.judged_on})

    # ------------------------------------------------------------------------------------------------ running

    def run(self) -> StudyResult:
        """Baseline, search, verification, verdict; returns the result, which is also in study.json."""
        self.check_identity()
        records = self.ledger.evidence.read()
        # Made first, so that its proposing process is up when the full schedule has been measured.
        search = self._new_search()
        try:
            self._run_baseline(records)
            if self.ledger.baseline.state == "complete":
                self.progress.phase("search", self.options.trials)
                search.run(records)
                self.told, self.stop_reason, self.search_facts = search.told, search.stop_reason, search.facts()
        finally:
            search.close()
        result = self._conclude(records)
        self._note_judged()
        result.save(self.run_dir)
        return result

    def _run_baseline(self, records: Sequence[Mapping[str, Any]]) -> None:
        ledger, search = self.ledger, self.prompts["search"]
        self.progress.phase("baseline", search.batches)
        kept = next((r for r in records if r["kind"] == "baseline"), None)
        if kept is not None:
            ledger.baseline = build(Candidate, kept["candidate"])
            return
        blank = dataclasses.replace(
            ledger.blank(ledger.full_key, Proposal(-1, {})), source="enqueued: full schedule", trial=None
        )
        try:
            self.progress.update(0, "timing the full schedule")
            timing = self.evaluator.latency({BASELINE: ledger.full}, BASELINE_ROUNDS)[BASELINE]
            latency = latency_stats(
                timing.samples_ms, None, None, timing.warm_up_runs, timing.warmed, timing.disturbed, timing.card
            )
            for why in timing.disturbed:
                self.progress.say(f"timings may be wrong, also when taken again: {why}")
            ledger.baseline = dataclasses.replace(blank, latency=latency)
            if self.quality:
                self.progress.say(self._expected(latency.median_ms))
        except InfrastructureError:
            raise
        except Exception as error:
            ledger.baseline = dataclasses.replace(blank, state="failed", error=first_line(error))
            return
        if self.quality:
            values, error = self._full_values()
            if error is not None:
                ledger.baseline = dataclasses.replace(ledger.baseline, state="failed", error=error)
                return
            ledger.baseline = dataclasses.replace(ledger.baseline, values=values)
        ledger.record("baseline", ledger.baseline)

    def _expected(self, full_ms: float) -> str:
        """What drawing takes at most, from the first timing; batches and shared scales make it less."""
        sizes = (len(self.prompts[split]) for split in ("search", "heldout"))
        images = images_at_most(self.options.trials, *sizes)
        hours = images * full_ms / 3.6e6
        return f"at most {images:,} images of {full_ms:,.0f} ms: {hours:.1f} hours of drawing, metrics not counted"

    def _full_values(self) -> tuple[dict[str, tuple[float, ...]], str | None]:
        """The full schedule's value per metric over the whole search set, in prompt order; or its first error."""
        tasks = [QualityTask((self.ledger.full,), "search", b) for b in range(self.prompts["search"].batches)]
        found: dict[int, Any] = {}
        for task, (outcome,) in self.executor.run(tasks):
            if isinstance(outcome, NotMeasured):
                raise OutOfDeviceMemory(outcome.error)
            if isinstance(outcome, Failed):
                return {}, outcome.error
            found[task.batch] = outcome
            self.progress.update(len(found), "full schedule")
        parts = [found[b] for b in sorted(found)]
        return {m: tuple(float(v) for part in parts for v in part[m]) for m in parts[0]}, None

    def _new_search(self) -> Search:
        options = self.options
        return Search(
            self.run_dir,
            self.ledger,
            self.evaluator,
            self.executor,
            self.prompts["search"],
            self.progress,
            trials=options.trials,
            seed=options.seed,
            sampler=options.sampler,
            storage=options.storage,
            patience=options.patience,
            savings=options.savings,
            out_of_time=self._out_of_time,
            stop=self.stop,
        )

    def _out_of_time(self) -> str:
        """Why the tuning time is over, or nothing.

        Verification costs about as much per prompt and finalist as the search did per prompt and schedule.
        """
        limit_s, count = self.options.time_budget_s, len(self.ledger.candidates)
        if limit_s is None or not count:
            return ""
        spent = time.monotonic() - self._began
        rate = spent / (count + 1) / len(self.prompts["search"])
        reserve = rate * 2 * FINALISTS_PER_KIND * len(self.prompts["heldout"])
        if spent + min(reserve, 0.6 * limit_s) <= limit_s:
            return ""
        return f"the tuning time of {limit_s:g} s is over, verification included"

    # ------------------------------------------------------------------------------------------------ verdict

    def _finalists(self) -> list[Candidate]:
        """Whom to verify: the best within the limits by point estimate, with and without skipped scales; where there
        are none, those nearest to the limits whose intervals still reach them."""
        ledger = self.ledger
        pool = [c for c in ledger.candidates.values() if c.feasible and c.latency.ratio.mean <= LEAST_GAIN]

        def surest(c: Candidate) -> Any:
            # Those that meet the budget by their whole interval first: a borderline one would only be undecided.
            return (c.verdicts[0].bound <= c.verdicts[0].limit, ledger.preference(c))

        key = surest
        if not pool:
            pool = [c for c in ledger.candidates.values() if ledger.reaches(c)]
            key = lambda c: -ledger.excess(c)  # noqa: E731
        chosen: list[Candidate] = []
        for skips in (False, True):
            kind = sorted((c for c in pool if (c.skipped_scales > 0) == skips), key=key, reverse=True)
            chosen += kind[:FINALISTS_PER_KIND]
        return chosen

    def _conclude(self, records: Sequence[Mapping[str, Any]]) -> StudyResult:
        ledger = self.ledger
        if ledger.baseline.state == "failed":
            return self._result("failed", f"the full schedule failed: {ledger.baseline.error}", {})
        if not ledger.candidates and ledger.unmeasured and not ledger.failed:
            raise OutOfDeviceMemory(
                f"none of {len(ledger.unmeasured)} schedules was measured: {ledger.failures[0].error}"
            )
        if not ledger.candidates and ledger.failures:
            first = ledger.failures[0].error
            return self._result("failed", f"all {len(ledger.failures)} trials failed, the first with {first}", {})
        earlier = self._earlier(records)
        # A claim that was made stands, whatever is judged after it.
        claimed = {key for key, check in earlier.items() if check.status == "verified" and key in ledger.candidates}
        finalists = [c for c in self._finalists() if c.key not in claimed]
        if self.stop():
            return self._result("partial", f"{self.stop_reason} before verification; the same command resumes", {})
        for key in claimed:
            ledger.candidates[key] = dataclasses.replace(ledger.candidates[key], verification=earlier[key])
        chosen = [*(ledger.candidates[key] for key in claimed), *finalists]
        if claimed and not finalists:
            ledger.baseline = dataclasses.replace(ledger.baseline, verification=earlier[BASELINE])
            return self._verdict(chosen)
        self.progress.phase("verification", 100)
        heldout = self.prompts["heldout"] if self.quality else None
        verifier = Verifier(
            self.evaluator,
            self.executor,
            {c.key: ledger.steps[c.key] for c in finalists},
            ledger.full,
            heldout,
            ledger.limits,
            lambda line, share: self.progress.update(100 * share, line),
            self.stop,
            earlier,
            extensions=len(self.judged_on),
        )
        verifications = verifier.run()
        own = verifications[BASELINE]
        if BASELINE in earlier and earlier[BASELINE].prompts > own.prompts:
            own = dataclasses.replace(own, prompts=earlier[BASELINE].prompts, values=earlier[BASELINE].values)
        ledger.baseline = dataclasses.replace(ledger.baseline, verification=own)
        if finalists:
            ledger.record("verification", ledger.baseline)
        for key, verification in verifications.items():
            if key != BASELINE:
                ledger.candidates[key] = dataclasses.replace(ledger.candidates[key], verification=verification)
                ledger.record("verification", ledger.candidates[key])
        for key, error in {**verifier.errors, **verifier.unmeasured}.items():
            ledger.failures.append(Failure(ledger.candidates[key].trial, ledger.candidates[key].params, error))
        if finalists and len(verifier.unmeasured) == len(finalists) and not claimed:
            raise OutOfDeviceMemory(next(iter(verifier.unmeasured.values())))
        chosen = [ledger.candidates[c.key] for c in chosen if c.key not in verifier.unmeasured]
        if verifier.cut_short and not any(c.verification.status == "verified" for c in chosen):
            return self._result("partial", "stopped during verification; the same command resumes", {})
        return self._verdict(chosen, judged=len(verifier.unmeasured) < len(finalists))

    def _earlier(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Verification]:
        """What earlier parts of this study found on held-out prompts, by key: what was verified, else what saw most."""
        found: dict[str, Verification] = {}
        for record in records:
            if record["kind"] != "verification":
                continue
            candidate = build(Candidate, record["candidate"])
            key = BASELINE if candidate.key == self.ledger.full_key else candidate.key
            check, before = candidate.verification, found.get(key)
            if before is None or (before.status != "verified" and check.prompts >= before.prompts):
                found[key] = check
        return found if BASELINE in found else {}  # runs of before have no values of the full schedule to pair with

    def _verdict(self, finalists: Sequence[Candidate], judged: bool = False) -> StudyResult:
        """The verdict on verified or waiting finalists. judged: whether it is a new judgement."""
        ledger, extensions = self.ledger, len(self.judged_on)
        if judged:
            self.judged_on.append(len(self.prompts["heldout"]) if self.quality else 0)
        budget, limits = self.options.budget, ledger.limits
        verified = [c for c in finalists if c.verification.status == "verified"]
        waiting = [c for c in finalists if c.verification.status == "open"]
        picks: dict[str, str] = {}
        if verified:
            picks = self._picks(verified)
        baseline_fits = ledger.baseline.verification.verdicts[0].status == "met"
        if baseline_fits:
            picks["pick"] = ledger.full_key
            full_ms = ledger.baseline.verification.latency.median_ms
            reason = f"the full schedule already meets the budget of {budget}: {full_ms:.1f} ms; it is the pick"
            return self._result("baseline_meets_budget", reason, picks)
        if verified and not self.quality:
            pick = ledger.candidates[picks["pick"]]
            reason = (
                f"random weights: {speedup(pick)} within the budget, no quality was measured; "
                "the least accelerated schedule under the budget"
            )
            return self._result("latency_only", reason, picks)
        if verified:
            pick = ledger.candidates[picks["pick"]]
            proved = ", ".join(
                f"{m.metric} {metric_change(pick, m.metric)}, drop at most {m.amount(v.bound)} (allowed {m.amount(v.limit)})"
                for m in limited(limits.metrics)
                for v in pick.verification.verdicts
                if v.name == m.name
            )
            reason = f"{speedup(pick)} within {budget} on {pick.verification.prompts} held-out prompts: {proved}"
            return self._result("verified", reason, picks)
        if waiting:
            needed = {c.key: self._needed(c, extensions) for c in waiting}

            def easiest(c: Candidate) -> Any:
                # First those that only prompts are missing for, then those that look as if they kept their limits.
                beyond = any(v.value > v.limit for v in c.verification.verdicts if v.name.startswith("drop:"))
                return c.verification.times_open, beyond, needed[c.key] or math.inf, c.key

            waiting = sorted(waiting, key=easiest)
            best = waiting[0]
            undecided = [v for v in best.verification.verdicts if v.status == "open"]
            texts = ", ".join(
                f"{v.name} {v.value:.4g} with bound {v.bound:.4g} around {v.limit:.4g}" for v in undecided
            )
            advice, settle = "measure again on a quieter machine or loosen --budget", None
            if not best.verification.times_open:
                advice, settle = self._advice(needed[best.key])
            reason = f"the data cannot tell: {texts}; {advice}"
            return self._result("inconclusive", reason, picks, nearest=[c.key for c in waiting], settle=settle)
        kept = [c for c in ledger.candidates.values() if ledger.keeps_quality(c)]
        fastest = min((c.best_latency for c in kept), key=lambda latency: latency.drift_corrected_ms, default=None)
        smallest = fastest.drift_corrected_ms if fastest else None
        nearest, full_ms = sorted(ledger.candidates.values(), key=ledger.excess)[:3], ledger.baseline.latency.median_ms
        if smallest is None:
            reason = f"no schedule of {len(ledger.candidates)} keeps the quality; raise --max-drop"
        elif not self.quality and smallest <= limits.budget_ms:
            reason = f"no schedule of {len(ledger.candidates)} is within {budget} by its upper bound; raise --budget"
        elif smallest <= limits.budget_ms:
            reason = (
                f"no schedule within {budget} kept the quality on the held-out prompts; raise --budget or --max-drop"
            )
            smallest = None
        else:
            reason = (
                f"no schedule of {len(ledger.candidates)} meets {budget} ({limits.budget_ms:.1f} ms); the smallest "
                f"reachable budget is {smallest:.1f} ms ({100 * smallest / full_ms:.0f}% of the full schedule"
                f"{', predicted from its steps' if fastest.predicted else ''})"
            )
        return self._result("infeasible", reason, picks, smallest=smallest, nearest=[c.key for c in nearest])

    def _needed(self, candidate: Candidate, extensions: int) -> int | None:
        """Held-out prompts on which the next judgement would decide all that is open of a finalist's quality."""
        check, heldout = candidate.verification, self.prompts["heldout"]
        seen = claims(len(heldout), heldout.micro_batch, extensions).get(check.prompts, ALPHA)
        alphas = seen, judgement_alpha(extensions + 1)
        counts = []
        for verdict in check.verdicts:
            if verdict.status == "open" and verdict.name not in OF_TIME and check.prompts:
                limit, drops_N, bound = self._open_drop(candidate, verdict)
                counts.append(prompts_to_decide(limit, drops_N, bound, alphas, heldout.micro_batch))
        return max(counts) if counts and None not in counts else None

    def _open_drop(self, candidate: Candidate, verdict: Verdict) -> tuple[MetricLimit, np.ndarray, float]:
        """The limit behind a verdict on quality, drops per prompt, and their bound; a floor is a drop from the top."""
        values, metric = candidate.verification.values, verdict.name.partition(":")[2]
        own = np.asarray(values[metric])
        if verdict.name.startswith("floor:"):
            declared = DECLARATIONS[metric]
            top = 0.0 if declared.kind == "continuous" else declared.change
            limit = MetricLimit(
                metric,
                1.0,
                top - verdict.limit,
                declared.kind,
                declared.unit,
                declared.change,
                declared.higher_is_better,
            )
            return limit, top - own, top - verdict.bound
        limit = next(m for m in limited(self.metrics) if m.metric == metric)
        full = np.asarray(self.ledger.baseline.verification.values[metric])[: own.size]
        return limit, (full - own) * limit.sign, verdict.bound

    def _advice(self, needed: int | None) -> tuple[str, str | None]:
        """What would decide an undecided quality, in words and as a value of --heldout."""
        source, had = self.space.prompts, len(self.prompts["heldout"])
        if needed is None:
            return (
                f"no number of held-out prompts up to {MOST_PROMPTS:,} would do if the estimates hold: loosen the limit",
                None,
            )
        _, there = set_sizes(dataclasses.replace(source, heldout=needed))
        if there < needed:
            return (
                f"about {needed} held-out prompts would do if the estimates hold, and {source.source:.200} leaves {there}: "
                "add prompts and start anew, or loosen the limit"
            ), None
        # Those of geneval are ordered by how many there are of each task (tuner.config.prompts).
        parts = had - sum(source.added), *source.added, needed - had
        text = "+".join(map(str, parts)) if source.source == "geneval" else str(needed)
        return f"raise --heldout (about {needed} prompts would do if the estimates hold) or loosen the limit", text

    def _picks(self, verified: Sequence[Candidate]) -> dict[str, str]:
        """Named picks among the verified.

        The pick is the least accelerated of those whose quality the data cannot tell from the best.
        """
        by_speed = sorted(verified, key=lambda c: c.verification.latency.ratio.mean)
        if not self.quality:
            pick = max(verified, key=lambda c: c.processed_tokens)
            return {"pick": pick.key, "fastest": by_speed[0].key}
        picks = {"pick": self._least_accelerated(verified).key, "fastest": by_speed[0].key}
        points = [(c.verification.latency.ratio.mean, c.verification.differences["quality"].mean) for c in verified]
        picks["balanced"] = verified[pareto.balanced(points)].key
        picks["best_quality"] = max(verified, key=lambda c: c.verification.differences["quality"].mean).key
        whole = [c for c in verified if not c.skipped_scales]
        if whole:
            picks["no_skip"] = min(whole, key=lambda c: c.verification.latency.ratio.mean).key
        return picks

    @staticmethod
    def _least_accelerated(verified: Sequence[Candidate]) -> Candidate:
        best = max(verified, key=lambda c: c.verification.differences["quality"].mean)

        def equal(candidate: Candidate) -> bool:
            own, other = candidate.verification.values["quality"], best.verification.values["quality"]
            count = min(len(own), len(other))
            return indistinguishable(own[:count], other[:count])

        return max((c for c in verified if c is best or equal(c)), key=lambda c: (c.processed_tokens, c.key))

    def _samples(self, picks: Mapping[str, str]) -> list[Sample]:
        """Images of the full schedule and the picks on the first search prompts, as PNG files."""
        if not self.quality or self.stop():
            return []
        self.progress.phase("images")
        from PIL import Image

        search = self.prompts["search"]
        count = min(self.options.samples, len(search.batch(0)[0]))
        texts, samples = search.texts, []
        for key in dict.fromkeys([self.ledger.full_key, *picks.values()]):
            images = self.evaluator.images(self.ledger.steps[key], "search", 0)[:count]
            folder = self.run_dir / "images" / key
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{i}.png")
                samples.append(Sample(texts[i], search.seeds[i], key, f"images/{key}/{i}.png"))
        return samples

    def _time_scales(self, keys: Sequence[str]) -> None:
        """Adds the share of each scale to the newest measurement of the full schedule and these, for the report.

        They explain the figures and decide nothing, so an evaluator need not offer them and a failure is only said.
        """
        ledger = self.ledger
        time_scales = getattr(self.evaluator, "scale_ms", None)
        if time_scales is None or not keys or self.stop():
            return
        try:
            times = time_scales({key: ledger.steps[key] for key in dict.fromkeys([ledger.full_key, *keys])})
        except InfrastructureError:
            raise
        except Exception as error:
            self.progress.say(f"scales were not timed: {first_line(error)}")
            return
        for key, scale_ms in times.items():
            candidate = ledger.baseline if key == ledger.full_key else ledger.candidates[key]
            check, latency = candidate.verification, candidate.latency
            if check is not None:
                check = dataclasses.replace(check, latency=dataclasses.replace(check.latency, scale_ms=scale_ms))
            elif latency is not None:
                latency = dataclasses.replace(latency, scale_ms=scale_ms)
            candidate = dataclasses.replace(candidate, verification=check, latency=latency)
            if key == ledger.full_key:
                ledger.baseline = candidate
            else:
                ledger.candidates[key] = candidate

    def _result(
        self,
        verdict: str,
        reason: str,
        picks: dict[str, str],
        smallest: float | None = None,
        nearest: Sequence[str] = (),
        settle: str | None = None,
    ) -> StudyResult:
        ledger = self.ledger
        shown = {**picks, **{f"nearest {i}": key for i, key in enumerate(nearest[:1])}}
        samples = []
        if ledger.baseline.state == "complete":
            samples = self._samples(shown)
            self._time_scales(list(shown.values())[:1])
        self.progress.end_phase()
        facts, space, options = self.facts, self.space, self.options
        search, heldout = self.prompts["search"], self.prompts["heldout"]
        everyone = [*ledger.candidates.values(), *ledger.failed.values(), *ledger.unmeasured.values()]
        return StudyResult(
            command=options.command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=facts.model,
            random_weights=facts.random_weights,
            provenance={**facts.provenance, "sampling": facts.sampling},
            versions={**options.versions, **({"torch": facts.device["torch"]} if "torch" in facts.device else {})},
            hashes={
                "space": space.digest,
                "search_prompts": search.digest,
                "heldout_prompts": heldout.digest,
                **({"model": str(facts.provenance["hash"])} if "hash" in facts.provenance else {}),
            },
            device=facts.device,
            engine=facts.engine,
            engine_choice=facts.engine_choice,
            heldout_engine=facts.heldout_engine,
            includes=facts.includes,
            grids=facts.grids,
            chunks=facts.chunks,
            pixels=facts.pixels,
            budget=options.budget.text,
            budget_ms=ledger.limits.budget_ms if ledger.baseline.latency else math.nan,
            limits=self.metrics if self.quality else (),
            higher_is_better=facts.higher_is_better,
            floors=dict(space.floors),
            seed=options.seed,
            micro_batch=search.micro_batch,
            search_prompts=search.texts,
            search_seeds=search.seeds,
            heldout_prompts=heldout.texts,
            heldout_seeds=heldout.seeds,
            baseline=ledger.baseline,
            candidates=tuple(sorted(everyone, key=lambda c: c.trial)),
            front=tuple(ledger.front()),
            picks=picks,
            verdict=verdict,
            exit_code=EXIT_CODES[verdict],
            reason=reason,
            stop_reason=self.stop_reason,
            trials=self.told,
            sampled=sum(c.source == "sampler" for c in ledger.candidates.values()),
            phases_s=dict(self.progress.seconds),
            search=self.search_facts,
            failures=tuple(ledger.failures),
            samples=tuple(samples),
            smallest_budget_ms=smallest,
            nearest=tuple(nearest),
            judged_on=tuple(self.judged_on),
            settle_heldout=settle,
        )


def speedup(candidate: Candidate) -> str:
    """ "1.72x [1.70, 1.74]" from the best measurement of a candidate."""
    ratio = candidate.best_latency.ratio
    return f"{1 / ratio.mean:.2f}x [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]"


def metric_change(candidate: Candidate, metric: str) -> str:
    """ "-0.0040 [-0.0120, +0.0040]" of a metric from the best measurement of a candidate."""
    change = candidate.best_differences[metric]
    return f"{change.mean:+.3g} [{change.low:+.3g}, {change.high:+.3g}]"


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two trees of plain data, one phrase per leaf, shortened for reading."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in difference(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in difference(a, b, f"{path}[{i}]")]
    return [f"{path} was {_short(old)} and is {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
