"""What ties a run directory to one study: written when the study starts, compared when it resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from stagevar.errors import UsageError
from stagevar.files import write_text_atomically
from stagevar.profile.sections import EngineSection
from tuner.config.prompts import PromptSet
from tuner.config.quality import MetricLimit
from tuner.config.space import PromptSource, SearchSpace
from tuner.evaluation.evaluator import EvaluationInfo
from tuner.evaluation.store import Context, text_identity
from tuner.results.run_dir import CONFIG_FILE, EvidenceLog
from tuner.study.options import Options

_SEARCH_PROMPTS, _HELDOUT_PROMPTS = "search prompts", "held-out prompts"
#: Plain data by name, as written to config.json.
Identity: TypeAlias = dict[str, Any]


def identity_of(
    facts: EvaluationInfo,
    space: SearchSpace,
    prompts: Mapping[str, PromptSet],
    metrics: Sequence[MetricLimit],
    options: Options,
) -> Identity:
    """What must not change between the parts of one study; a resume compares it."""
    return {
        "seed": options.seed,
        "budget": options.budget.text,
        "max_drop": {m.metric: m.max_drop for m in metrics},
        "model": facts.model,
        "weights": facts.provenance.get("weights", "random" if facts.random_weights else None),
        **({} if (text := text_identity(facts)) is None else {"text encoder": text}),
        "pixels": facts.pixels,
        "device": facts.device,
        "engine": facts.engine,
        # Left out if the engine was eager, since all older runs drew eagerly.
        **({} if facts.heldout_engine == "eager" else {"held-out engine": facts.heldout_engine}),
        "sampling": facts.sampling,
        "space": {k: v for k, v in space.contents.items() if k != "proposals" or v},
        _SEARCH_PROMPTS: prompts["search"].digest,
        _HELDOUT_PROMPTS: prompts["heldout"].digest,
        "storage": options.storage,
        "savings": {name: getattr(options.shortcuts, name) for name in ("table", "rungs")},
    }


class RunConfig:
    """config.json of a run directory: the identity, the command, the engine choice, and how often the study was judged.

    Attributes:
        judged_on: number of held-out prompts of each judgment; known after `claim`.
    """

    def __init__(self, run_dir: Path, command: str):
        self.path, self.command = run_dir / CONFIG_FILE, command
        self.judged_on: tuple[int, ...] = ()

    def claim(
        self, identity: Identity, asked: PromptSource, heldout: PromptSet, engine_choice: EngineSection | None
    ) -> bool:
        """Writes the identity of a new run or compares that of an old one; returns whether the run is an old one.

        An old run may continue with more held-out prompts, if its own are the first of them; that becomes its identity.
        Raises UsageError that says what differs.
        """
        mine: Identity = json.loads(json.dumps(identity))
        if not self.path.exists():
            # Kept with the identity, so that a resumed run keeps its engine instead of comparing engines again.
            kept = {} if engine_choice is None else {"engine_choice": dataclasses.asdict(engine_choice)}
            self._write({"identity": mine, "command": self.command, "judged_on": [], **kept})
            return False
        config, had = self._read()
        theirs = config["identity"]
        new = json.loads(json.dumps(mine))
        for compared in (theirs, mine):
            # Where the prompts are and how they were requested does not matter: their contents are compared.
            for name in ("source", "added"):
                compared.get("space", {}).get("prompts", {}).pop(name, None)
        if "text encoder" not in theirs:  # an older run, which did not record it
            mine.pop("text encoder", None)
        differing = difference(theirs, mine)
        if not differing:
            return True
        if len(heldout) > had and heldout.first(had).digest == theirs.get(_HELDOUT_PROMPTS):
            theirs[_HELDOUT_PROMPTS] = mine[_HELDOUT_PROMPTS]
            theirs["space"]["prompts"]["heldout"] = mine["space"]["prompts"]["heldout"]
            differing = difference(theirs, mine)
            if not differing:
                self._write({**config, "identity": new, "command": self.command})
                return True
        run_dir = self.path.parent
        if asked.source == "geneval" and asked.heldout > had and not asked.added:
            raise UsageError(
                f"{run_dir} has {had} held-out prompts, whose order depends on their number; "
                f"write --heldout {had}+{asked.heldout - had} to add to them"
            )
        raise UsageError(_another(run_dir, differing))

    def note_context(self, context: Context, first: bool) -> None:
        """Writes what held-out results depend on, before they are judged, for studies that start from this one.

        If this is not the run's `first` verification and the earlier ones depend on something else, no code made them all.
        """
        config = json.loads(self.path.read_text())
        kept = config.get("quality_context", context if first else None)
        noted = context if kept == context else {**context, "code": "several versions"}
        if noted != config.get("quality_context"):
            self._write({**config, "quality_context": noted})

    def note_judged(self, judged_on: Sequence[int]) -> None:
        """Writes how many prompts each judgment of the run used; only then is the verdict reported."""
        config = json.loads(self.path.read_text())
        if list(judged_on) != config.get("judged_on", []):
            self._write({**config, "judged_on": list(judged_on)})

    def _read(self) -> tuple[Identity, int]:
        """The file's content and its number of held-out prompts. Raises UsageError if it is damaged."""
        try:
            config = json.loads(self.path.read_text())
            had = int(config["identity"]["space"]["prompts"]["heldout"])
            if "judged_on" not in config:  # an older run, which did not record this: its judgment still counts
                judged = any(record["kind"] == "verification" for record in EvidenceLog(self.path.parent).read())
                config["judged_on"] = [had] if judged else []
            self.judged_on = tuple(int(count) for count in config["judged_on"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{self.path} is damaged; start over with another --out, or with --fresh") from None
        return config, had

    def _write(self, config: Identity) -> None:
        write_text_atomically(self.path, json.dumps(config, indent=1) + "\n")


def check_asked(run_dir: Path, seed: int, budget: str) -> None:
    """Raises UsageError if `run_dir` holds a study with another seed or budget: what is known before a model is loaded.

    A damaged file is left to `RunConfig.claim`.
    """
    try:
        theirs = json.loads((run_dir / CONFIG_FILE).read_text())["identity"]
        differing = difference({name: theirs[name] for name in ("seed", "budget")}, {"seed": seed, "budget": budget})
    except (OSError, ValueError, KeyError, TypeError):
        return
    if differing:
        raise UsageError(_another(run_dir, differing))


def _another(run_dir: Path, differing: Sequence[str]) -> str:
    return f"{run_dir} holds another study: {'; '.join(differing[:3])}; choose another --out, or --fresh"


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two trees of plain data: one shortened phrase per leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in difference(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in difference(a, b, f"{path}[{i}]")]
    if path in (_SEARCH_PROMPTS, _HELDOUT_PROMPTS):
        return [f"{path} differ"]
    return [f"{path} was {_short(old)} and is {_short(new)}"]


def _short(value: Any) -> str:
    text = "not given" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
