"""What the driver of a cluster decides, told as lists of events. No Ray, no processes."""

import pytest

from tuner.cluster.dispatcher import QUARANTINE_AFTER, SINGLE_ATTEMPTS, TREE_ATTEMPTS, Dispatcher, Job, WorkerSlot
from tuner.cluster.dispatcher import quality_job as quality
from tuner.evaluation.executor import QualityTask
from tuner.testing.formulas import FULL, PAPER, SKIP

TREE = QualityTask((FULL, PAPER, SKIP), "search", 0)


def task(batch, *schedules):
    return QualityTask(schedules or (FULL,), "search", batch)


def ready(names="ab", own_gpus=True, hosts=None):
    """A dispatcher with loaded workers, and what it says."""
    said = []
    dispatcher = Dispatcher(own_gpus, said.append)
    for name in names:
        dispatcher.add(WorkerSlot(name, f"node {name}", (hosts or {}).get(name, "host"), "ready"))
    return dispatcher, said


def handed(dispatcher):
    return {slot.id: job for slot, job in dispatcher.assign()}


def rebuilt(dispatcher):
    """Every worker that is to be built, is."""
    for slot in dispatcher.to_build(one_at_a_time=False):
        slot.state = "ready"


def crash(dispatcher, slot, why="died"):
    ended = dispatcher.failed(slot, why)
    rebuilt(dispatcher)
    return ended


def test_every_job_goes_to_one_worker_and_ends_once():
    dispatcher, _ = ready()
    jobs = [quality(task(batch), batch, [0]) for batch in range(3)]
    dispatcher.begin(jobs)
    first = handed(dispatcher)
    assert first == {"a": jobs[0], "b": jobs[1]} and handed(dispatcher) == {}, "busy workers get nothing"
    assert dispatcher.answered(dispatcher.slots["b"], "values") == [(jobs[1], "values")]
    assert handed(dispatcher) == {"b": jobs[2]} and not dispatcher.is_done
    for name in "ab":
        dispatcher.answered(dispatcher.slots[name], "values")
    assert dispatcher.is_done


def test_a_micro_batch_stays_with_the_worker_that_had_it():
    dispatcher, _ = ready()
    for order in ((0, 1), (1, 0)):
        dispatcher.begin([quality(task(batch), batch, [0]) for batch in order])
        assert {name: job.task.batch for name, job in handed(dispatcher).items()} == {"a": 0, "b": 1}
        for slot in dispatcher.slots.values():
            dispatcher.answered(slot, "values")


def test_an_answer_of_an_abandoned_call_is_dropped():
    dispatcher, _ = ready("a")
    dispatcher.begin([quality(task(0), 0, [0])])
    handed(dispatcher)
    following = quality(task(1), 0, [0])
    dispatcher.begin([following])
    assert dispatcher.answered(dispatcher.slots["a"], "late") == [] and not dispatcher.is_done
    assert handed(dispatcher) == {"a": following}


@pytest.mark.parametrize(
    ("own_gpus", "starting", "running", "allowed"),
    [
        (True, "timing", "quality", False),
        (True, "quality", "timing", False),
        (True, "timing", "loading", False),
        (True, "timing", "timing", True),  # each on a GPU of its own
        (False, "timing", "timing", False),  # they would share memory and caches
        (False, "quality", "quality", True),
    ],
)
def test_nothing_disturbs_a_timing_on_its_machine(own_gpus, starting, running, allowed):
    def job(kind):
        return Job("timed", (), None, exclusive=True) if kind == "timing" else quality(task(0), 0, [0])

    for hosts, expected in ((None, allowed), ({"a": "another machine"}, True)):
        dispatcher, _ = ready(own_gpus=own_gpus, hosts=hosts)
        other = dispatcher.slots["b"]
        if running == "loading":
            other.state = "loading"
        else:
            other.job = job(running)
        wanted = job(starting)
        dispatcher.begin([wanted])
        assert dispatcher.choose(dispatcher.slots["a"]) is (wanted if expected else None)


def test_a_tree_that_kills_workers_is_tried_one_by_one_and_the_culprit_fails_alone():
    dispatcher, _ = ready("abc")
    dispatcher.begin([quality(TREE, 0, [0, 1, 2])])
    for _ in range(TREE_ATTEMPTS):
        [(name, job)] = handed(dispatcher).items()
        assert job.members == (0, 1, 2) and crash(dispatcher, dispatcher.slots[name]) == []
    outcomes = {}
    for _ in range(20):
        for name, job in handed(dispatcher).items():
            slot = dispatcher.slots[name]
            ended = crash(dispatcher, slot) if job.members == (1,) else dispatcher.answered(slot, "values")
            outcomes |= {done.members: value for done, value in ended}
    assert dispatcher.is_done and outcomes[0,] == outcomes[2,] == "values"
    assert str(outcomes[1,]) == f"crashed {SINGLE_ATTEMPTS} workers; last error: died"
    assert not any(slot.failures for slot in dispatcher.slots.values()), "workers are forgiven what a job did"


def test_a_job_avoids_the_worker_that_it_failed_on():
    dispatcher, _ = ready()
    job = quality(task(0), 0, [0])
    dispatcher.begin([job])
    assert handed(dispatcher) == {"a": job}
    crash(dispatcher, dispatcher.slots["a"])
    assert handed(dispatcher) == {"b": job}
    crash(dispatcher, dispatcher.slots["b"])
    assert handed(dispatcher) == {"a": job}, "it failed on all of them: any will do"


def test_a_worker_that_fails_whatever_it_gets_is_quarantined():
    dispatcher, said = ready()
    bad = dispatcher.slots["a"]
    for batch, steps in enumerate((FULL, PAPER, SKIP)):
        dispatcher.begin([quality(task(batch, steps), batch, [0])])
        bad.job = dispatcher.choose(bad)
        dispatcher.failed(bad, "no answer within 5 s")
        if batch < QUARANTINE_AFTER - 1:
            assert bad.state == "held" and dispatcher.to_build(one_at_a_time=False) == [bad]
            bad.state = "ready"
    assert bad.state == "quarantined" and dispatcher.counts == {"rebuilds": 2, "quarantined": 1}
    assert said[-1].startswith("worker a quarantined after 3 failures in a row")
    assert dispatcher.reasons[-1] == "worker a: no answer within 5 s"
    assert [slot.id for slot, _ in dispatcher.assign()] == ["b"], "its job goes to the other"


def test_a_success_ends_a_row_of_failures():
    dispatcher, _ = ready("a")
    slot = dispatcher.slots["a"]
    for batch in range(2 * QUARANTINE_AFTER):
        dispatcher.begin([quality(task(batch), batch, [0])])
        handed(dispatcher)
        if batch % 2:
            dispatcher.answered(slot, "values")
        else:
            crash(dispatcher, slot)
    assert slot.state == "ready" and dispatcher.counts["quarantined"] == 0


def test_nobody_is_suspected_when_a_node_dies():
    dispatcher, said = ready()
    job = quality(task(0), 0, [0])
    dispatcher.begin([job, quality(task(1), 1, [0])])
    handed(dispatcher)
    lost = dispatcher.slots["a"]
    dispatcher.lost(lost)
    assert dispatcher.failed(lost, "node died") == [] and lost.state == "gone"
    assert dispatcher.counts == {"lost": 1} and said == ["lost worker a with its node"]
    dispatcher.answered(dispatcher.slots["b"], "values")
    assert handed(dispatcher) == {"b": job} and not job.failed_on


def test_pinned_jobs_stay_on_one_worker_while_it_lives():
    dispatcher, _ = ready()
    for _ in range(2):
        pinned = Job("timed", (), object(), pinned=True, exclusive=True)
        dispatcher.begin([pinned])
        assert handed(dispatcher) == {"a": pinned} and dispatcher.timer == "a"
        dispatcher.answered(dispatcher.slots["a"], 1)
    dispatcher.begin([Job("timed", (), object(), pinned=True, exclusive=True)])
    handed(dispatcher)
    dispatcher.lost(dispatcher.slots["a"])
    dispatcher.failed(dispatcher.slots["a"], "node died")
    assert list(handed(dispatcher)) == ["b"]


def test_one_worker_is_built_at_a_time_while_none_has_chosen_the_engine():
    dispatcher = Dispatcher(own_gpus=True)
    for name in "abc":
        dispatcher.add(WorkerSlot(name, "node", "host"))
    assert [slot.id for slot in dispatcher.to_build(one_at_a_time=True)] == ["a"]
    dispatcher.slots["a"].state = "loading"
    assert dispatcher.to_build(one_at_a_time=True) == []
    dispatcher.slots["a"].state = "quarantined"
    assert [slot.id for slot in dispatcher.to_build(one_at_a_time=True)] == ["b"]
    assert [slot.id for slot in dispatcher.to_build(one_at_a_time=False)] == ["b", "c"]


def test_the_slot_that_failed_least_is_built_next_and_a_waiting_one_holds_up_nobody():
    dispatcher = Dispatcher(own_gpus=True)
    for name in "abc":
        dispatcher.add(WorkerSlot(name, "node", "host"))
    dispatcher.slots["a"].tries = 1
    dispatcher.slots["b"].failures.append("load")
    assert [slot.id for slot in dispatcher.to_build(one_at_a_time=True)] == ["c"]
    dispatcher.slots["c"].state = "waiting"
    assert [slot.id for slot in dispatcher.to_build(one_at_a_time=True)] == ["a"]
    assert dispatcher.workers == 0 and not dispatcher.slots["c"].busy


def test_a_worker_loads_once_no_timing_runs_on_its_machine():
    dispatcher, _ = ready()
    dispatcher.begin([Job("timed", (), None, exclusive=True)])
    handed(dispatcher)
    dispatcher.slots["b"].state = "placed"
    assert dispatcher.to_load(one_at_a_time=False) == []
    dispatcher.answered(dispatcher.slots["a"], "timing")
    assert dispatcher.to_load(one_at_a_time=False) == [dispatcher.slots["b"]]


def test_timers_are_workers_with_gpus_or_machines_without():
    assert ready("abc")[0].timers == 3
    assert ready("abc", own_gpus=False, hosts={"c": "another machine"})[0].timers == 2
