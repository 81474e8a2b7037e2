"""Tuning from Python: the shell command as a function, and its run as an object.

    result = tune("nano", budget="75%", trials=20)
    result.profile, result.pareto, result.trials, result.report

Options are those of `stagevar-tune`, with underscores. Checks, run directories and identities are the same too: a study
that was started in a shell continues here with the same options, and vice versa.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagevar import extras
from stagevar.errors import UsageError, did_you_mean
from tuner.cli import tune as tune_command
from tuner.cli.command import NEEDED
from tuner.cli.plan import plan
from tuner.results.run_dir import STUDY_FILE

if TYPE_CHECKING:
    import pandas as pd

    from stagevar.profile import Profile
    from tuner.results.result import StudyResult

#: Options of the command that make no sense for a function: what it prints.
_NOT_HERE = ("help", "version", "json", "quiet", "verbose", "dry_run", "model", "budget", "out", "latency_budget")


@dataclass(frozen=True)
class Tuned:
    """A study and its run directory.

    Attributes:
        run_dir: holds profile.yaml, pareto.yaml, trials.csv, report.html and the evidence.
        study: everything that was measured and decided.
    """

    run_dir: Path
    study: StudyResult = field(repr=False)

    @property
    def verdict(self) -> str:
        """ "verified", "inconclusive", "infeasible" ...: docs/verdicts.md says what each claims."""
        return self.study.verdict

    @property
    def verified(self) -> bool:
        """Whether the profile's limits were all proved."""
        return self.profile is not None and self.profile.verified

    @cached_property
    def profile(self) -> Profile | None:
        """What to deploy, the same as profile.yaml; None if the study picked nothing."""
        from tuner.report.export import profile_of

        return None if self.study.pick is None else profile_of(self.study, self.study.pick)

    @cached_property
    def pareto(self) -> list[Profile]:
        """A profile for each measured schedule that no other one beats in both latency and quality, fastest first.

        Each says in `verified` whether its own limits were proved.
        """
        from tuner.report.export import profile_of
        from tuner.report.words import latency_of

        front = [self.study.candidate(key) for key in self.study.front]
        # The front is ordered by what the search saw; finalists carry what verification measured.
        shown = [(latency.median_ms, one) for one in front if (latency := latency_of(self.study, one)) is not None]
        return [profile_of(self.study, one) for _, one in sorted(shown, key=lambda pair: pair[0])]

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row per schedule, the full one first; columns as in trials.csv."""
        from tuner.report.export import trials_frame

        return trials_frame(self.study)

    @property
    def report(self) -> Path:
        """report.html."""
        return self.run_dir / "report.html"

    def __str__(self) -> str:
        return f"{self.verdict.replace('_', ' ')}: {self.study.reason}"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.verdict.replace('_', ' '))}</b>: {html.escape(self.study.reason)}</p>"


def tune(
    model: str, budget: str, *, out: str | os.PathLike[str] | None = None, progress: bool = True, **options: Any
) -> Tuned:
    """Runs a study, or continues the one that these options started.

    Args:
        model: a registered model, such as "nano" or "infinity-8b".
        budget: latency of one image: "2s", "800ms", or "60%" of the measured full schedule.
        out: run directory, outputs/MODEL-BUDGET-sSEED by default.
        progress: whether to show progress on stderr: a bar on a terminal, a few plain lines elsewhere.
        options: any option of `stagevar-tune`: trials=20, time_budget="10m", max_drop="2%", seed=1, executor="ray" ...
            A switch is True or False; max_drop may map metrics to limits; None keeps an option's default.

    Returns:
        The result, whatever the verdict.

    Raises:
        UsageError: for an option or value that the command would refuse with exit code 2.
        StagevarError: where the command would end with another error code, such as 6.
        KeyboardInterrupt: after a second Ctrl-C; the same call resumes.
    """
    extras.require("tune", *NEEDED)
    words = [*_pair("--model", model), *_pair("--budget", budget), *_words(options)]
    words += [] if out is None else _pair("--out", os.fspath(out))
    words += [] if progress else ["--quiet"]
    checked = plan(tune_command.build_parser().parse(words), words)
    study, _ = tune_command.carry_out(checked)
    return Tuned(checked.run_dir, study)


def open_run(run_dir: str | os.PathLike[str]) -> Tuned:
    """Opens the result of an earlier study, run from Python or a shell.

    Args:
        run_dir: its run directory.

    Returns:
        The study as `tune` returned it.

    Raises:
        UsageError: if the directory holds no finished study.
    """
    from tuner.results.result import StudyResult

    run_dir = Path(run_dir)
    if not (run_dir / STUDY_FILE).is_file():
        raise UsageError(f"{run_dir} holds no finished study (no {STUDY_FILE})")
    return Tuned(run_dir, StudyResult.load(run_dir))


def _words(options: Mapping[str, object]) -> list[str]:
    """Keyword arguments as command-line words. Raises UsageError naming an unknown option."""
    actions = {action.dest: action for action in tune_command.build_parser()._actions if action.dest not in _NOT_HERE}
    words = []
    for name, value in options.items():
        if name not in actions:
            raise UsageError(f"tune has no option {name!r}{did_you_mean(name, actions)}")
        flag = actions[name].option_strings[0]
        if actions[name].nargs == 0:
            if not isinstance(value, bool | None):
                raise UsageError(f"option {name} is {value!r:.60}, but it is a switch; use True or False")
            words += [flag] if value else []
            continue
        for one in _values(value):
            words += _pair(flag, one)
    return words


def _pair(flag: str, value: Any) -> list[str]:
    """An option as a shell user types it, so that both give the same command; joined by = if the value starts with -."""
    return [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]


def _values(value: Any) -> Sequence[Any]:
    """One value for each time the option is repeated."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return [f"{key}={one}" for key, one in value.items()]
    return list(value) if isinstance(value, list | tuple) else [value]
