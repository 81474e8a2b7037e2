"""The deployment profile: what tuning proved, in one YAML file that the runtime loads in production.

A profile is data from outside: it is parsed with the safe loader, without aliases, every key is checked, and its expanded
steps must equal what its parameters expand to on the model at hand. Loading it for another model is refused; loading it
outside the envelope in which it was measured warns.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from stagevar.choices import check_engine, check_threads
from stagevar.errors import ProfileError, StagevarError, UsageError, hint
from stagevar.files import write_text_atomically
from stagevar.models.request import ModelRequest
from stagevar.profile.envelope import Envelope
from stagevar.profile.sections import (
    BaselineSection,
    ConstraintsSection,
    EngineSection,
    LatencySection,
    ModelSection,
    ProvenanceSection,
    QualitySection,
    SamplingSection,
    TextSection,
)
from stagevar.profile.step_data import StepData, steps_to_data
from stagevar.schedule import StageSchedule, Steps
from stagevar.sections import plain, read_section, read_value, section_data, shortened, shown
from stagevar.yaml_files import read_yaml

if TYPE_CHECKING:
    from stagevar.models.base import LoadedModel
    from stagevar.profile.pipeline import Pipeline

SCHEMA = "stagevar-profile/1"

#: The typed sections of a profile, by key.
SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "sampling": SamplingSection,
    "latency": LatencySection,
    "quality": QualitySection,
    "baseline": BaselineSection,
    "constraints": ConstraintsSection,
    "provenance": ProvenanceSection,
    "engine": EngineSection,
}


@dataclass(frozen=True)
class Profile:
    """One schedule with its evidence.

    A section may be given as a mapping, which is checked and converted; ProfileError names whatever does not fit.

    Attributes:
        model: which model, and the options that load it.
        schedule: the parameters.
        steps: their expansion as plain data, for readers and as a checksum.
        sampling: the settings used while measuring.
        envelope: where it was measured.
        verified: whether every constraint was proved.
        verdict: one sentence.
        latency, quality, baseline, constraints: measured figures with intervals.
        reproduce: the command that produced it.
        provenance: versions, hashes and dates.
        engine: which engine runs it, and why; None in profiles from before there was a choice.
    """

    model: ModelSection
    schedule: StageSchedule
    steps: list[StepData]
    sampling: SamplingSection
    envelope: Envelope
    verified: bool
    verdict: str
    latency: LatencySection = field(default_factory=LatencySection)
    quality: QualitySection = field(default_factory=QualitySection)
    baseline: BaselineSection = field(default_factory=BaselineSection)
    constraints: ConstraintsSection = field(default_factory=ConstraintsSection)
    reproduce: str = ""
    provenance: ProvenanceSection = field(default_factory=ProvenanceSection)
    engine: EngineSection | None = None
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        for name, kind in SECTIONS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                object.__setattr__(self, name, read_section(kind, plain(value), name))

    # ------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML data, schema first."""
        data: dict[str, object] = {"schema": self.schema}
        for name in (f.name for f in dataclasses.fields(self) if f.name != "schema"):
            value = getattr(self, name)
            if name in SECTIONS and value is not None:
                data[name] = section_data(value)
            elif value is not None:
                data[name] = value.to_dict() if name == "schedule" else value
        data = plain({**data, "envelope": self.envelope.to_dict()})
        return data

    def save(self, path: str | os.PathLike[str], *, json_schema: str | None = None) -> None:
        """Writes the profile atomically.

        Args:
            path: of the YAML file.
            json_schema: address of its JSON Schema, which editors read from the first line.
        """
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)
        first = "" if json_schema is None else f"# yaml-language-server: $schema={json_schema}\n"
        write_text_atomically(path, first + text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads a profile.

        Raises:
            ProfileError: in one line, if the file is unreadable, foreign, hostile or inconsistent.
        """
        try:
            return cls.from_dict(read_yaml(path, "profile"))
        except ProfileError as error:
            raise ProfileError(str(error) if str(path) in str(error) else f"profile {path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """Checks plain data key by key and type by type."""
        if not isinstance(data, dict) or not isinstance(data.get("schema"), str):
            raise ProfileError("not a stagevar profile (no schema key)")
        if data["schema"] != SCHEMA:
            raise ProfileError(f"schema {shown(data['schema'])} is not supported; this version reads {SCHEMA!r}")
        data = _checked(cls, data, "profile")
        for name, kind in SECTIONS.items():
            if name in data:
                data[name] = read_section(kind, data[name], name)
        for name, kind in (("verified", bool), ("verdict", str), ("reproduce", str)):
            data[name] = read_value(kind, data.get(name, ""), name)
        read_value(tuple[Mapping[str, object], ...], data["steps"], "steps")
        data["envelope"] = read_section(Envelope, data["envelope"], "envelope")
        read_value(Any, data["schedule"], "schedule")
        try:
            data["schedule"] = StageSchedule.from_dict(data["schedule"])
        except StagevarError as error:
            raise ProfileError(shortened(error)) from None
        profile = cls(**data)
        profile._check_verified()
        return profile

    def _check_verified(self) -> None:
        """Raises ProfileError if the profile claims to be verified although one of its own verdicts says otherwise."""
        for verdict in self.constraints.verdicts if self.verified else ():
            if verdict.status != "met":
                raise ProfileError(
                    f"verified is true, but the verdict of {shown(verdict.name)} is {verdict.status}; it was edited by hand"
                )

    # ------------------------------------------------------------ use

    def expand(self, model: LoadedModel) -> Steps:
        """The decided steps on this model.

        Raises:
            ProfileError: if the profile is for another model, or its steps are not what its parameters expand to here.
        """
        if self.model.name != model.name:
            raise ProfileError(f"the profile is for model {shown(self.model.name)}, not {model.name!r}")
        if self.model.pixels and self.model.pixels != tuple(model.pixels):
            here, there = ("x".join(map(str, pixels)) for pixels in (model.pixels, self.model.pixels))
            raise ProfileError(f"the profile is for images of {there} pixels, not {here}; leave out --resolution")
        self._check_weights(model)
        self._check_text(model)
        try:
            steps = self.schedule.expand(model.grids, len(model.transformer.chunk_layers))
        except StagevarError as error:
            raise ProfileError(shortened(error)) from None
        if steps_to_data(steps) != plain(self.steps):
            raise ProfileError("its steps are not what its schedule expands to on this model; it was edited by hand")
        return steps

    def _check_weights(self, model: LoadedModel) -> None:
        """Compares contents, part by part. Older profiles name files instead of parts; those names are ignored."""
        here = model.provenance.get("weights") or {}
        files = {*here.values(), *model.provenance.get("weight_files", ())}
        for part, digest in self.model.weights.items():
            if digest == here.get(part) or (part not in here and digest in files):
                continue
            now = here.get(part, "not among those loaded")
            raise ProfileError(f"the profile was made with other weights: {part:.99} is {now}, not {digest:.99}")

    def _check_text(self, model: LoadedModel) -> None:
        """Compares text encoders like weights: another one draws other images. Older profiles record none."""
        recorded, loaded = self.model.text, model.provenance.get("text")
        if recorded is None:
            return
        if loaded is None:
            raise ProfileError(
                f"the profile was made with the text encoder {recorded!s:.99}, but none was loaded; give --text"
            )
        if recorded.same_as(here := TextSection.of(loaded)) is False:
            raise ProfileError(
                f"the profile was made with another text encoder: {here!s:.99} is loaded, not {recorded!s:.99}; give --text"
            )

    def differences(self, model: LoadedModel, present: Envelope) -> list[str]:
        """How a loaded model and its place differ from what the profile was measured under, one phrase each."""
        found = self.envelope.differences(present)
        kv_cache = self.model.load.kv_cache or "model"
        if model.kv_cache != kv_cache:
            found.append(f"kv_cache {model.kv_cache!r} instead of {kv_cache!r}")
        recorded, loaded = self.model.text, model.provenance.get("text")
        if recorded is not None and loaded is not None and recorded.same_as(here := TextSection.of(loaded)) is None:
            # Nothing says whether the files are those of the repository.
            found.append(f"text encoder {here!s:.99} instead of {recorded!s:.99}")
        return found + self.sampling.differences(model.sampling)

    def warnings_here(self, model: LoadedModel, present: Envelope) -> list[str]:
        """One line if nothing was verified, with the verdict, and one for each of the `differences`."""
        told = [] if self.verified else [self._unverified()]
        return told + [f"outside the measured envelope: {text}" for text in self.differences(model, present)]

    def _unverified(self) -> str:
        why = self.quality.why if self.quality.measured is False and self.quality.why else self.verdict
        why = " ".join(why.split()) or "the profile has no verdict"
        return why if why.lower().startswith("not verified") else f"not verified: {why}"

    def pipeline(
        self,
        device: str = "auto",
        *,
        engine: str = "auto",
        batch: int = 0,
        threads: int | None = None,
        **load_options: Any,
    ) -> Pipeline:
        """Loads the model and returns a pipeline that draws images with this schedule.

        Args:
            device: "auto", "cpu" or "cuda".
            engine, batch, threads: used instead of the profile's own.
            load_options: passed to `load_model`.

        Raises:
            UsageError: before anything is loaded, for an unknown option or a value that cannot be used.

        Warns:
            UserWarning: if the profile is not verified, and for each difference from what it was measured under.
        """
        known = [f.name for f in dataclasses.fields(ModelRequest) if f.name not in ("name", "device")]
        for name in load_options:
            if name not in known:
                options = ["engine", "batch", "threads", *known]
                raise UsageError(f"unknown option {shown(name)} of a profile's pipeline{hint(name, options)}")
        request = ModelRequest(self.model.name, device=device, **load_options)
        return self.pipeline_of(request.over(self.model.request), engine=engine, batch=batch, threads=threads)

    def pipeline_of(
        self, request: ModelRequest, *, engine: str = "auto", batch: int = 0, threads: int | None = None
    ) -> Pipeline:
        """Like `pipeline`, for the model that a request describes, usually `request.over(profile.model.request)`."""
        from stagevar.models.registry import load_model, resolve
        from stagevar.profile.pipeline import Pipeline, check_numbers
        from stagevar.sampling.sampler import Sampler

        check_numbers(batch, threads)
        self.check_drawing(request)
        kind = resolve(request).device.type
        check_engine(engine, kind)
        if threads is not None:
            check_threads(threads, kind)
        model = load_model(request if request.schedule else dataclasses.replace(request, schedule=self.schedule))
        if engine != "auto":
            return Pipeline(self, Sampler(model, engine=engine), batch, threads)
        return Pipeline(self, Sampler(model, engine=self.engine_here(model.device.type)), batch, threads)

    def check_drawing(self, request: ModelRequest) -> None:
        """Raises ProfileError, before anything is loaded, if the requested weights would be random ones."""
        from stagevar.models.registry import find

        if self.model.random_weights:
            spec = find(request.name)
            only_given = bool(spec.parts) and spec.weights is None  # neither shipped nor public
            if request.weights == "random" or (request.weights is None and only_given):
                raise ProfileError(
                    f"the profile was measured on random weights of {request.name}, which draw no images; for images, give "
                    "--weights PATH of real weights"
                )
        elif request.weights == "random":
            raise ProfileError("random weights draw noise, not images; they are for latency work only")

    def engine_here(self, device: str) -> str:
        """The profile's engine, or "eager" with a warning on a kind of device that cannot run it."""
        engine = self.envelope.engine
        if device == "cuda" or not engine.startswith("graph"):
            return engine
        warnings.warn(f"engine {engine} needs a CUDA device, not {device}; falling back to engine eager", stacklevel=3)
        return "eager"


def _checked(cls: Any, data: dict[str, Any], what: str) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ProfileError(f"unknown key {shown(key)} in {what}{hint(shown(key), fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ProfileError(f"{name} is missing from the {what}")
    return dict(data)
