"""The queue of reads: demands first, guesses while nothing else is wanted, each read once."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.reading.read_queue import ReadQueue


class Slow:
    """Reads that finish when told, and note who ran."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.gates: dict[int, threading.Event] = {}

    def read(self, number: int):
        self.gates[number] = threading.Event()

        def run() -> None:
            self.ran.append(number)
            self.gates[number].wait(10)

        return run


def wait_for(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never happened")


def test_guesses_wait_for_demands():
    slow, queue = Slow(), ReadQueue(2, guesses_at_once=1)
    demands = [slow.read(n) for n in range(3)]
    guesses = [slow.read(n) for n in (10, 11, 12)]
    queue.demand(demands)
    queue.guess(guesses)
    wait_for(lambda: len(slow.ran) == 2)
    slow.gates[0].set()
    wait_for(lambda: len(slow.ran) == 3)
    assert sorted(slow.ran) == [0, 1, 2]  # a thread is free, but a demand still runs
    slow.gates[1].set()
    slow.gates[2].set()
    wait_for(lambda: 10 in slow.ran)
    assert 11 not in slow.ran  # one guess at a time
    assert queue.cancel(guesses[1:2]) == guesses[1:2]
    queue.promote(guesses[2:])
    wait_for(lambda: 12 in slow.ran)  # beside the guess that runs
    for gate in slow.gates.values():
        gate.set()
    queue.close()
    assert 11 not in slow.ran
    assert queue.busy_seconds > 0
    with pytest.raises(RuntimeError, match="closed"):
        queue.demand([])


def test_on_a_slow_drive_guesses_run_one_by_one():
    queue, slow = ReadQueue(4), Slow()
    queue.demand([lambda: time.sleep(0.2)])
    wait_for(lambda: queue.busy_seconds > 0)  # it took more than GUESS_SECONDS
    queue.guess([slow.read(n) for n in (10, 11)])
    wait_for(lambda: slow.ran == [10])
    time.sleep(0.05)
    assert slow.ran == [10]
    slow.gates[10].set()
    wait_for(lambda: slow.ran == [10, 11])
    slow.gates[11].set()
    queue.close()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["demand", "guess", "promote", "cancel"]),
                       st.integers(1, 5)), max_size=30),
    st.integers(1, 4),
)  # fmt: skip
def test_every_demand_runs_once_and_no_cancelled_guess_does(steps, threads):
    queue, ran, lock = ReadQueue(threads), [], threading.Lock()
    demanded: set[int] = set()
    cancelled: set[int] = set()
    waiting: list = []
    names: dict = {}

    def new():
        number = len(names)

        def run() -> None:
            with lock:
                ran.append(number)

        names[run] = number
        return run

    for step, count in steps:
        if step == "demand":
            reads = [new() for _ in range(count)]
            demanded |= {names[read] for read in reads}
            queue.demand(reads)
        elif step == "guess":
            reads = [new() for _ in range(count)]
            waiting += reads
            queue.guess(reads)
        elif step == "promote":
            queue.promote(waiting[:count])
            demanded |= {names[read] for read in waiting[:count]}
            del waiting[:count]
        else:
            cancelled |= {names[read] for read in queue.cancel(waiting[:count])}
    queue.close()
    counts = np.bincount(ran, minlength=len(names))
    assert (counts <= 1).all()
    assert all(counts[number] for number in demanded - cancelled)
    assert not any(counts[number] for number in cancelled)
