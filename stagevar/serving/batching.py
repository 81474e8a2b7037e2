"""Which waiting images are drawn together: first come first served, one shape at a time. No threads, no clock.

The image that waits longest is always in the next batch, so none starves; those of its shape behind it fill the batch up.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Order = TypeVar("Order")


class LineFull(Exception):
    """More images would wait than may; `waiting` is how many do."""

    def __init__(self, waiting: int):
        super().__init__(f"{waiting} images are waiting")
        self.waiting = waiting


@dataclass(eq=False)
class Ticket(Generic[Order]):
    """One waiting image; only images of the same `shape` can be drawn together."""

    shape: Hashable
    order: Order


class WaitingLine(Generic[Order]):
    """Images in the order in which they came.

    Args:
        limit: images that may wait, at least 1.
    """

    def __init__(self, limit: int):
        if limit < 1:
            raise ValueError(f"a queue limit of {limit} images admits none; use at least 1")
        self.limit = limit
        self._waiting: list[Ticket[Order]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, tickets: Iterable[Ticket[Order]]) -> None:
        """Appends the images of one request, all or none of them. Raises LineFull."""
        tickets = list(tickets)
        if len(self) + len(tickets) > self.limit:
            raise LineFull(len(self))
        self._waiting += tickets

    def take(self, most: int) -> list[Ticket[Order]]:
        """The next batch: the first image and at most `most - 1` others of its shape, in their order; empty without any."""
        if not self._waiting:
            return []
        shape = self._waiting[0].shape
        batch = [ticket for ticket in self._waiting if ticket.shape == shape][:most]
        self._remove(batch)
        return batch

    def leave(self, tickets: Iterable[Ticket[Order]]) -> int:
        """Takes images out; returns how many of them were still waiting."""
        before = len(self)
        self._remove(tickets)
        return before - len(self)

    def clear(self) -> list[Ticket[Order]]:
        """Empties the line; returns who was in it."""
        left, self._waiting = self._waiting, []
        return left

    def _remove(self, tickets: Iterable[Ticket[Order]]) -> None:
        gone = {id(ticket) for ticket in tickets}
        self._waiting = [ticket for ticket in self._waiting if id(ticket) not in gone]
