"""Guesses: who reads when, and that nothing but the time changes by them."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe
from flashmoe import trace
from flashmoe.engines.transformers.experts.lookahead import RouterOutput
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.reading.read_queue import ReadQueue
from flashmoe.residency import budget, prefetch
from flashmoe.store import manifest


@pytest.fixture
def small_guesses(monkeypatch):
    """Prefetch experts of any size, with as many spare slots as half of the budget."""
    monkeypatch.setattr(prefetch, "PREFETCH_FROM_BYTES", 1)
    monkeypatch.setattr(budget, "SPARE_SHARE", 1 / 2)


def generate(model, ids: torch.Tensor, new: int = 20) -> tuple[list[list[int]], dict]:
    """Tokens, and the counts once no guess is on its way."""
    tokens = tiny.generate(model, ids, new)
    model.flashmoe.residency.prefetcher.clear()
    return tokens, model.flashmoe.stats()


@pytest.mark.parametrize("more", [None, 0, 3])  # than top_k slots a layer; None: less, so shared
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_the_time_changes(stores, small_guesses, reading, family, more):
    store = stores(family)
    top_k, shared = manifest.load(store).top_k, more is None
    ids = torch.arange(3, 90).reshape(3, 29)
    outcomes = []
    for prefetching, spares in ((False, 0), (True, 2)):
        slots, extra = (top_k, -1) if shared else (top_k + more, spares)
        memory = tiny.budget(store, slots, extra)
        model = flashmoe.load(store, memory=memory, policy="lru", prefetch=prefetching)
        assert model.flashmoe.residency.pools.slots.shared == shared
        assert shared or model.flashmoe.residency.pools.slots.spares == spares
        assert (model.flashmoe.residency.prefetcher.spares is not None) == prefetching
        outcomes.append([generate(model, part) for part in (ids, ids[:1, :1])])
        model.flashmoe.close()
    for (plain, without), (guessed, stats) in zip(*outcomes, strict=True):
        assert guessed == plain
        extent_bytes = manifest.load(store).layers[0].extent_bytes
        read = stats["misses"] * extent_bytes + stats["prefetch_wasted_bytes"]
        assert stats["bytes_read"] == read
        assert stats["resident_bytes"] <= stats["memory_bytes"]
        assert stats["prefetch_used"] + stats["prefetch_wasted"] > 0
        if not shared:  # the same slots for the policy: the very same hits
            assert (stats["requests"], stats["hits"]) == (without["requests"], without["hits"])


def test_a_guess_that_fails_matters_only_when_it_is_needed(own_store, small_guesses):
    """Every expert that the run does not use is damaged, and guessed all the time."""
    memory = tiny.budget(own_store, 3, 2)
    model = flashmoe.load(own_store, memory=memory, policy="lru", prefetch=False)
    ids = torch.tensor([[5]])
    recorded = record(model, [ids[0]], max_new_tokens=2)
    healthy = generate(model, ids, 2)[0]
    model.flashmoe.close()

    layers = manifest.load(own_store).layers
    bad = next(e for e in range(8) if e not in recorded.experts[:, 1])
    with open(own_store / manifest.load(own_store).experts_file, "r+b") as file:
        file.seek(layers[1].extent_offset(bad))
        file.write(b"damage")
    model = flashmoe.load(own_store, memory=memory, policy="lru")
    prefetcher = model.flashmoe.residency.prefetcher
    nothing = torch.empty(0)
    output = RouterOutput(nothing, nothing, torch.tensor([[bad]]))
    model.flashmoe.lookahead.route = lambda *_: output
    tokens, stats = generate(model, ids, 2)
    assert tokens == healthy
    assert stats["prefetch_wasted"] > 0

    prefetcher.guess(1, lambda: [bad], np.full(8, -1))
    arrived = prefetcher.claim(1, bad, model.flashmoe.residency.pools.all[1].arena, 0)
    with pytest.raises(FlashMoEError, match=f"expert {bad} of .*not those that were packed"):
        arrived.result(10)
    model.flashmoe.close()


def test_the_demo_models_routers_know_a_layer_ahead():
    """What docs/speed.md says of the accuracy, from the shipped recording."""
    routing = trace.load(flashmoe.demo_routing_path())
    chosen = routing.experts[:, 1:, None, :] == routing.guesses[..., None]
    assert 0.8 < chosen.any(-1).mean() < 0.9


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
