"""Where requests are handed in and drawn: one line of waiting images, one thread that owns the device.

The thread loads the model, warms it up, then draws batch after batch. Nothing that a request holds can stop it: a batch that
fails is drawn again image by image, and only the image at fault is refused. A device that broke ends it for good.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from stagevar.errors import DeviceBroken, OutOfDeviceMemory, StagevarError, UsageError, first_line
from stagevar.sections import shortened
from stagevar.serving.batching import LineFull, Ticket, WaitingLine
from stagevar.serving.refusal import Refusal, busy, not_ready

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("stagevar.serving")
State = Literal["loading", "ready", "stopping", "broken"]
#: Bounds of Retry-After, in seconds.
SOONEST_S, LATEST_S = 1, 60


@dataclass(frozen=True)
class Shape:
    """What images must share to be drawn together.

    Attributes:
        size: (width, height) in pixels.
        model: a served id, which stands for a schedule.
        guidance: None for the model's own.
        negated: whether the prompts have negative ones.
    """

    size: tuple[int, int]
    model: str
    guidance: float | None = None
    negated: bool = False


@dataclass(frozen=True)
class Order:
    """One image to draw."""

    prompt: str
    seed: int
    shape: Shape
    negative: str | None = None


@dataclass(frozen=True)
class Drawn:
    """One image, and where the time of its batch went.

    Attributes:
        pixels: (H, W, 3) uint8.
        text_ms: encoding prompts.
        scale_ms: per scale, 0 for a skipped one.
        decode_ms: codes to pixels.
        batch: images drawn together.
    """

    pixels: np.ndarray
    text_ms: float
    scale_ms: tuple[float, ...]
    decode_ms: float
    batch: int


class Artist(Protocol):
    """A loaded model as the desk sees it; `batch` is the most images it draws at once."""

    batch: int

    def draw(self, orders: Sequence[Order]) -> list[Drawn]:
        """One image per order; all orders have one shape.

        Raises:
            UsageError: for what the model refuses.
            OutOfDeviceMemory, DeviceBroken: for failures of the device.
        """
        ...


@dataclass(eq=False)
class Job:
    """The images of one request.

    Attributes:
        future: all images in order, or a Refusal.
        waited_s: until the first image was begun.
    """

    tickets: list[Ticket[Order]]
    handed_in_s: float
    future: Future[list[Drawn]] = field(default_factory=Future)
    waited_s: float | None = None
    done: dict[int, Drawn] = field(default_factory=dict)


class Desk:
    """Takes requests from any thread and answers them from its own.

    Args:
        load: makes the artist, warmed up; called in the desk's thread.
        limit: images that may wait.
        on_batch: called for every batch drawn.
        on_end: called once if the thread ends by itself, with the error that ended it: loading failed, or the device
            broke.
    """

    def __init__(
        self,
        load: Callable[[], Artist],
        limit: int,
        on_batch: Callable[[Sequence[Drawn]], None] = lambda drawn: None,
        on_end: Callable[[BaseException], None] = lambda error: None,
    ):
        self._load, self.on_batch, self.on_end = load, on_batch, on_end
        self._line: WaitingLine[Order] = WaitingLine(limit)
        self._jobs: dict[int, tuple[Job, int]] = {}  # by ticket: its job and its place in it
        self._change = threading.Condition()
        self._state: State = "loading"
        self._image_s = 1.0  # of the last batch, for Retry-After
        self._drawing_since: float | None = None
        self.artist: Artist | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="stagevar-desk", daemon=True)

    def start(self) -> None:
        """Begins to load, unless it was stopped before."""
        if self._state == "loading":
            self._thread.start()

    @property
    def state(self) -> State:
        return self._state

    @property
    def waiting(self) -> int:
        """Images in the line."""
        return len(self._line)

    def drawing_for_s(self) -> float:
        """Seconds since the current batch was started, 0 between batches."""
        since = self._drawing_since
        return 0.0 if since is None else time.monotonic() - since

    def hand_in(self, orders: Sequence[Order]) -> Job:
        """Puts the images of one request in the line. Raises Refusal if it is full or the desk is not open."""
        with self._change:
            if self._state != "ready":
                raise not_ready(self._state)
            job = Job([Ticket(order.shape, order) for order in orders], time.monotonic())
            try:
                self._line.join(job.tickets)
            except LineFull as full:
                later_s = math.ceil(full.waiting * self._image_s)
                raise busy(full.waiting, self._line.limit, min(max(later_s, SOONEST_S), LATEST_S)) from None
            self._jobs.update({id(ticket): (job, place) for place, ticket in enumerate(job.tickets)})
            self._change.notify_all()
        return job

    def withdraw(self, job: Job) -> None:
        """Forgets a request whose client disconnected or stopped waiting; images being drawn for it are thrown away."""
        with self._change:
            self._line.leave(job.tickets)
            self._forget(job)
            self._change.notify_all()
        job.future.cancel()

    def stop(self) -> None:
        """Takes no more requests; those that were accepted are drawn, then the thread ends."""
        with self._change:
            if self._state in ("loading", "ready"):
                self._state = "stopping"
            self._change.notify_all()

    def give_up(self) -> None:
        """Refuses everything that is still waiting or being drawn."""
        self.stop()
        self._refuse_all(not_ready("broken" if self._state == "broken" else "stopping"))

    def wait_until_loaded(self) -> None:
        """Returns when the desk is no longer loading."""
        with self._change:
            while self._state == "loading":
                self._change.wait()

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread; returns whether it ended."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        try:
            self.artist = self._load()
            with self._change:
                if self._state == "loading":
                    self._state = "ready"
                self._change.notify_all()
            while tickets := self._next():
                self._draw(tickets)
                self._drawing_since = None
        except BaseException as error:
            self.error = error
            with self._change:
                self._state = "broken"
                self._change.notify_all()
            self._refuse_all(not_ready("broken"))
            self.on_end(error)

    def _next(self) -> list[Ticket[Order]]:
        """The next batch, waited for; empty once the desk was stopped and nothing waits."""
        assert self.artist is not None
        with self._change:
            while not (tickets := self._line.take(self.artist.batch)):
                if self._state != "ready":
                    return []
                self._change.wait()
            self._drawing_since = time.monotonic()
            for ticket in tickets:
                job, _ = self._jobs[id(ticket)]
                job.waited_s = job.waited_s if job.waited_s is not None else self._drawing_since - job.handed_in_s
            return tickets

    def _draw(self, tickets: Sequence[Ticket[Order]]) -> None:
        assert self.artist is not None
        try:
            began = time.monotonic()
            drawn = self.artist.draw([ticket.order for ticket in tickets])
            self._image_s = (time.monotonic() - began) / len(tickets)
        except DeviceBroken:
            raise
        except Exception as error:
            refusal = None if len(tickets) > 1 else _refusal(error)
            if refusal is None:
                why = "the model refuses a prompt" if isinstance(error, UsageError) else first_line(error)
                logger.warning("a batch of %d failed (%s); drawing it one by one", len(tickets), why)
        else:
            self.on_batch(drawn)
            for ticket, image in zip(tickets, drawn, strict=True):
                self._deliver(ticket, image)
            return
        # Outside of `except`, whose error would hold the memory of the failed batch.
        if refusal is not None:
            self._refuse(tickets[0], refusal)
            return
        for ticket in tickets:
            if id(ticket) in self._jobs:  # else another image of its request was refused, or its client left
                self._draw([ticket])

    def _deliver(self, ticket: Ticket[Order], image: Drawn) -> None:
        with self._change:
            job, place = self._jobs.pop(id(ticket), (None, 0))
            if job is None:  # withdrawn meanwhile
                return
            job.done[place] = image
            complete = len(job.done) == len(job.tickets)
        if complete:
            _settle(job, [job.done[place] for place in range(len(job.tickets))])

    def _refuse(self, ticket: Ticket[Order], refusal: Refusal) -> None:
        """One image that cannot be drawn refuses its request, and nothing else."""
        with self._change:
            job, _ = self._jobs.get(id(ticket), (None, 0))
            if job is None:
                return
            self._line.leave(job.tickets)
            self._forget(job)
        _settle(job, refusal)

    def _refuse_all(self, refusal: Refusal) -> None:
        with self._change:
            jobs = list({id(job): job for job, _ in self._jobs.values()}.values())
            self._line.clear()
            self._jobs.clear()
        for job in jobs:
            _settle(job, refusal)

    def _forget(self, job: Job) -> None:
        for ticket in job.tickets:
            self._jobs.pop(id(ticket), None)


def _settle(job: Job, outcome: list[Drawn] | Refusal) -> None:
    try:
        if isinstance(outcome, Refusal):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
    except InvalidStateError:  # withdrawn in the same moment
        pass


def _refusal(error: Exception) -> Refusal:
    """Why one image could not be drawn."""
    if isinstance(error, OutOfDeviceMemory):
        return Refusal(shortened(error), 503, code="out_of_memory", retry_after_s=SOONEST_S)
    if isinstance(error, UsageError):
        return Refusal(shortened(error), 400, code="not_drawable")
    if isinstance(error, StagevarError):
        return Refusal(shortened(error), 503, code="not_drawn", retry_after_s=SOONEST_S)
    logger.error("an image could not be drawn: %s", first_line(error), exc_info=error)
    return Refusal("the image could not be drawn; the server's log has the reason", 500, code="internal_error")
