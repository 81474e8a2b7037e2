"""What to try next: Optuna's ask and tell, with a journal on local disk. The only module that imports optuna.

Every completed trial has all constraints (the Gaussian process rejects a mixture). Trials that a dead driver left running
are told from the evidence if there is any, else failed and enqueued again, at most twice.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from stagevar.errors import InfrastructureError, UsageError, reason_of
from stagevar.files import write_text_atomically
from stagevar.prompts.seeds import in_32_bits
from tuner.config.parameters import Parameter, Value
from tuner.config.space import SearchSpace
from tuner.results.run_dir import JOURNAL_FILE

SAMPLERS = ("auto", "gp", "tpe", "random")
#: How often a trial that crashes its driver is tried in total.
ATTEMPTS = 3
STARTUP_TRIALS = 8
#: Trials after which the Gaussian process hands over to TPE, since its cost grows with their cube.
GP_TRIALS = 200
#: Holds the study's name in a database.
STUDY_NAME_FILE = "study.name"
_STUDY = "stagevar"
_PRESET, _ATTEMPT, _STARTED, _PROMPTS = "preset", "attempt", "started", "prompts"


@dataclass(frozen=True)
class Proposal:
    """Values to try under a trial number; `preset` is the enqueued schedule that it stands for, else None."""

    trial: int
    values: dict[str, Value]
    preset: str | None = None


@dataclass(frozen=True)
class TrialOutcome:
    """A finished trial: latency_ms (less is better), quality (more is better) and every constraint (<= 0 is kept).

    `prompts` is how many the quality was estimated from, kept with the trial.
    """

    latency_ms: float
    quality: float
    constraints: Mapping[str, float]
    prompts: int | None = None


def _needs_storage(method: Any) -> Any:
    """Wraps a method that reads or writes trials: a database that is away raises InfrastructureError."""

    @functools.wraps(method)
    def reaching(self: TrialSampler, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except Exception as error:
            if not self.in_database or not _is_away(error):
                raise
            raise InfrastructureError(
                f"the database of --storage does not answer ({reason_of(error)}); once it does, the same command resumes"
            ) from None

    return reaching


def _is_away(error: BaseException | None) -> bool:
    """Whether an error comes from an unreachable database; Optuna wraps what SQLAlchemy raised."""
    while error is not None:
        module, kind = type(error).__module__, type(error).__name__
        away = kind in ("OperationalError", "InterfaceError", "InternalError") or "Timeout" in kind
        if kind == "StorageInternalError" or (module.startswith("sqlalchemy") and away):
            return True
        error = error.__cause__ or error.__context__
    return False


class TrialSampler:
    """One study's asks and tells.

    Args:
        run_dir: where the journal is, or will be.
        constraints: names that every tell must include.
        sampler: "auto" (Gaussian process, then TPE), or one of SAMPLERS throughout.
        storage: URL of a database instead of the journal; each run directory is a separate study there.

    Attributes:
        ask_seconds: one entry per ask.
        in_database: whether trials are in a database; methods raise InfrastructureError if it is away.
    """

    def __init__(
        self,
        run_dir: Path,
        space: SearchSpace,
        seed: int,
        constraints: Sequence[str],
        sampler: str = "auto",
        storage: str | None = None,
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.space, self.seed, self.constraints, self.kind = space, seed, tuple(constraints), sampler
        self.ask_seconds: list[float] = []
        self.in_database = storage is not None
        self._distributions = {p.name: _distribution(p) for p in space.parameters}
        self.study = optuna.create_study(
            storage=_database(storage, (run_dir / STUDY_NAME_FILE).exists())
            if storage
            else JournalStorage(JournalFileBackend(str(run_dir / JOURNAL_FILE))),
            study_name=_name_in_database(run_dir, space) if storage else _STUDY,
            directions=["minimize", "maximize"],
            load_if_exists=True,
        )
        # A resumed sampler gets another random seed, or it would propose its first trials again.
        self._rng_seed = in_32_bits(seed + 1_000_003 * len(self.study.get_trials(deepcopy=False)))
        self._samplers = {
            "gp": lambda: optuna.samplers.GPSampler(seed=self._rng_seed, n_startup_trials=STARTUP_TRIALS),
            "tpe": lambda: optuna.samplers.TPESampler(
                seed=self._rng_seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
            ),
            "random": lambda: optuna.samplers.RandomSampler(seed=self._rng_seed),
        }
        self._built: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------------ start and resume

    @_needs_storage
    def enqueue(self, presets: Mapping[str, Mapping[str, Value]]) -> None:
        """Queues presets at their nearest values, except those that an earlier driver queued."""
        known = {t.user_attrs.get(_PRESET) for t in self.study.get_trials(deepcopy=False)}
        for name, values in presets.items():
            if name not in known:
                self.study.enqueue_trial(self._raw(values), user_attrs={_PRESET: name, _ATTEMPT: 1})

    @_needs_storage
    def again(self, proposals: Sequence[Proposal]) -> None:
        """Queues trials again that an earlier driver could not measure."""
        for proposal in proposals:
            attrs = {_ATTEMPT: 1, **({_PRESET: proposal.preset} if proposal.preset else {})}
            self.study.enqueue_trial(self._raw(proposal.values), user_attrs=attrs)

    @_needs_storage
    def recover(self, evidence: Mapping[int, TrialOutcome | None]) -> list[Proposal]:
        """Settles the trials that a dead driver left running; returns those that are given up after ATTEMPTS.

        `evidence` is what `trials.jsonl` holds, by trial number; None for a trial recorded as failed.
        """
        given_up = []
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.number in evidence:
                outcome = evidence[frozen.number]
                trial = Trial(self.study, frozen._trial_id)
                if outcome is None:
                    self.study.tell(trial, state=TrialState.FAIL)
                else:
                    self._tell(trial, outcome)
                continue
            self.study.tell(frozen.number, state=TrialState.FAIL)
            attempt = frozen.user_attrs.get(_ATTEMPT, 1)
            preset = frozen.user_attrs.get(_PRESET)
            # Killed between creating the trial and drawing all its values: nothing was tried yet.
            fixed = frozen.system_attrs.get("fixed_params", {})
            if frozen.params.keys() != self._distributions.keys() and not fixed:
                continue
            if not frozen.user_attrs.get(_STARTED):
                attempt -= 1  # asked ahead, but never begun: not its fault
            if attempt >= ATTEMPTS:
                given_up.append(Proposal(frozen.number, self._values(frozen.params), preset))
                continue
            attrs = {_ATTEMPT: attempt + 1, **({_PRESET: preset} if preset else {})}
            self.study.enqueue_trial(fixed or frozen.params, user_attrs=attrs)
        return given_up

    # ------------------------------------------------------------------------------------------------ ask and tell

    @property
    def proposes(self) -> str:
        """Who proposes next: "gp", "tpe" or "random"."""
        if self.kind != "auto":
            return self.kind
        done = len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        return "gp" if done < GP_TRIALS else "tpe"

    @_needs_storage
    def ask(self, random: bool = False) -> Proposal:
        """The next trial: a queued one first, else the sampler's, which takes running trials into account.

        With `random`, a uniform draw instead, for when the sampler repeats itself.
        """
        start = time.perf_counter()
        self.study.sampler = self._sampler("random" if random else self.proposes)
        with _one_torch_thread():
            trial = self.study.ask(self._distributions)
        self.ask_seconds.append(time.perf_counter() - start)
        return Proposal(trial.number, self._values(trial.params), trial.user_attrs.get(_PRESET))

    @_needs_storage
    def tell(self, number: int, outcome: TrialOutcome) -> None:
        """Finishes a trial. Raises ValueError if a constraint is missing: one trial without it would spoil the model."""
        self._tell(Trial(self.study, self._id(number)), outcome)

    @_needs_storage
    def fail(self, number: int) -> None:
        """Finishes a trial that has no values."""
        self.study.tell(number, state=TrialState.FAIL)

    @_needs_storage
    def begin(self, numbers: Sequence[int]) -> None:
        """Notes that evaluation of these trials starts: if the driver dies from now on, they may be why."""
        for number in numbers:
            Trial(self.study, self._id(number)).set_user_attr(_STARTED, True)

    @_needs_storage
    def withdraw(self, number: int) -> None:
        """Withdraws an ask that will not be evaluated; it comes first when the study resumes."""
        frozen = self.study._storage.get_trial(self._id(number))
        self.study.tell(number, state=TrialState.FAIL)
        kept = {name: frozen.user_attrs[name] for name in (_PRESET, _ATTEMPT) if name in frozen.user_attrs}
        self.study.enqueue_trial(frozen.system_attrs.get("fixed_params") or frozen.params, user_attrs=kept)

    def load(self) -> None:
        """Has the Gaussian process import and compile what it needs, which takes seconds, before it is asked."""
        if self.proposes != "gp":
            return
        trial = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=0, n_startup_trials=2))
        trial.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=3)

    def close(self) -> None:
        """Frees nothing; a sampler in its own process does."""

    def hand_over(self) -> None:
        """Lets TPE propose from now on."""
        self.kind = "tpe"

    @_needs_storage
    def completed(self) -> set[int]:
        """Numbers of the trials that were told."""
        return {t.number for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}

    def _tell(self, trial: Trial, outcome: TrialOutcome) -> None:
        if set(outcome.constraints) != set(self.constraints):
            raise ValueError(f"constraints {sorted(outcome.constraints)} told, {sorted(self.constraints)} expected")
        known = trial.storage.get_trial_system_attrs(trial._trial_id)
        for name, value in outcome.constraints.items():
            if f"constraints:{name}" not in known:
                trial.set_constraint(name, value)
        if outcome.prompts is not None:
            trial.set_user_attr(_PROMPTS, outcome.prompts)
        self.study.tell(trial, [outcome.latency_ms, outcome.quality])

    def _id(self, number: int) -> int:
        return self.study._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)

    def _sampler(self, kind: str) -> Any:
        if kind not in self._built:  # each continues with its own random numbers when it is asked again
            self._built[kind] = self._samplers[kind]()
        return self._built[kind]

    def _raw(self, values: Mapping[str, Value]) -> dict[str, Any]:
        return {p.name: p.encode(values[p.name]) for p in self.space.parameters}

    def _values(self, raw: Mapping[str, Any]) -> dict[str, Value]:
        return {p.name: p.decode(raw[p.name]) for p in self.space.parameters if p.name in raw}


def _database(url: str, known: bool) -> optuna.storages.RDBStorage:
    """A database of studies. Raises UsageError that says what is missing.

    If this run has used it before (`known`) and it cannot be reached, raises InfrastructureError instead.
    """
    try:
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except ImportError:
            raise
        except Exception:
            # If two drivers create the tables of an empty database, one of them fails; now the tables exist.
            return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise UsageError(
            f"--storage {url} needs a driver ({error}); for PostgreSQL: pip install 'psycopg[binary]' and "
            "postgresql+psycopg://HOST/DB"
        ) from None
    except Exception as error:  # SQLAlchemy, its drivers and Optuna have no common base class
        if known:
            raise InfrastructureError(
                f"--storage {url} does not answer ({reason_of(error)}); once it does, the same command resumes"
            ) from None
        raise UsageError(
            f"--storage {url} cannot be opened: {reason_of(error)}; example: sqlite:////data/studies.db"
        ) from None


def _name_in_database(run_dir: Path, space: SearchSpace) -> str:
    """The run's name among a team's studies, created once and kept in the run directory."""
    path = run_dir / STUDY_NAME_FILE
    if not path.exists():
        write_text_atomically(path, f"{space.model} {run_dir.name} {uuid.uuid4().hex[:8]}\n")
    return path.read_text(encoding="utf-8").strip()


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """One torch thread: with other work running, the Gaussian process's small matrices are several times slower on more."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.values)
    if parameter.kind == "ordered":
        return IntDistribution(0, len(parameter.values) - 1)
    if parameter.kind == "int":
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
