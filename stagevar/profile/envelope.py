"""Where figures were measured: what a profile records, and what this process has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from stagevar.errors import ProfileError
from stagevar.profile.sections import CardSection
from stagevar.sections import section_data

if TYPE_CHECKING:
    from stagevar.card_state import CardState
    from stagevar.models.base import LoadedModel


#: `stagevar.choices.ENGINES`, as a type.
EngineName = Literal["eager", "compiled", "graph", "graph-compiled", "graph-kernels"]


@dataclass(frozen=True)
class Envelope:
    """Where the figures were measured and hold.

    Attributes:
        card: None on a CPU, without NVML, and in older profiles.
    """

    device: str
    dtype: str
    batch: int
    engine: EngineName
    threads: int | None
    torch: str
    card: CardSection | None = None

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ProfileError(f"envelope.{name} {value} must be at least 1")

    def differences(self, other: Envelope) -> list[str]:
        """What differs between this (measured) and another (present) envelope, one phrase each."""
        names = (f.name for f in dataclasses.fields(self) if f.name != "card")
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        found = [f"{name} {there!r} instead of {here!r}" for name, here, there in pairs if here != there]
        known = self.card is not None and other.card is not None
        return [*found, *(self.card.differences(other.card) if known else ())]  # type: ignore[union-attr,arg-type]

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "card"}
        return data if self.card is None else {**data, "card": section_data(self.card)}


def present_envelope(model: LoadedModel, batch: int, threads: int | None, engine: str = "eager") -> Envelope:
    """The envelope of this process for a model. `threads` is what latency was or will be measured with (CPU)."""
    import torch

    from stagevar.card_state import read_card

    card = None
    if model.device.type == "cuda":
        device, threads = torch.cuda.get_device_name(model.device), None
        state = read_card(model.device)
        card = None if state is None else card_section(state)
    else:
        device = model.device.type
    dtype = str(model.dtype).removeprefix("torch.")
    return Envelope(device, dtype, batch, cast(EngineName, engine), threads, str(torch.__version__), card)


def card_section(state: CardState) -> CardSection:
    """What an envelope keeps of a reading."""
    return CardSection(**{f.name: getattr(state, f.name) for f in dataclasses.fields(CardSection)})
