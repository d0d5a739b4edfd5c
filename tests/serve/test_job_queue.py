"""The queue against a plain list: whatever is put, cancelled and taken in whatever order."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_service import LONG, wait_until

from hypersd.serve.job_queue import Job, JobQueue
from hypersd.serve.service_errors import QueueFullError, StoppingError

NOTHING: Any = None  # stands for values that the queue does not read

puts = st.tuples(st.just("put"), st.lists(st.sampled_from("abc"), min_size=1, max_size=4))
cancels = st.tuples(st.just("cancel"), st.integers(0, 30))
takes = st.tuples(st.just("take"), st.integers(1, 5))


def make_jobs(keys: Sequence[str]) -> list[Job]:
    return [Job(model="m", seed=0, params=NOTHING, request=NOTHING, control={}, key=key) for key in keys]


def in_threads(queue: JobQueue, count: int) -> tuple[list[threading.Thread], list[list[Job]]]:
    """Threads that wait for a job each, and what they get."""
    taken: list[list[Job]] = []
    threads = [
        threading.Thread(target=lambda: taken.append(queue.take(lambda _: 8)), daemon=True) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(queue._changed._waiters) == count)  # type: ignore[attr-defined]
    return threads, taken


def join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.one_of(puts, cancels, takes), max_size=30), st.integers(1, 8))
def test_first_come_first_served_and_what_is_alike_goes_along(actions: Sequence[tuple[str, Any]], size: int) -> None:
    """Also: bounded, all of a request or nothing, and what was cancelled neither counts nor comes."""
    queue, waiting, known = JobQueue(size), list[Job](), list[Job]()
    for action, value in actions:
        if action == "put":
            jobs = make_jobs(value)
            if len(waiting) + len(jobs) > size:
                with pytest.raises(QueueFullError):
                    queue.put(jobs)
            else:
                queue.put(jobs)
                waiting += jobs
                known += jobs
        elif action == "cancel" and value < len(known):
            known[value].result.cancel()
            waiting = [job for job in waiting if job is not known[value]]
        elif action == "take" and waiting:
            expected = [job for job in waiting if job.key == waiting[0].key][:value]
            assert queue.take(lambda _, most=value: most) == expected
            waiting = [job for job in waiting if job not in expected]
            assert not any(job.result.cancel() for job in expected), "a job that was taken cannot be cancelled"
        assert len(queue) == len(waiting)


def test_as_many_are_taken_as_the_oldest_allows() -> None:
    queue = JobQueue(8)
    queue.put(make_jobs("aaaabbbb"))
    most = {"a": 3, "b": 2}
    taken = [[job.key for job in queue.take(lambda job: most[job.key])] for _ in range(4)]
    assert taken == [["a", "a", "a"], ["a"], ["b", "b"], ["b", "b"]]


def test_jobs_that_were_all_cancelled_do_not_end_the_wait() -> None:
    """An empty list means the end to a worker."""
    queue = JobQueue(8)
    threads, taken = in_threads(queue, 1)
    with queue._changed:  # the taker sees both at once
        gone, wanted = make_jobs("a"), make_jobs("b")
        queue.put(gone)
        gone[0].result.cancel()
    wait_until(lambda: len(queue._changed._waiters) == 1)  # type: ignore[attr-defined]
    queue.put(wanted)
    join(threads)
    assert taken == [wanted]


def test_a_put_wakes_a_taker_for_each_job() -> None:
    queue = JobQueue(8)
    threads, taken = in_threads(queue, 2)
    queue.put(make_jobs("ab"))
    join(threads)
    assert sorted(job.key for jobs in taken for job in jobs) == ["a", "b"]


def test_close_fails_waiting_jobs_and_wakes_all_takers() -> None:
    queue = JobQueue(8)
    threads, taken = in_threads(queue, 3)
    queue.close()
    join(threads)
    assert taken == [[], [], []]
    assert queue.take(lambda _: 1) == []


def test_close_returns_the_waiting_jobs() -> None:
    queue = JobQueue(8)
    waits, cancelled = make_jobs("ab")
    queue.put([waits, cancelled])
    cancelled.result.cancel()
    assert queue.close() == [waits]
    assert isinstance(waits.result.exception(0), StoppingError)
    with pytest.raises(StoppingError):
        queue.put(make_jobs("a"))
    assert len(queue) == 0
    assert queue.close() == []
