"""The last lines of a study, in plain words: what was proved, where the files are, what to do next.

Commands can be pasted into the shell that the study ran in. Pure: takes a result, its directory and the command line, and
returns text.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.config.quality import COMPOSITE, MetricLimit, limited
from tuner.results.candidate import Finalist, Verdict, verification_of
from tuner.results.result import StudyResult

#: Margin for the scatter of timings when a new budget is suggested.
_ROOM = 1.03
#: A larger drop is suggested up to this many times the allowed one.
_MOST_ALLOWANCES = 3
_REGRESSION = "3%"


@dataclass(frozen=True)
class NextSteps:
    """What to print: all `lines`, and the `commands` among them that can be pasted."""

    lines: tuple[str, ...]
    commands: tuple[str, ...]


def next_steps(result: StudyResult, run_dir: Path, words: Sequence[str]) -> NextSteps:
    """What to say after a verdict; `words` is the command line that reproduces the study, with or without its program."""
    words = list(words[1:] if words and not words[0].startswith("-") else words)
    tellers = {
        "verified": _verified,
        "baseline_meets_budget": _nothing_to_gain,
        "latency_only": _latency_only,
        "unverified": _unverified,
        "infeasible": _infeasible,
        "inconclusive": _inconclusive,
        "partial": _partial,
        "failed": _failed,
    }
    teller = tellers.get(result.verdict)
    if teller is None:
        return NextSteps((), ())
    lines, steps = teller(result, run_dir, words)
    lines = [*lines, _files(result, run_dir)]
    for what, command in steps:
        lines += [f"next: {what}", f"  {command}"]
    return NextSteps(tuple(lines), tuple(command for _, command in steps))


_Told = tuple[list[str], list[tuple[str, str]]]


# ------------------------------------------------------------------------------------------------ one per verdict


def _verified(result: StudyResult, run_dir: Path, words: Sequence[str]) -> _Told:
    pick = result.pick
    assert isinstance(pick, Finalist)
    parts = [_speed(pick)]
    parts += [_kept(m, v) for m in limited(result.limits) for v in pick.verification.verdicts if v.name == m.name]
    floors = [v for v in pick.verification.verdicts if v.name.startswith("floor:")]
    parts += [f"{v.name.partition(':')[2]} stays at or above {v.bound:.3g}" for v in floors]
    told = [f"proved: on {pick.verification.prompts} prompts that the search never saw, {_joined(parts)}"]
    if pick.verification.proved_by:
        told.append(
            f"        (quality: by the study in {pick.verification.proved_by}; only the latency was measured anew)"
        )
    if len(result.judged_on) > 1:
        told.append(
            f"        (judged {len(result.judged_on)} times, on {_joined([str(n) for n in result.judged_on])} prompts; "
            "all judgments together err in at most 5 % of studies)"
        )
    steps = _deploying(result, run_dir)
    left = sum(check.passed_over for c in result.candidates if (check := verification_of(c)) is not None)
    if left:
        finalists = "the finalist that was" if left == 1 else f"the {left} finalists that were"
        steps.append((f"search on, and judge {finalists} left, too", _line(_with(words, "--effort", "full"))))
    return told, steps


def _nothing_to_gain(result: StudyResult, run_dir: Path, words: Sequence[str]) -> _Told:
    full_ms = result.full_ms
    told = [f"proved: the full schedule takes {full_ms:.1f} ms, within {result.budget}; no acceleration is needed"]
    faster = _verified_schedules(result)
    if faster:
        told.append(f"        {_schedules(result)} verified, too: see pareto.yaml")
    steps = _deploying(result, run_dir)
    budget = _below(result.budget, full_ms)
    steps.append((f"to go faster, lower the budget to {budget}", _other_study(result, run_dir, words, budget)))
    return told, steps


def _verified_schedules(result: StudyResult) -> list[Finalist]:
    return [c for c in result.candidates if isinstance(c, Finalist) and c.verification.status == "verified"]


def _schedules(result: StudyResult) -> str:
    count = len(_verified_schedules(result))
    return f"{count} faster {'schedule was' if count == 1 else 'schedules were'}"


def _latency_only(result: StudyResult, run_dir: Path, words: Sequence[str]) -> _Told:
    assert isinstance(result.pick, Finalist)
    told = [
        f"measured: {_speed(result.pick)}; the weights are random, so nothing is known about quality",
    ]
    return told, [_with_trained_weights(run_dir, words)]


def _with_trained_weights(run_dir: Path, words: Sequence[str]) -> tuple[str, str]:
    again = _with(_without(words, "--weights"), "--out", f"{run_dir}-weights")
    return "tune with trained weights, which also judges the images", _line(again)


def _unverified(result: StudyResult, run_dir: Path, words: Sequence[str]) -> _Told:
    told = [f"not proved: {result.reason}"]
    quick = _with(words, "--effort", "quick")
    again = _line(_with(quick, "--out", f"{run_dir}-quick"))
    if not result.random_weights:
        return told, [("judge images and verify", again)]
    return told, [("verify the latency; random weights have no quality", again), _with_trained_weights(run_dir, quick)]


def _infeasible(result: StudyResult, run_dir: Path, words: Sequence[str]) -> _Told:
    full_ms = result.full_ms
    nearest = next((c for c in result.candidates if c.key in result.nearest[:1]), None)
    if result.smallest_budget_ms is not None:
        if result.smallest_budget_ms * _ROOM < full_ms:
            budget = _budget(result, result.smallest_budget_ms * _ROOM)
            fastest = "the fastest" if result.random_weights else "the fastest that may keep the quality"
            told = [
                f"not proved: no schedule meets {result.budget}; {fastest} takes "
                f"{result.smallest_budget_ms:.1f} ms, the full one {full_ms:.1f} ms"
            ]
            what = f"raise the budget to {budget}, which can be reached"
            return told, [(what, _other_study(result, run_dir, words, budget))]
        told = [f"not proved: no schedule meets {result.budget}, and none is much faster than the full one"]
        return told, []
    told = [f"not proved: no schedule meets {result.budget} and keeps the quality"]
    steps: list[tuple[str, str]] = []
    share = (result.budget_ms / full_ms + 1) / 2
    if share < 1:
        budget = _budget(result, share * full_ms)
        steps.append((f"raise the budget to {budget}", _other_study(result, run_dir, words, budget)))
    limit = next(iter(limited(result.limits)), None)
    if limit is None or nearest is None:
        return told, steps
    change = nearest.final_differences.get(limit.metric)
    if change is None or change.mean >= 0:
        return told, steps
    told.append(f"            the nearest one loses {limit.amount(-change.mean)} on {limit.metric} ({_allowed(limit)})")
    if limit.allowed < -change.low <= _MOST_ALLOWANCES * limit.allowed:
        drop = _max_drop(limit, -change.low)
        again = [*_kept_limits(words, limit.metric), "--max-drop", drop]
        steps.append((f"or allow a larger drop of {drop}", _line(_with(again, "--out", f"{run_dir}-drop"))))
    return told, steps


def _inconclusive(result: StudyResult, run_dir: Path, words: Sequence[str]) -> _Told:
    best = next((c for c in result.candidates if c.key in result.nearest[:1]), None)
    if not isinstance(best, Finalist):
        return [f"not proved: {result.reason}"], []
    undecided = [v for v in best.verification.verdicts if v.status == "open"]
    told = [f"not decided: {_joined([_open(result, best, v) for v in undecided])}"]
    if best.verification.times_open:
        return told, [
            (
                "measure again on a quiet machine; what was drawn and judged is kept",
                _line(["resume", str(run_dir)]),
            )
        ]
    if result.settle_heldout is None:
        told.append(f"             {result.reason.rpartition('; ')[2]}")
        return told, []
    more = sum(int(part) for part in result.settle_heldout.split("+"))
    what = f"decide it on {more} held-out prompts; this continues the run and keeps what was drawn and judged"
    again = _with(_with(words, "--heldout", result.settle_heldout), "--out", str(run_dir))
    return told, [(what, _line(again))]


def _partial(result: StudyResult, run_dir: Path, words: Sequence[str]) -> _Told:
    told = [f"stopped: {len(result.candidates)} schedules were measured and nothing is proved yet"]
    return told, [("continue the run", _line(["resume", str(run_dir)]))]


def _failed(result: StudyResult, run_dir: Path, words: Sequence[str]) -> _Told:
    told = ["failed: nothing was measured; the first line has the error"]
    doctor = _line(["doctor", "--model", result.model])
    again = _line([*_with(words, "--out", str(run_dir)), "--fresh"])
    return told, [("see what the model needs and what this machine has", doctor), ("then start over", again)]


# ------------------------------------------------------------------------------------------------ words


def _speed(candidate: Finalist) -> str:
    """ "images come out 1.9x as fast", by the bound; runs of earlier versions have none for the gain."""
    gain = next((v for v in candidate.verification.verdicts if v.name == "gain"), None)
    if gain is None:
        return f"images come out {candidate.final_latency.speedup_text} as fast"
    return f"images come out at least {math.floor(100 / gain.bound) / 100:.2f}x as fast"


def _kept(limit: MetricLimit, verdict: Verdict) -> str:
    """ "at most 2.1 % fewer of them are right (geneval)"."""
    if limit.metric == COMPOSITE:
        return f"the composite quality falls by at most {max(0.0, verdict.bound):.3g}"
    if limit.unit == "share of prompts":
        if verdict.bound <= 0:
            return f"no fewer of them are right ({limit.metric})"
        return f"at most {_up(100 * verdict.bound)} % fewer of them are right ({limit.metric})"
    amount = limit.amount(max(0.0, verdict.bound))
    return f"{limit.metric} {'falls' if limit.higher_is_better else 'rises'} by at most {amount}"


def _open(result: StudyResult, candidate: Finalist, verdict: Verdict) -> str:
    """An undecided limit in words."""
    if verdict.name == "latency":
        allowed, value, bound = (f"{x:.1f} ms" for x in (verdict.limit, verdict.value, verdict.bound))
        return f"one image takes {value}, perhaps {bound} ({allowed} allowed)"
    if verdict.name == "gain":
        return f"the gain is too small to be sure: {verdict.value:.3f} of the full schedule's time, perhaps {verdict.bound:.3f}"
    prompts = candidate.verification.prompts
    kind, _, metric = verdict.name.partition(":")
    if kind == "floor":
        return (
            f"on {prompts} held-out prompts the mean of {metric} is {verdict.value:.3g} and may be {verdict.bound:.3g} "
            f"(at least {verdict.limit:g} required)"
        )
    limit = next(m for m in limited(result.limits) if m.name == verdict.name)
    told = "unknown" if math.isinf(verdict.bound) else limit.amount(verdict.bound)
    if told == limit.amount(limit.allowed):
        told = f"just above {told}"
    return (
        f"on {prompts} held-out prompts the drop of {metric} is {limit.amount(verdict.value)} and may be {told} "
        f"({_allowed(limit)})"
    )


def _allowed(limit: MetricLimit) -> str:
    return f"{limit.amount(limit.allowed)} allowed"


def _files(result: StudyResult, run_dir: Path) -> str:
    report = f"{_path(run_dir / 'report.html')} shows all results"
    if result.pick is None:
        return f"files: {report}"
    unproved = result.random_weights or result.verdict == "unverified"
    what = "holds the schedule" if unproved else "is the schedule to deploy"
    return f"files: {_path(run_dir / 'profile.yaml')} {what}, {report}"


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _up(value: float) -> str:
    """The value to two significant digits, rounded up."""
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"


# ------------------------------------------------------------------------------------------------ commands


def _deploying(result: StudyResult, run_dir: Path) -> list[tuple[str, str]]:
    profile = str(run_dir / "profile.yaml")
    prompt = result.search_prompts[0] if result.search_prompts else "PROMPT"
    draw = shlex.join(["stagevar", "generate", "--profile", profile, prompt, "-o", "image.png"])
    check = _line(["verify", profile, "--max-regression", _REGRESSION])
    return [("draw with it", draw), ("measure it again, on this machine or where it will run", check)]


def _other_study(result: StudyResult, run_dir: Path, words: Sequence[str], budget: str) -> str:
    """The same question with another budget: another study, which needs another folder."""
    again = _with(_without(words, "--latency-budget"), "--budget", budget)
    if _has(words, "--out"):
        again = _with(again, "--out", f"{run_dir}-{budget.replace('%', 'pct')}")
    return _line(again)


def _budget(result: StudyResult, least_ms: float) -> str:
    """A budget of at least `least_ms`, spelled like the study's: a share or a time."""
    if result.budget.endswith("%"):
        return f"{math.ceil(100 * least_ms / result.full_ms)}%"
    return f"{math.ceil(least_ms)}ms"


def _below(budget: str, full_ms: float) -> str:
    return "60%" if budget.endswith("%") else f"{max(1, math.floor(0.6 * full_ms))}ms"


def _max_drop(limit: MetricLimit, drop: float) -> str:
    """A value of --max-drop that allows this much."""
    if limit.unit.startswith("share of "):
        return f"{limit.metric}={math.ceil(100 * drop)}%"
    return f"{limit.metric}={_up(drop)}"


def _kept_limits(words: Sequence[str], metric: str) -> list[str]:
    """The words without the limit of `metric`, the primary one; a limit without a name is also the primary metric's."""
    kept, index = [], 0
    while index < len(words):
        option, equals, value = words[index].partition("=")
        if option != "--max-drop":
            kept.append(words[index])
            index += 1
            continue
        value, index = (value, index + 1) if equals else (words[index + 1], index + 2)
        others = [part for part in value.split(",") if "=" in part and part.partition("=")[0].strip() != metric]
        if others:
            kept += ["--max-drop", ",".join(others)]
    return kept


def _has(words: Sequence[str], option: str) -> bool:
    return any(word.partition("=")[0] == option for word in words)


def _without(words: Sequence[str], option: str) -> list[str]:
    """The words without an option and its value."""
    kept, index = [], 0
    while index < len(words):
        if words[index] == option:
            index += 2
            continue
        if not words[index].startswith(f"{option}="):
            kept.append(words[index])
        index += 1
    return kept


def _with(words: Sequence[str], option: str, value: str) -> list[str]:
    """The words with an option set to a value, appended if it was missing."""
    place = next((i for i, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    kept = _without(words, option)
    return [*kept[:place], option, value, *kept[place:]]


def _line(words: Sequence[str]) -> str:
    return shlex.join(["stagevar-tune", *words])


def _path(path: Path) -> str:
    return shlex.quote(str(path))
