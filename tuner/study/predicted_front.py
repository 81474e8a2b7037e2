"""Sensitivities before trials: a table of lasting changes, the front that it predicts, and whether to keep trusting it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stagevar.errors import UsageError
from stagevar.files import write_text_atomically, writing
from stagevar.schedule import Steps
from tuner.config.parameters import Value
from tuner.config.prompts import PromptSet
from tuner.config.quality import factors, limited
from tuner.config.space import all_or_drawn_settings, draws, expanded, steps_key
from tuner.evaluation.executor import Executor, Failed, QualityTask
from tuner.proposals.forecast import Forecast, layers
from tuner.proposals.sampler_process import SamplerProcess
from tuner.proposals.sensitivity import (
    Change,
    Sensitivities,
    agreement,
    alone,
    changes_to_measure,
    noise_ceiling,
    predicted,
)
from tuner.proposals.trial_sampler import Proposal, TrialSampler
from tuner.results.result import Agreement, PredictionFacts
from tuner.results.run_dir import SENSITIVITY_FILE, EvidenceRecord
from tuner.study.latency_source import LatencySource
from tuner.study.ledger import Ledger
from tuner.study.options import FULL_TRIALS, ROUND
from tuner.study.progress import Progress

SCHEMA = "stagevar-sensitivity/1"
#: Prompts of the table; the search set is ordered so that its first prompts have every task in its share.
TABLE_PROMPTS = 16
#: Number of schedules drawn to find the space's lasting changes.
CHANGE_DRAWS = 300
#: Number of settings among which the predicted front is found: all of a space that holds no more, otherwise drawn ones.
FRONT_SETTINGS = 10_000
#: Schedules to measure before predictions are judged by them, and prompts that each needs outside the table.
LEAST_JUDGED, LEAST_UNSEEN = 6, 8
#: Proposals to measure before they are judged, and the share of them that must not clearly break a limit.
LEAST_PROPOSED, LEAST_HELD = 4, 0.5
#: Schedules within the limits that few trials should find, so that verification has more than one to try.
LEAST_FEASIBLE = 3
#: Predictions propose nothing more once their rank correlation, as a share of its noise ceiling, is below this by more than
#: its standard error; and the least ceiling that can be distinguished from noise.
TRUST, LEAST_CEILING = 0.5, 0.5
#: A preset counts as over the budget only if its predicted ratio exceeds it by more than this.
_SLACK = 1.1


class PredictedFront:
    """The sensitivity table of one search and what it proposes.

    Args:
        prompts: of the search.
        latency: has a filled table of step costs.
        few: see `SearchShortcuts`.
        earlier: another study's table for the model, reused if it has every metric.

    Attributes:
        forecasts: those of the predicted front that were not proposed yet.
        table: None before `fill`, or if the space has no change to measure.
        trusted: whether measured schedules still support it.
        measured: whether the table was measured here.
    """

    def __init__(
        self,
        run_dir: Path,
        ledger: Ledger,
        executor: Executor,
        prompts: PromptSet,
        latency: LatencySource,
        progress: Progress,
        seed: int,
        few: bool = False,
        earlier: Sensitivities | None = None,
    ):
        self.path, self.ledger, self.executor, self.prompts = run_dir / SENSITIVITY_FILE, ledger, executor, prompts
        self.latency, self.progress, self.seed, self.few, self.earlier = latency, progress, seed, few, earlier
        self.table: Sensitivities | None = None
        self.trusted, self.measured = True, False
        self._proposed: list[str] = []
        self.forecasts: list[Forecast] = []

    # ------------------------------------------------------------------------------------------------ the table

    def fill(self, records: Sequence[EvidenceRecord], stop: Callable[[], bool] = lambda: False) -> None:
        """Reuses the table that this study or an earlier one measured, or measures it; keeps it in the run directory.

        `stop` is asked between micro-batches whether to give up measuring; then there is no table.
        """
        known = next((record["table"] for record in records if record["kind"] == "sensitivity"), None)
        metrics = [limit.metric for limit in self.ledger.metrics]
        if known is not None:
            self.table = Sensitivities.from_data(known)
        elif not self.take_earlier():
            self._measure(metrics, stop)
        if self.table is not None:
            if known is None:
                self.ledger.evidence.append({"kind": "sensitivity", "table": self.table.to_data()})
            self._keep()

    def take_earlier(self) -> bool:
        """Reuses the earlier study's table, if there is one with this study's metrics."""
        metrics = [limit.metric for limit in self.ledger.metrics]
        if self.earlier is None or not set(metrics) <= set(self.earlier.metrics):
            return False
        rows = [self.earlier.metrics.index(metric) for metric in metrics]
        self.table = Sensitivities(metrics, {c: row_MN[rows] for c, row_MN in self.earlier.rows.items()})
        self.progress.say(f"reusing the earlier study's sensitivities of {len(self.table.rows)} changes")
        self._keep()
        return True

    def _keep(self) -> None:
        assert self.table is not None
        save_table(self.path, self.ledger.facts.model, self.ledger.facts.grids, self.table)
        self.forecasts = self._front()

    def _measure(self, metrics: Sequence[str], stop: Callable[[], bool]) -> None:
        ledger = self.ledger
        facts = ledger.facts
        drawn = draws(ledger.space, facts.grids, facts.chunks, self.seed, CHANGE_DRAWS)
        changes = changes_to_measure([*ledger.steps.values(), *drawn])
        if not changes:
            return
        schedules = tuple(alone(change, ledger.full) for change in changes)
        batches = range(min(self.prompts.batches, -(-TABLE_PROMPTS // self.prompts.micro_batch)))
        gathered: dict[int, list[Any]] = {}
        for task, outcomes in self.executor.run([QualityTask(schedules, "search", batch) for batch in batches]):
            gathered[task.batch] = outcomes
            self.progress.update(ledger.evaluated, f"sensitivity of {len(changes)} changes")
            if len(gathered) < len(batches) and stop():
                return
        rows: dict[Change, np.ndarray] = {}
        for index, change in enumerate(changes):
            parts = [gathered[batch][index] for batch in batches]
            if any(isinstance(part, Failed) for part in parts):
                continue
            rows[change] = np.stack([self._differences(parts, metric) for metric in metrics])
        self.measured = bool(rows)
        self.table = Sensitivities(metrics, rows) if rows else None

    def _differences(self, parts: Sequence[Mapping[str, np.ndarray]], metric: str) -> np.ndarray:
        return self._paired(np.concatenate([np.asarray(part[metric], dtype=np.float64) for part in parts]), metric)

    def _paired(self, own: np.ndarray, metric: str) -> np.ndarray:
        """Differences from the full schedule on the first search prompts, positive is better."""
        full = np.asarray(self.ledger.measured_baseline.values[metric])[: own.size]
        return (own - full) * (1.0 if self.ledger.facts.higher_is_better.get(metric, True) else -1.0)

    # ------------------------------------------------------------------------------------------------ the front

    def worth_trying(self, presets: dict[str, dict[str, Value]]) -> dict[str, dict[str, Value]]:
        """Presets that, as predicted, may be within budget and limits; all of them, unless `few`.

        The space's own proposals only have to be fast enough: somebody chose them, and the table is based on few prompts.
        """
        if not self.few:
            return presets
        ledger, kept = self.ledger, {}
        proposals = {name for name, _ in ledger.space.proposals}
        for name, values in presets.items():
            steps = ledger.space.known_schedule(name, ledger.facts.grids).expand(
                ledger.facts.grids, ledger.facts.chunks
            )
            forecast = self.forecast(values, steps)
            if forecast is not None:
                good, fast = forecast.kept or name in proposals, forecast.ratio <= _SLACK * ledger.budget_ratio
                if not (good and fast):
                    continue
            kept[name] = values
        return kept

    def propose(self, trial_sampler: TrialSampler | SamplerProcess, trials: int) -> int:
        """Queues the next schedules of the predicted front while predictions hold; returns how many.

        Of all `trials` that the search evaluates, half are left to the sampler, unless `few`.
        """
        ledger = self.ledger
        if not self.trusted or not all(key in ledger.known for key in self._proposed):
            return 0
        most = trials if self.few else trials // 2
        count = min(ROUND, trials - ledger.evaluated, most - len(self._proposed))
        fresh = [forecast for forecast in self.forecasts if forecast.key not in ledger.known]
        chosen, self.forecasts = fresh[: max(0, count)], fresh[max(0, count) :]
        self._proposed += [forecast.key for forecast in chosen]
        ledger.foreseen.update(forecast.key for forecast in chosen)
        if chosen:
            trial_sampler.again([Proposal(-1, forecast.values) for forecast in chosen])
        return len(chosen)

    def _front(self) -> list[Forecast]:
        """Schedules within budget and limits, best fronts first."""
        ledger, facts = self.ledger, self.ledger.facts
        found: dict[str, Forecast | None] = {ledger.full_key: None}
        settings = all_or_drawn_settings(ledger.space, self.seed, FRONT_SETTINGS)
        for values, steps in expanded(ledger.space, facts.grids, facts.chunks, settings):
            if steps is not None and (key := steps_key(steps)) not in found:
                found[key] = self.forecast(values, steps, key)
        within = [one for one in found.values() if one is not None and one.kept and one.ratio <= ledger.budget_ratio]
        return layers(within)

    def forecast(self, values: dict[str, Value], steps: Steps, key: str = "") -> Forecast | None:
        """The forecast for a schedule; None if the table has none."""
        found_MN = None if self.table is None else self.table.differences(steps)
        if found_MN is None:
            return None
        limits, composite, kept = self.ledger.metrics, 0.0, True
        per_unit = factors(limits)
        for limit, row_N in zip(limits, found_MN, strict=True):
            one = predicted(row_N)
            composite += per_unit[limit.metric] * one.mean
            if limit.max_drop is not None:
                kept &= one.mean + one.standard_error >= -limit.max_drop
        return Forecast(values, key, self.ratio(steps), composite, kept)

    def ratio(self, steps: Steps) -> float:
        """Predicted latency over the full schedule's: by step costs, else by token rows."""
        table = self.latency.table
        if table.filled and table.covers(steps):
            return table.predict(steps).ratio
        chunks = self.ledger.facts.chunks
        rows = [sum(step.processed_tokens(chunks) for step in one) for one in (steps, self.ledger.full)]
        return float(rows[0] / rows[1])

    # ------------------------------------------------------------------------------------------------ how well it predicts

    def judge(self, trials: int) -> int:
        """Compares predictions with what was measured since; returns how many schedules the search evaluates in total.

        That is `trials`, unless next to nothing keeps the limits after them, nor did another study prove that: then few
        trials become a full search. Both that and failing predictions are reported once.
        """
        why = "" if not self.trusted else self._broken_promises() or self._wrong_order()
        if why:
            self.trusted = False
            self.progress.say(f"predictions are no longer trusted: {why}")
        feasible = sum(c.feasible for c in self.ledger.candidates.values())
        enough = feasible >= LEAST_FEASIBLE or self.ledger.proved_in_time
        if not self.few or enough or trials >= FULL_TRIALS or self.ledger.evaluated < trials:
            return trials
        kept = "none" if not feasible else f"only {feasible}"
        self.progress.say(f"{kept} of {trials} schedules within the limits so far: searching on, up to {FULL_TRIALS}")
        return FULL_TRIALS

    def _broken_promises(self) -> str:
        """Why proposals are worse than predicted: most clearly break a limit that they were predicted to keep."""
        limits = limited(self.ledger.metrics)
        tried = [c for c in self.ledger.candidates.values() if c.source == "predicted" and c.differences]
        held = sum(all(c.differences[m.metric].high >= -m.allowed for m in limits) for c in tried)
        if len(tried) < LEAST_PROPOSED or held >= LEAST_HELD * len(tried):
            return ""
        return f"{held} of {len(tried)} proposed schedules may keep the limits, though all were predicted to"

    def _wrong_order(self) -> str:
        """Why predictions misrank what was measured, beyond what noise explains."""
        expected, measured = self._pairs("quality")
        if len(expected) < LEAST_JUDGED:
            return ""
        reached = agreement([predicted(row_N) for row_N in expected], measured).rank_correlation
        ceiling, error = _ceiling(expected, measured), 1 / np.sqrt(len(expected) - 1)
        if reached is None or ceiling is None or ceiling < LEAST_CEILING or reached + error >= TRUST * ceiling:
            return ""
        return f"rank correlation {reached:.2f} on {len(expected)} schedules, where noise allows {ceiling:.2f}"

    def _pairs(self, metric: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Predicted and measured differences per prompt, on prompts outside the table, for schedules that were not pruned
        before these."""
        expected: list[np.ndarray] = []
        measured: list[np.ndarray] = []
        if self.table is None or self.ledger.baseline is None:
            return expected, measured
        per_unit = factors(self.ledger.metrics)
        for candidate in self.ledger.candidates.values():
            found_MN = self.table.differences(self.ledger.steps[candidate.key])
            values = candidate.values.get(metric)
            if found_MN is None or not values or len(values) < 2:
                continue
            rows = dict(zip(self.table.metrics, found_MN, strict=True))
            own = self._paired(np.asarray(values), metric)
            unseen = own[self.table.prompts :]
            measured.append(unseen if unseen.size >= LEAST_UNSEEN else own)
            expected.append(
                rows[metric] if metric in rows else sum(per_unit[name] * row_N for name, row_N in rows.items())
            )
        return expected, measured

    def facts(self) -> PredictionFacts:
        """How well predictions matched, for the result."""
        table, metrics = self.table, dict[str, Agreement]()
        for limit in limited(self.ledger.metrics) if table is not None else ():
            expected, measured = self._pairs(limit.metric)
            if len(expected) >= 2:
                one = agreement([predicted(row_N) for row_N in expected], measured)
                metrics[limit.metric] = {
                    "schedules": one.count,
                    "rank_correlation": one.rank_correlation,
                    "ceiling": _ceiling(expected, measured),
                    "coverage": one.coverage,
                    "bias": one.bias,
                }
        return {
            "changes": 0 if table is None else len(table.rows),
            "prompts": 0 if table is None else table.prompts,
            "measured": self.measured,
            "proposed": len(self._proposed),
            "trusted": self.trusted,
            "metrics": metrics,
        }


def _ceiling(expected: Sequence[np.ndarray], measured: Sequence[np.ndarray]) -> float | None:
    """The rank correlation expected of true predictions, given the noise of both sides; None if either does not vary.

    Among schedules that lose next to nothing, the table's few prompts say no more than chance.
    """
    fewest = min(row.size for row in measured)
    one, other = noise_ceiling(expected), noise_ceiling([row[:fewest] for row in measured])
    return None if one is None or other is None else one * other


# ---------------------------------------------------------------------------------------------------- in the run directory


def save_table(path: Path, model: str, grids: Sequence[Any], table: Sensitivities) -> None:
    """Writes a table into the run directory."""
    data = {"schema": SCHEMA, "model": model, "scales": len(grids), **table.to_data()}
    with writing(path):
        write_text_atomically(path, json.dumps(data) + "\n")


def load_table(run: Path, model: str) -> Sensitivities | None:
    """The table of an earlier run, or of the run that a profile belongs to; None if there is none.

    Raises UsageError if it is damaged or of another model.
    """
    path = (run if run.is_dir() else run.parent) / SENSITIVITY_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError("no table of this version")
        if data["model"] != model:
            raise UsageError(f"{path} is of model {data['model']!r}, not {model!r}")
        return Sensitivities.from_data(data)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it, and the study measures it again") from None
