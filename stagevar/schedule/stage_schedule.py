"""Schedules are data: a few parameters that people set, which expand to one fully decided step per scale. No torch here.

A *scale* is one resolution step of the model; a *stage* groups scales. Only scales from `structure_end` on are
accelerated.
Two parameter sets that expand alike are the same schedule: compare `expand(...)` tuples, never parameters.

A schedule may hold one decision point (SkipVAR): after that scale every image takes one of finitely many static
continuations. Everything else is static.

Source: StageVAR (arXiv 2512.16483) for the stages, the branch cutoff and the ranks; sen-mao/FasterVAR for what its code
decides where the paper is silent; FastVAR (arXiv 2503.23367, csguoh/FastVAR) and SkipVAR (arXiv 2506.08908,
fakerone-li/SkipVAR) for their settings, carried here by position in the schedule instead of by grid width; FocusVAR
(aden9460/focusvar, no paper) for fusing the branches at an inner layer. Row selection (drawn or by norm), the trunk site,
the conditional branch and mixing the methods are our own knobs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagevar import plugins
from stagevar.errors import ScheduleError, did_you_mean, hint
from stagevar.schedule.grids import Grid
from stagevar.schedule.ranks import RankTable, rank, ratios_for_energy
from stagevar.schedule.steps import BOTH, Branch, Decision, LowRank, Pivotal, Plugged, Reduction, ScaleStep, Steps

#: How tokens are reduced where a schedule keeps fewer than all: not at all, by projection, by pruning.
ACCELERATORS = ("exact", "stagevar", "fastvar")
#: Group of entry points in which packages offer further ones (stagevar.accelerators.plugged).
PLUGGED_ACCELERATORS = "stagevar.accelerators"
#: The r tokens that stand for all: Gaussian mixtures, rows drawn by their squared norm, the rows of the largest norm.
PROJECTIONS = ("gaussian", "rows", "top")
#: Products of the blocks: in the model's precision, or in 8 bits (stagevar.models.precision).
PRECISIONS = ("model", "int8", "fp8")
#: Scales that a decision leaves open, at the end of the schedule (SkipVAR's published classes are 0 to 3).
UNDECIDED_SCALES = 3


def choose(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ScheduleError for a value that is none of the choices."""
    if value not in choices:
        raise ScheduleError(f"{name} {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")


def accelerator_names() -> tuple[str, ...]:
    """The ways to reduce tokens: the built-in ones, then those of plug-ins; imports none of them."""
    return (*ACCELERATORS, *plugins.offered(PLUGGED_ACCELERATORS, ACCELERATORS))


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"from {low} to {high}"
        raise ScheduleError(f"{name} {value!r} must be a whole number {span}")


def _ratio(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ScheduleError(f"{name} {value!r} must be above 0 and at most 1 (1 keeps every token)")


@dataclass(frozen=True)
class StageSchedule:
    """The parameters that people set.

    Attributes:
        structure_end: first accelerated scale; the number of scales if nothing is accelerated.
        semantic_end: first scale of the structure stage, at most structure_end; a label from the analysis.
        cfg_delay: scales after structure_end at which one branch is dropped; None keeps guidance throughout.
        branch: the branch that stays after the cutoff ("uncond" is the paper's null-prompt choice).
        fuse_layer: number of layers at the cutoff's scale that still run both branches; guidance then mixes them, and
            everything after that is conditional only. 0 drops the branch at the start of that scale.
        rank_ratios: share of the tokens kept at each accelerated scale, counted from structure_end + rank_delay. The
            last entry repeats, an entry may hold one value per chunk, and 1 keeps all tokens.
        energy: share of the energy to keep; the ratios are looked up instead of given.
        rank_delay: scales after structure_end at which tokens are first reduced.
        skip: indices of scales that are not run at all.
        projection, rope, site: see LowRank.
        accelerator: what reduces the tokens ("stagevar", "fastvar", a plug-in's name, or "exact" for no reduction): one
            for all reduced scales, or a list counted like rank_ratios. "fastvar" and plug-ins don't distinguish chunks;
            they use the mean of the ratios.
        layers: the [first, stop) layers that "fastvar" and plug-ins reduce; their cache is the last scale before that
            ran in full.
        decision: classifier that decides per image, three scales before the end, whether to skip scales or drop
            guidance.
        precision: of the blocks' matrix products from structure_end on: "model", "int8", or "fp8".
    """

    structure_end: int
    semantic_end: int = 0
    cfg_delay: int | None = None
    branch: Branch = "uncond"
    rank_ratios: tuple[float | tuple[float, ...], ...] | None = None
    energy: float | None = None
    rank_delay: int = 0
    projection: str = "gaussian"
    rope: str = "first"
    site: str = "chunk"
    skip: tuple[int, ...] = ()
    accelerator: str | tuple[str, ...] = "stagevar"
    layers: tuple[int, int] = (3, 28)
    decision: str | None = None
    precision: str = "model"
    fuse_layer: int = 0

    def __post_init__(self) -> None:
        _integer("structure_end", self.structure_end, 0)
        _integer("semantic_end", self.semantic_end, 0)
        if self.semantic_end > self.structure_end:
            raise ScheduleError(
                f"structure_end {self.structure_end} lies before semantic_end {self.semantic_end}; raise structure_end"
            )
        if self.cfg_delay is not None:
            _integer("cfg_delay", self.cfg_delay, 0)
        _integer("rank_delay", self.rank_delay, 0)
        _integer("fuse_layer", self.fuse_layer, 0)
        choose("branch", self.branch, BOTH)
        choose("projection", self.projection, PROJECTIONS)
        choose("rope", self.rope, ("first", "index"))
        choose("site", self.site, ("chunk", "trunk"))
        choose("precision", self.precision, PRECISIONS)
        if self.rank_ratios is not None and self.energy is not None:
            raise ScheduleError(f"rank_ratios and energy {self.energy} are both given; keep one")
        if self.energy is not None:
            _ratio("energy", self.energy)
        if self.rank_ratios is not None:
            if not isinstance(self.rank_ratios, list | tuple) or not self.rank_ratios:
                raise ScheduleError(f"rank_ratios {self.rank_ratios!r} must be a list of numbers above 0 and at most 1")
            entries = []
            for entry in self.rank_ratios:
                values = entry if isinstance(entry, list | tuple) else (entry,)
                for value in values:
                    _ratio("rank ratio", value)
                entries.append(tuple(map(float, entry)) if isinstance(entry, list | tuple) else float(entry))
            object.__setattr__(self, "rank_ratios", tuple(entries))
        if not isinstance(self.skip, list | tuple):
            raise ScheduleError(f"skip {self.skip!r} must be a list of scale indices")
        for scale in self.skip:
            _integer("skipped scale", scale, 0)
        object.__setattr__(self, "skip", tuple(sorted(set(self.skip))))
        if isinstance(self.accelerator, list | tuple):
            if not self.accelerator:
                raise ScheduleError(f"accelerator [] must name at least one of {', '.join(ACCELERATORS)}")
            object.__setattr__(self, "accelerator", tuple(self.accelerator))
        for name in self.accelerator if isinstance(self.accelerator, tuple) else (self.accelerator,):
            if name not in ACCELERATORS:
                choose("accelerator", name, accelerator_names())
        if not isinstance(self.layers, list | tuple) or len(self.layers) != 2:
            raise ScheduleError(f"layers {self.layers!r} must be two layer numbers, first and stop")
        first, stop = self.layers
        _integer("first layer", first, 0)
        _integer("stop layer", stop, first + 1)
        object.__setattr__(self, "layers", (first, stop))
        if self.decision is not None:
            if not isinstance(self.decision, str) or not self.decision:
                raise ScheduleError(f"decision {self.decision!r} must be a classifier's name or path")
            if self.cfg_delay is not None:
                raise ScheduleError(
                    f"decision {self.decision} and cfg_delay {self.cfg_delay} both drop a branch; keep one of them"
                )

        if self.fuse_layer and self.cfg_delay is None:
            raise ScheduleError(f"fuse_layer {self.fuse_layer} says where guidance ends; give a cfg_delay too")
        if self.fuse_layer and self.branch != "cond":
            raise ScheduleError(
                f"fuse_layer {self.fuse_layer} goes on with the conditional branch, not with {self.branch}; "
                "set branch to cond"
            )

    @property
    def cfg_cutoff(self) -> int | None:
        """First scale that runs one branch only, None when guidance stays."""
        return None if self.cfg_delay is None else self.structure_end + self.cfg_delay

    def expand(self, grids: Sequence[Grid], chunks: int, rank_table: RankTable | None = None) -> Steps:
        """One fully decided step per scale.

        Args:
            grids: token grid of each scale.
            chunks: number of block chunks in the model.
            rank_table: for `energy`; the published table by default.

        Raises:
            ScheduleError: if a parameter does not fit this model's scales.
        """
        scales = len(grids)
        if self.structure_end > scales:
            raise ScheduleError(f"structure_end {self.structure_end} is beyond the model's {scales} scales")
        if self.cfg_cutoff is not None and self.cfg_cutoff > scales:
            raise ScheduleError(
                f"cfg cutoff {self.cfg_cutoff} (structure_end + cfg_delay) is beyond the model's {scales} scales"
            )
        outside = [s for s in self.skip if s >= scales]
        if outside:
            raise ScheduleError(f"skipped scale {outside[0]} does not exist; the last one is {scales - 1}")
        if 0 in self.skip:
            raise ScheduleError("scale 0 cannot be skipped: nothing would start the image")
        if self.fuse_layer and (self.cfg_cutoff == scales or self.cfg_cutoff in self.skip):
            raise ScheduleError(
                f"fuse_layer {self.fuse_layer} is for scale {self.cfg_cutoff} (structure_end + cfg_delay), which is not run"
            )
        steps: list[ScaleStep] = []
        for scale, grid in enumerate(grids):
            full = [s.scale for s in steps if s.reduction is None and not s.skipped]
            step = self._step(scale, (grid[0], grid[1]), chunks, rank_table, full[-1] if full else 0)
            if isinstance(step.reduction, Pivotal):
                cache = step.reduction.cache_scale
                steps[cache] = dataclasses.replace(steps[cache], keeps=step.reduction.layers)
            steps.append(step)
        return tuple(steps) if self.decision is None else self._with_decision(steps)

    def _with_decision(self, steps: list[ScaleStep]) -> Steps:
        """The same steps, the one before the last three choosing between all continuations."""
        point = len(steps) - 1 - UNDECIDED_SCALES
        if point < 1:
            raise ScheduleError(f"a decision needs at least {UNDECIDED_SCALES + 2} scales; the model has {len(steps)}")
        if steps[point].skipped:
            raise ScheduleError(f"skipped scale {point} is where the decision looks at the image; run it")
        late = tuple(steps[point + 1 :])
        outcomes = [("full", late)]
        for count in range(1, UNDECIDED_SCALES + 1):
            kept, last = late[:-count], late[-count:]
            skipped = tuple(ScaleStep(s.scale, s.grid, (), None, True, s.stage) for s in last)
            outcomes.append((f"skip{count}", kept + skipped))
        for count in range(1, UNDECIDED_SCALES + 1):
            kept, last = late[:-count], late[-count:]
            alone = tuple(s if s.skipped else dataclasses.replace(s, branches=("cond",)) for s in last)
            outcomes.append((f"cond{count}", kept + alone))
        steps[point] = dataclasses.replace(steps[point], decision=Decision(self.decision or "", tuple(outcomes)))
        return tuple(steps)

    def _step(
        self, scale: int, grid: Grid, chunks: int, rank_table: RankTable | None, last_full_scale: int
    ) -> ScaleStep:
        if scale < self.semantic_end:
            stage = "semantic"
        else:
            stage = "structure" if scale < self.structure_end else "fidelity"
        if scale in self.skip:
            return ScaleStep(scale, grid, (), None, True, stage)
        fuse_layer = self.fuse_layer if scale == self.cfg_cutoff else 0
        alone = self.cfg_cutoff is not None and scale >= self.cfg_cutoff and not fuse_layer
        branches = (self.branch,) if alone else BOTH
        reduction = self._reduction(scale, grid, chunks, rank_table, last_full_scale)
        if fuse_layer and isinstance(reduction, LowRank):
            raise ScheduleError(
                f"scale {scale} fuses the branches at layer {fuse_layer}, but projection leaves them on different tokens; "
                "raise rank_delay, or use fastvar, which restores them before every layer"
            )
        precision = self.precision if stage == "fidelity" else "model"
        return ScaleStep(scale, grid, branches, reduction, False, stage, precision=precision, fuse_layer=fuse_layer)

    def _accelerator(self, position: int) -> str:
        if isinstance(self.accelerator, str):
            return self.accelerator
        return self.accelerator[min(position, len(self.accelerator) - 1)]

    def _reduction(
        self, scale: int, grid: Grid, chunks: int, rank_table: RankTable | None, last_full_scale: int
    ) -> Reduction | None:
        start = self.structure_end + self.rank_delay
        if scale < start or scale == 0 or (self.rank_ratios is None and self.energy is None):
            return None
        accelerator = self._accelerator(scale - start)
        if accelerator == "exact":
            return None
        tokens = grid[0] * grid[1]
        if self.energy is not None:
            ratios = ratios_for_energy(self.energy, tokens, chunks, rank_table)
        else:
            assert self.rank_ratios is not None
            entry = self.rank_ratios[min(scale - start, len(self.rank_ratios) - 1)]
            ratios = entry if isinstance(entry, tuple) else (entry,) * chunks
            if len(ratios) != chunks:
                raise ScheduleError(
                    f"{len(ratios)} rank ratios at scale {scale} do not fit the model's {chunks} chunks"
                )
        if all(ratio == 1 for ratio in ratios):
            return None
        if accelerator != "stagevar":
            where = kept_tokens(sum(ratios) / len(ratios), tokens), self.layers, last_full_scale
            return Pivotal(*where) if accelerator == "fastvar" else Plugged(*where, accelerator)
        if self.site == "trunk":
            ratios = (sum(ratios) / len(ratios),)
        return LowRank(tuple(rank(r, tokens) for r in ratios), self.projection, self.rope, self.site)

    def to_dict(self) -> dict[str, object]:
        """Plain YAML data, every parameter stated."""
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Any) -> StageSchedule:
        """The inverse of `to_dict`. Raises ScheduleError naming an unknown or missing key."""
        if not isinstance(data, Mapping):
            raise ScheduleError(f"a schedule must be a mapping, not {type(data).__name__}")
        names = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in names:
                raise ScheduleError(f"unknown schedule parameter {key!r}{hint(key, names)}")
        if "structure_end" not in data:
            raise ScheduleError("structure_end is missing from the schedule")
        return cls(**data)


def kept_tokens(ratio: float, tokens: int) -> int:
    """Tokens that FastVAR keeps: all but floor(tokens * pruned share), at least one."""
    # Rounded first: 1 - 0.9 falls just short of 0.1, and floor would keep one token more than the stated share.
    return max(1, tokens - int(round(tokens * (1 - ratio), 6)))


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
