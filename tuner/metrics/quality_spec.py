"""What a search space says about one metric of the quality, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: What a file may say about a metric: its weight, or options including `weight` and `max_drop`.
Stated = float | Mapping[str, object]


@dataclass(frozen=True)
class QualitySpec:
    """One metric of the quality.

    Attributes:
        weight: in the composite; with 0 the metric is only reported.
        max_drop: largest allowed mean paired drop in the metric's unit, None if the space sets no limit.
        options: of the metric's class.
        stated: what the file says, to write it again.
    """

    weight: float = 1.0
    max_drop: float | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    stated: Stated | None = field(default=None, compare=False, repr=False)

    @classmethod
    def read(cls, stated: Stated) -> QualitySpec:
        """A spec from what a file says, with numbers already checked (tuner.config.space)."""
        if not isinstance(stated, Mapping):
            return cls(float(stated), stated=stated)
        known: dict[str, object] = {"weight": 1.0, "max_drop": None, **stated}
        weight, max_drop = known.pop("weight"), known.pop("max_drop")
        assert isinstance(weight, int | float) and isinstance(max_drop, int | float | None)
        return cls(float(weight), None if max_drop is None else float(max_drop), known, stated)

    def to_data(self) -> dict[str, object]:
        """The options of a metric as a search-space file lists them."""
        if self.stated is None:
            limit = {} if self.max_drop is None else {"max_drop": self.max_drop}
            return {"weight": self.weight, **limit, **self.options}
        return dict(self.stated) if isinstance(self.stated, Mapping) else {"weight": self.stated}


def read_quality(stated: Mapping[str, Stated]) -> dict[str, QualitySpec]:
    """Specs by metric from a file's checked contents: `{clip_score: 0.1, lpips: {weight: 0.5, net: vgg}}`."""
    return {metric: QualitySpec.read(value) for metric, value in stated.items()}
