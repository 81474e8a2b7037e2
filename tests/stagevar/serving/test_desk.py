"""Who is drawn with whom, who is refused, and what stops the desk: no HTTP, no model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagevar.errors import DeviceBroken, OutOfDeviceMemory, UsageError
from stagevar.serving.batching import LineFull, Ticket, WaitingLine
from stagevar.serving.desk import Desk, Order, Shape
from stagevar.serving.refusal import Refusal
from tests.fakes.serving import SIZES, FakeArtist, open_desk, wait_until

SQUARE, TALL = Shape(SIZES[0], "fake-1"), Shape(SIZES[1], "fake-1")


def orders(*seeds, shape=SQUARE, prompt="a circle"):
    return [Order(prompt, seed, shape) for seed in seeds]


def seeds_of(job):
    return [int(image.pixels[0, 0, 0]) for image in job.future.result(30)]


# ------------------------------------------------------------------------------------------------ the line


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 5))
def test_batches_are_of_one_shape_in_order_and_lose_nobody(shapes, most):
    line = WaitingLine(100)
    line.join(Ticket(shape, number) for number, shape in enumerate(shapes))
    drawn = []
    while batch := line.take(most):
        waiting = [number for number in range(len(shapes)) if number not in drawn]
        numbers = [ticket.order for ticket in batch]
        assert numbers[0] == waiting[0], "who waits longest is drawn next"
        alike = [number for number in waiting if shapes[number] == shapes[waiting[0]]]
        assert numbers == alike[:most]
        drawn += numbers
    assert sorted(drawn) == list(range(len(shapes))) and len(line) == 0


def test_a_request_joins_the_line_whole_or_not():
    line = WaitingLine(3)
    line.join([Ticket("a", 0), Ticket("a", 1)])
    with pytest.raises(LineFull) as caught:
        line.join([Ticket("a", 2), Ticket("a", 3)])
    assert caught.value.waiting == len(line) == 2
    line.join([Ticket("b", 2)])
    assert [t.order for t in line.take(9)] == [0, 1]


def test_who_leaves_is_not_drawn():
    line = WaitingLine(9)
    tickets = [Ticket("a", number) for number in range(3)]
    line.join(tickets)
    assert line.leave([tickets[1]]) == 1 and line.leave([tickets[1]]) == 0
    assert [t.order for t in line.take(9)] == [0, 2]
    line.join([tickets[1]])
    assert line.clear() == [tickets[1]] and line.take(1) == []


def test_a_line_without_room_is_refused():
    with pytest.raises(ValueError, match="admits none"):
        WaitingLine(0)


# ------------------------------------------------------------------------------------------------ the desk


@pytest.fixture
def artist():
    return FakeArtist()


def occupied(artist, limit=64):
    """A desk whose thread is drawing seed 99 until the gate opens."""
    desk = open_desk(artist, limit)
    artist.gate.clear()
    first = desk.hand_in(orders(99))
    artist.wait_for_batch()
    return desk, first


def test_waiting_images_of_one_shape_are_drawn_together(artist):
    desk, first = occupied(artist)
    jobs = [desk.hand_in(orders(1, 2)), desk.hand_in(orders(3, shape=TALL)), desk.hand_in(orders(4, 5, 6))]
    artist.gate.set()
    assert [seeds_of(job) for job in jobs] == [[1, 2], [3], [4, 5, 6]] and seeds_of(first) == [99]
    assert artist.batches == [[99], [1, 2, 4, 5], [3], [6]]
    assert jobs[0].waited_s >= 0 and jobs[2].future.result()[2].batch == 1


def test_a_full_line_says_when_to_come_back(artist):
    desk, _ = occupied(artist, limit=10)
    desk.hand_in(orders(*range(8)))
    with pytest.raises(Refusal, match="8 images are waiting, of at most 10") as caught:
        desk.hand_in(orders(1, 2, 3))
    assert caught.value.status == 429 and 1 <= int(caught.value.headers()["retry-after"]) <= 60
    desk.hand_in(orders(1, 2))
    artist.gate.set()


def test_a_request_that_is_withdrawn_is_not_drawn_and_its_place_is_free(artist):
    desk, first = occupied(artist, limit=10)
    gone, kept = desk.hand_in(orders(*range(9))), desk.hand_in(orders(77))
    desk.withdraw(gone)
    assert desk.waiting == 1 and gone.future.cancelled()
    desk.withdraw(first)  # it is being drawn: the image is thrown away
    artist.gate.set()
    assert seeds_of(kept) == [77]
    assert artist.batches == [[99], [77]] and first.future.cancelled()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UsageError("the prompt has too many words"), 400, "not_drawable"),
        (OutOfDeviceMemory("no room"), 503, "out_of_memory"),
        (RuntimeError("a fault"), 500, "internal_error"),
    ],
    ids=["refused by the model", "out of memory", "a fault"],
)
def test_one_bad_image_does_not_harm_its_batch(artist, error, status, code):
    desk, _ = occupied(artist)
    artist.fails["bad"] = error
    good, bad, other = desk.hand_in(orders(1)), desk.hand_in(orders(2, 3, prompt="bad")), desk.hand_in(orders(4))
    artist.gate.set()
    assert seeds_of(good) == [1] and seeds_of(other) == [4]
    with pytest.raises(Refusal) as caught:
        bad.future.result(30)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert "a fault" not in str(caught.value), "what is inside stays inside"
    assert artist.batches[1:] == [[1, 2, 3, 4], [1], [2], [4]] and desk.state == "ready"
    assert seeds_of(desk.hand_in(orders(5))) == [5]


def test_a_broken_device_refuses_everybody_and_ends_the_desk(artist):
    ended = []
    desk, first = occupied(artist)
    desk.on_end = ended.append
    artist.fails["a circle"] = DeviceBroken("cuda:0 is broken")
    waiting = desk.hand_in(orders(1, 2))
    artist.gate.set()
    for job in (first, waiting):
        with pytest.raises(Refusal, match="the device is broken") as caught:
            job.future.result(30)
        assert caught.value.status == 503 and caught.value.retry_after_s
    assert desk.join(30) and desk.state == "broken" and desk.error is ended[0]
    with pytest.raises(Refusal, match="the device is broken"):
        desk.hand_in(orders(3))


def test_a_model_that_does_not_load_ends_the_desk():
    ended = []
    desk = Desk(lambda: (_ for _ in ()).throw(UsageError("no weights")), 10, on_end=ended.append)
    assert desk.state == "loading"
    with pytest.raises(Refusal, match="still loading") as caught:
        desk.hand_in(orders(1))
    assert caught.value.status == 503
    desk.start()
    assert desk.join(30) and str(desk.error) == "no weights" and ended == [desk.error]


def test_stopping_finishes_what_was_accepted_and_takes_nothing_new(artist):
    desk, first = occupied(artist)
    waiting = desk.hand_in(orders(1, shape=TALL))
    desk.stop()
    with pytest.raises(Refusal, match="stopping"):
        desk.hand_in(orders(2))
    artist.gate.set()
    assert seeds_of(first) == [99] and seeds_of(waiting) == [1] and desk.join(30)


def test_giving_up_refuses_what_is_left(artist):
    desk, first = occupied(artist)
    waiting = desk.hand_in(orders(1))
    desk.give_up()
    for job in (first, waiting):
        with pytest.raises(Refusal, match="stopping") as caught:
            job.future.result(1)
        assert caught.value.status == 503
    artist.gate.set()
    assert desk.join(30) and artist.batches == [[99]]


def test_the_time_of_a_batch_can_be_watched(artist):
    desk, _ = occupied(artist)
    wait_until(lambda: desk.drawing_for_s() > 0)
    artist.gate.set()
    wait_until(lambda: desk.drawing_for_s() == 0)
