"""Verification: finalists against the full schedule on held-out prompts and in one round-robin of timings.

Verified means that every bound is on the right side: the upper bound of latency within the budget, the upper bound of the
latency ratio at most 0.98 (a gain under 2 % is no acceleration), for every metric the one-sided 95 % upper bound of the
paired drop within the allowed one, every floor kept. All must hold, so the metrics share no error; the bounds hold for all
finalists together, so choosing among them afterwards is fair.
Prompts and rounds are added in steps until each finalist is decided, the pick is settled or the limit is reached. Giving up
early on a bad one costs nothing; claims are made only at a few looks, which share the 5 % with all judgments of the study.
The pick is settled once one is verified that no undecided finalist would replace: more images would cost as much again and
change nothing that is exported under that name. Finalists whose time stayed open cannot be verified by any number of prompts;
their images are drawn only if nothing else is verified, to distinguish undecided from infeasible.

In a quick study finalists are judged one after another, the most promising first, and the first verified one is picked. They
share the error of the judgment by turn instead of by joint bounds; those behind the verified one are not judged. One that all
prompts would not decide if its estimates hold waits until the others had their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stagevar.errors import OutOfDeviceMemory
from stagevar.schedule import Steps
from tuner.config.prompts import PromptSet
from tuner.config.quality import MetricLimit, limited
from tuner.evaluation.evaluator import Evaluator
from tuner.evaluation.executor import Executor, Failed, NotMeasured, QualityTask
from tuner.metrics.registry import declaration_of
from tuner.results.candidate import Interval, Verdict, Verification
from tuner.statistics.bounds import (
    ALPHA,
    continuous_drop_bounds,
    drop_bounds,
    mean_interval,
)
from tuner.statistics.looks import FIRST_CLAIM, claims, looks, turn_shares
from tuner.study.finalist_times import BASELINE, FinalistTimes
from tuner.study.verdict import Limits, decide, is_settled, status_of

#: Values per metric of one micro-batch, or why there are none.
Judged = Mapping[str, Sequence[float] | np.ndarray] | Failed


def _claimed(status: str, alpha: float | None) -> str:
    """The status that may be claimed: a promising one between claiming looks (alpha is None) waits for the next."""
    return "open" if status == "met" and alpha is None else status


def paired_differences(
    values: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], directions: Mapping[str, bool]
) -> dict[str, Interval]:
    """Interval of the paired difference per metric, signed so that positive is better for the candidate."""
    return {
        name: mean_interval((np.asarray(own) - np.asarray(baseline[name])) * (1 if directions.get(name, True) else -1))
        for name, own in values.items()
    }


class Verifier:
    """One verification of several finalists.

    Args:
        finalists: key -> steps.
        full: the full schedule's steps.
        heldout: prompts to verify on, at most all of them.
        note: called with a line of progress and the share done.
        stop: asked between steps whether to end early.
        processed_tokens: by key; among equally good finalists, the one with most becomes the pick.
        earlier: verifications of an earlier part of the same study by key, the full schedule's under BASELINE; their values
            per held-out prompt are not measured again.
        extensions: earlier judgments of the study.
        judgments: those by another study of some of these finalists on these prompts.
        proved: finalists of which another study proved that they keep the limits, with its values and these verdicts.
        one_by_one: judge finalists in their order, on all prompts each, until one is verified.

    Attributes:
        errors: of finalists that could not run.
        unmeasured: of those that ran out of memory; they leave the finalists without a verdict.
        cut_short: whether `stop` ended it before everything was decided or every prompt was used.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        executor: Executor,
        finalists: Mapping[str, Steps],
        full: Steps,
        heldout: PromptSet | None,
        limits: Limits,
        note: Callable[[str, float], None] = lambda line, share: None,
        stop: Callable[[], bool] = lambda: False,
        earlier: Mapping[str, Verification] | None = None,
        extensions: int = 0,
        processed_tokens: Mapping[str, float] | None = None,
        judgments: int = 0,
        proved: Mapping[str, Verification] | None = None,
        one_by_one: bool = False,
    ):
        self.proved = dict(proved or {})
        self.error_shares: dict[str, float] = {}
        self.one_by_one = one_by_one
        self.processed_tokens = processed_tokens or dict.fromkeys(finalists, 0.0)
        self.evaluator, self.executor, self.finalists, self.full = evaluator, executor, dict(finalists), full
        self.limits, self.note, self.stop = limits, note, stop
        self.heldout = PromptSet((), (), 1) if heldout is None else heldout
        self.earlier, self.extensions, self.cut_short = dict(earlier or {}), extensions + judgments, False
        self.times = FinalistTimes(evaluator, self.finalists, full, limits, note, stop, extensions)
        self.values: dict[str, dict[str, list[float]]] = {name: {} for name in (BASELINE, *finalists)}
        known = {BASELINE: self.earlier[BASELINE], **self.proved} if self.proved else {}
        for name, check in known.items():
            self.values[name] = {metric: list(values) for metric, values in check.values.items()}
        self.errors: dict[str, str] = {}
        self._bounds: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def unmeasured(self) -> dict[str, str]:
        """Why finalists left, by key."""
        return self.times.unmeasured

    def run(self) -> dict[str, Verification]:
        """Verifications by key, the full schedule's under BASELINE."""
        self.times.take()
        self.cut_short = self.times.cut_short
        if self.one_by_one:
            # Timings say nothing about quality, so they may decide whose turn it is.
            turns = [*self._to_judge("met"), *self._to_judge("open")]
            self.error_shares = dict(zip(turns, turn_shares(len(turns)), strict=True))
        if self.limits.quality and len(self.heldout):
            self._judge()
        return {name: self.verification(name) for name in (BASELINE, *self.finalists)}

    # ------------------------------------------------------------------------------------------------ quality

    def _looks(self) -> list[int]:
        return looks(len(self.heldout), self.heldout.micro_batch)

    def _alpha(self, name: str, count: int) -> float | None:
        """Error that a claim about a finalist may make at this look; None if this look makes none."""
        alpha = claims(len(self.heldout), self.heldout.micro_batch, self.extensions).get(count)
        return None if alpha is None else alpha * self.error_shares.get(name, 1.0)

    def _judge(self) -> None:
        for status in ("met", "open"):
            names = self._to_judge(status)
            turns = [([name], patient) for patient in (False, True) for name in names]
            for group, patient in turns if self.one_by_one else [(names, True)]:
                if self.cut_short or (self._verified() and (self.one_by_one or status == "open")):
                    return
                self._judge_these(group, patient)

    def _to_judge(self, times: str) -> list[str]:
        """Finalists that are not proved yet, with this status of their timings."""
        return [n for n in self.finalists if n not in self.proved and self.times.status(n) == times]

    def _judge_these(self, running: Sequence[str], patient: bool) -> None:
        """Draws and scores held-out prompts for the full schedule and these finalists until they are decided; unless
        `patient`, until the last look does not seem to verify them."""
        done = 0
        for count in self._looks():
            if not running:
                break
            first, last = done // self.heldout.micro_batch, -(-count // self.heldout.micro_batch)
            gathered = self._measure([BASELINE, *running], range(first, last))
            for batch in sorted(gathered):  # executors may answer in any order; prompts keep their order
                for key, outcome in gathered[batch].items():
                    if isinstance(outcome, NotMeasured):
                        if key == BASELINE:
                            raise OutOfDeviceMemory(outcome.error)
                        if key in self.finalists:
                            self.times.leave(key, outcome.error)
                        continue
                    if isinstance(outcome, Failed):
                        self.errors[key] = outcome.error
                        continue
                    for metric, values in outcome.items():
                        self.values[key].setdefault(metric, []).extend(map(float, values))
            done = count
            if BASELINE in self.errors:
                raise RuntimeError(f"the full schedule failed on held-out prompts: {self.errors[BASELINE]}")
            running = [k for k in running if k not in self.errors and k in self.finalists]
            # A decided finalist needs no more prompts.
            running = [k for k in running if status_of(self._quality_verdicts(k)) == "open"]
            if self._pick_is_settled(running) or not (patient or all(map(self._promising, running))):
                break
            if self.stop():
                self.cut_short |= bool(running) and done < len(self.heldout)
                break

    def _promising(self, name: str) -> bool:
        """Whether the last look would verify a finalist if its estimates hold, as far as can be told."""
        count, last = len(self.values[name]["quality"]), len(self.heldout)
        if count < FIRST_CLAIM:
            return True
        alpha, shrinks = self._alpha(name, last), (count / last) ** 0.5
        drops = [self._drop_verdict(name, limit, count, alpha) for limit in limited(self.limits.metrics)]
        return all(drop.value + (drop.bound - drop.value) * shrinks <= drop.limit for drop in drops)

    def _pick_is_settled(self, undecided: Sequence[str]) -> bool:
        verified = self._verified()
        qualities = {n: self.values[n]["quality"] for n in (*verified, *undecided)}
        return is_settled(verified, undecided, qualities, self.values[BASELINE]["quality"], self.processed_tokens)

    def _verified(self) -> list[str]:
        """Finalists that keep every limit, as far as was measured."""
        in_time = (n for n in self.finalists if n not in self.errors and self.times.status(n) == "met")
        verdicts = {n: self._quality_verdicts(n) for n in in_time}
        return [n for n, found in verdicts.items() if found and status_of(found) == "met"]

    def _measure(self, keys: Sequence[str], batches: Sequence[int]) -> dict[int, dict[str, Judged]]:
        """New values or Failed by micro-batch and key; reuses what an earlier part of the study measured."""
        found: dict[int, dict[str, Judged]] = {batch: {} for batch in batches}
        missing: dict[int, list[str]] = {}
        for batch in batches:
            start = batch * self.heldout.micro_batch
            for key in keys:
                there = len(self.values[key].get("quality", ()))
                if there >= min(start + self.heldout.micro_batch, len(self.heldout)):
                    continue  # judged before, as the full schedule is with every finalist
                if there > start:  # another study's prompts ended here; micro-batches are drawn whole
                    self.values[key] = {metric: values[:start] for metric, values in self.values[key].items()}
                kept = self._kept(key, batch)
                if kept is None:
                    missing.setdefault(batch, []).append(key)
                else:
                    found[batch][key] = kept
        tasks = [
            QualityTask(tuple(self.full if k == BASELINE else self.finalists[k] for k in wanted), "heldout", batch)
            for batch, wanted in missing.items()
        ]
        done = len(batches) - len(tasks)
        for task, outcomes in self.executor.run(tasks):
            found[task.batch] |= zip(missing[task.batch], outcomes, strict=True)
            done += 1
            self.note(
                f"verifying {self._said(keys)} on held-out prompts",
                (batches[0] + done) * self.heldout.micro_batch / len(self.heldout),
            )
        return found

    def _said(self, keys: Sequence[str]) -> str:
        """The finalists among these keys in words."""
        names = [key for key in keys if key != BASELINE]
        if len(names) > 1:
            return f"{len(names)} finalists"
        return f"finalist {list(self.finalists).index(names[0]) + 1} of {len(self.finalists)}"

    def _kept(self, key: str, batch: int) -> dict[str, Sequence[float]] | None:
        """Values of a whole micro-batch from an earlier part of the study, or None."""
        start = batch * self.heldout.micro_batch
        end = min(start + self.heldout.micro_batch, len(self.heldout))
        if key not in self.earlier or self.earlier[key].prompts < end:
            return None
        return {metric: values[start:end] for metric, values in self.earlier[key].values.items()}

    def _quality_verdicts(self, name: str) -> list[Verdict]:
        if name in self.proved:
            return list(self.proved[name].verdicts)
        count = len(self.values[name].get("quality", []))
        if not count:
            return []
        alpha = self._alpha(name, count)
        verdicts = [self._drop_verdict(name, limit, count, alpha) for limit in limited(self.limits.metrics)]
        floors = self.limits.floors.items()
        return [*verdicts, *(self._floor_verdict(name, metric, floor, count, alpha) for metric, floor in floors)]

    def _drop_verdict(self, name: str, limit: MetricLimit, count: int, alpha: float | None) -> Verdict:
        """One metric of one finalist after `count` prompts."""
        base = np.asarray(self.values[BASELINE][limit.metric][:count])
        peers, values_KN = self._with_peers(name, limit.metric, count)
        differences_KN = (values_KN - base) * limit.sign
        bounds = continuous_drop_bounds if limit.kind == "continuous" else drop_bounds
        key = (limit.name, count, alpha, peers)
        upper_K, lower_K = self._together(key, bounds, differences_KN, limit.change, alpha)
        own = peers.index(name)
        status = _claimed(decide(limit.allowed, float(lower_K[own]), float(upper_K[own])), alpha)
        drop = -float(differences_KN[own].mean())
        return Verdict(limit.name, limit.allowed, limit.unit, drop, float(upper_K[own]), status)

    def _floor_verdict(self, name: str, metric: str, floor: float, count: int, alpha: float | None) -> Verdict:
        """Whether a metric's mean, not its difference, stays at or above a floor, as a drop from the top of its range."""
        declared = declaration_of(metric)
        peers, values_KN = self._with_peers(name, metric, count)
        top = 0.0 if declared.kind == "continuous" else declared.change
        bounds = continuous_drop_bounds if declared.kind == "continuous" else drop_bounds
        key = (f"floor:{metric}", count, alpha, peers)
        upper_K, lower_K = self._together(key, bounds, values_KN - top, declared.change, alpha)
        own = peers.index(name)
        low, high = top - float(upper_K[own]), top - float(lower_K[own])
        status = _claimed(decide(-floor, -high, -low), alpha)
        return Verdict(f"floor:{metric}", floor, metric, float(values_KN[own].mean()), low, status)

    def _with_peers(self, name: str, metric: str, count: int) -> tuple[tuple[str, ...], np.ndarray]:
        """The finalists whose bounds hold together with this one's, and their values (K, count).

        Those are all that reached this number of prompts, decided at this look or not; one by one, it is this one alone.
        """
        reached = tuple(k for k in self.finalists if len(self.values[k].get(metric, [])) >= count)
        peers = (name,) if self.one_by_one else reached
        return peers, np.stack([np.asarray(self.values[k][metric][:count]) for k in peers])

    def _together(
        self, key: Any, bounds: Callable[..., Any], differences_KN: np.ndarray, change: float, alpha: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bounds (upper, lower), each (K,), computed once for all finalists, since values are only ever added."""
        if key not in self._bounds:
            upper_K, lower_K = bounds(differences_KN, change, alpha or ALPHA)
            if alpha is not None and (self.extensions or self.one_by_one):
                # The small error of a later judgment, or of a turn, is for claims, not for giving up.
                _, lower_K = bounds(differences_KN, change, ALPHA)
            self._bounds[key] = upper_K, lower_K
        return self._bounds[key]

    # ------------------------------------------------------------------------------------------------ result

    def verification(self, name: str) -> Verification:
        """Everything currently known about a finalist or the full schedule."""
        latency = self.times.stats(name)
        verdicts = self.times.verdicts(name)
        upper_ms = verdicts[0].bound
        values = {metric: tuple(v) for metric, v in self.values[name].items()}
        count = len(values.get("quality", ()))
        if name == BASELINE:
            return Verification(count, values, {}, None, latency, upper_ms, tuple(verdicts), "baseline")
        differences, drop_upper = {}, None
        if self.limits.quality:
            verdicts += self._quality_verdicts(name)
            if count:
                base = {metric: v[:count] for metric, v in self.values[BASELINE].items()}
                differences = paired_differences(values, base, self.evaluator.facts.higher_is_better)
                drop_upper = next(v.bound for v in verdicts if v.name.startswith("drop:"))
        status = "broken" if name in self.errors else status_of(verdicts)
        if status == "met" and self.limits.quality and not count:
            status = "open"  # stopped before any held-out prompt
        return Verification(
            count, values, differences, drop_upper, latency, upper_ms, tuple(verdicts),
            "verified" if status == "met" else status, self.error_shares.get(name),
            self.proved[name].proved_by if name in self.proved else None,
        )  # fmt: skip
