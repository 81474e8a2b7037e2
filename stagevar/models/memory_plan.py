"""What is alive at once while schedules are tuned and timed, and how many of them a card holds together.

Timed schedules each keep a sampler of their own: the KV cache they are deployed with and, on a graph engine, the memory
pools of their recordings, which hold a scale's working memory and the decoder's. The one that runs also needs working memory,
which eager samplers share. The cache used for judging quality is freed before anything is timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagevar.models.memory import available_bytes, decoding_bytes, kv_cache_bytes, working_bytes
from stagevar.schedule import Steps

if TYPE_CHECKING:
    from stagevar.models.base import LoadedModel
    from stagevar.models.request import ModelRequest

#: Share of a card's memory that a study's micro-batch may need; metrics, references and kept scales need the rest.
CARD_SHARE = 0.8
#: Images that a study draws at once if there is room.
STUDY_BATCH = 4
#: Share of the free memory that is planned with; the rest is for fragmentation and what the estimates leave out.
USABLE = 0.9


@dataclass(frozen=True)
class TimedBytes:
    """Memory of schedules that are timed in turn.

    Attributes:
        kept: by name, what stays while the others run.
        working: what the one that runs needs in addition.
    """

    kept: Mapping[str, int]
    working: int

    def together(self, names: list[str]) -> int:
        """What these need when they are timed in turn."""
        return sum(self.kept[name] for name in names) + self.working

    def groups(self, room_bytes: int, sentinel: str | None) -> list[list[str]]:
        """The schedules in groups that fit the room, each with the sentinel first.

        A group of one (and the sentinel) that does not fit stays: it has to be tried. Without a sentinel there is one group.
        """
        others = [name for name in self.kept if name != sentinel]
        if sentinel is None or not others:
            return [list(self.kept)]
        found = [[sentinel]]
        for name in others:
            if len(found[-1]) > 1 and self.together([*found[-1], name]) > room_bytes:
                found.append([sentinel])
            found[-1].append(name)
        return found


def timed_bytes(
    transformer,
    tokenizer,
    schedules: Mapping[str, Steps],
    pixels: tuple[int, int],
    element: int,
    kv_cache: str,
    engine: str,
    batch: int = 1,
) -> TimedBytes:
    """What schedules need while they are timed in turn, `batch` images each.

    Args:
        transformer, tokenizer: the modules, of which only shapes are read.
        pixels: height and width.
        element: bytes of the blocks' precision.
        kv_cache: "model" or "int8".
        engine: name.
    """
    decoding = decoding_bytes(tokenizer, pixels, batch, element)
    working = {name: working_bytes(transformer, steps, batch, element, kv_cache) for name, steps in schedules.items()}
    # The steps' pool and the decoder's are two, since a decoder is replayed in the middle of a walk.
    pools = {name: bytes_ + decoding if engine.startswith("graph") else 0 for name, bytes_ in working.items()}
    kept = {
        name: kv_cache_bytes(transformer, steps, batch, element, kv_cache, alike=True) + pools[name]
        for name, steps in schedules.items()
    }
    return TimedBytes(kept, max((max(bytes_, decoding) for bytes_ in working.values()), default=0))


def timed_beside_full(model: ModelRequest, schedule: str, engine: str, card_bytes: int) -> int:
    """How many such schedules are timed in one group with the full one on an otherwise empty card; loads nothing.

    Args:
        model: what is asked for.
        schedule: name of a preset.
        engine: its name.
        card_bytes: memory of the card.
    """
    from stagevar.models.memory import estimate
    from stagevar.models.registry import model_parts, published, resolve
    from stagevar.schedule import exact, preset

    request = resolve(model)
    parts = model_parts(request)
    transformer, grids = parts.transformer.module, parts.grids
    both = {"full": exact(len(grids)), "this": preset(schedule, grids, published(model.name))}
    steps = {key: one.expand(grids, len(transformer.chunk_layers)) for key, one in both.items()}
    needed = timed_bytes(
        transformer, parts.tokenizer.module, steps, parts.pixels, request.dtype.itemsize, request.kv_cache, engine
    )
    room = int(USABLE * (card_bytes - estimate(parts, request).held)) - needed.together(["full"])
    return max(0, room // needed.kept["this"])


def groups_that_fit(
    model: LoadedModel, schedules: Mapping[str, Steps], sentinel: str | None, engine: str
) -> list[list[str]]:
    """Names of schedules in groups to be timed together on the model's device, by what is free there now."""
    free = available_bytes(model.device)
    if free is None:
        return [list(schedules)]
    needed = timed_bytes(
        model.transformer, model.tokenizer, schedules, model.pixels, model.dtype.itemsize, model.kv_cache, engine
    )
    return needed.groups(int(USABLE * free), sentinel)
