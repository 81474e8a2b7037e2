"""What an earlier study or profile found, as the first proposals of a new one: at another budget, on another card.

Only schedules are carried over here; tuner.study.earlier_verifications says when a proof of their quality is, too. Latency is
always measured again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stagevar.errors import UsageError
from stagevar.profile import Profile
from stagevar.schedule import StageSchedule
from stagevar.schedule.grids import Grid
from tuner.results.result import StudyResult


def earlier_schedules(path: Path, model: str, grids: Sequence[Grid] | None) -> dict[str, StageSchedule]:
    """Schedules by name, from "from-1" on: the picks, then the front, fastest first; or a profile's schedule.

    Args:
        path: a run directory or a profile.
        model: the model to tune.
        grids: its grids as it is tuned, None if not known yet.

    Raises:
        UsageError: for another model or number of scales, a study that found nothing, or an unreadable path.
    """
    if os.path.isdir(path):
        result = StudyResult.load(path)
        _check_model(path, result.model, model)
        if grids is not None and len(result.grids) != len(grids):
            raise UsageError(
                f"--from {path} has {len(result.grids)} scales, but {model} has {len(grids)} here; "
                "tune at a --resolution with the same number of scales"
            )
        keys = [key for key in dict.fromkeys([*result.picks.values(), *result.front]) if key != result.baseline.key]
        found = [StageSchedule.from_dict(result.candidate(key).schedule) for key in keys]
        if not found:
            raise UsageError(f"--from {path} found only the full schedule; leave out --from")
    else:
        profile = Profile.load(path)
        _check_model(path, profile.model.name, model)
        found = [profile.schedule]
    return {f"from-{number}": schedule for number, schedule in enumerate(found, 1)}


def _check_model(path: Path, found: str, model: str) -> None:
    if found != model:
        raise UsageError(f"--from {path} is of model {found!r}, not {model!r}")
