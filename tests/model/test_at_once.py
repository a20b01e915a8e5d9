"""Whole events: every expert's bytes are there, within the budget, with the simulator's hits."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_memory import EXPERTS, EXTENT_BYTES, LAYERS, TOP_K, Memory

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.engines.llama.engine import LlamaEngine
from flashmoe.errors import FlashMoEError
from flashmoe.residency import prefetch, warm_start
from flashmoe.residency.place_work import FILLED, RESIDENT
from flashmoe.residency.routing import Routing

pytestmark = pytest.mark.usefixtures("whim")


@pytest.fixture(autouse=True)
def small_experts_are_guessed(monkeypatch):
    monkeypatch.setattr(prefetch, "PREFETCH_FROM_BYTES", 1)


steps = st.lists(  # of each step: how many tokens, a seed for what they choose, and wrong guesses
    st.tuples(st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans()), max_size=12
)
budgets = st.integers(EXPERTS, EXPERTS * LAYERS + 2)  # in extents


def choices(tokens: int, seed: int, wrong: bool):
    """Of each layer: its number, rows [tokens, TOP_K], and a guess of the next layer's experts."""
    generator = np.random.default_rng(seed)
    choice = generator.random((LAYERS, tokens, EXPERTS)).argsort(2)[:, :, :TOP_K]
    for layer, rows in enumerate(choice):
        above = choice[min(layer + 1, LAYERS - 1)]
        yield layer, rows, generator.permutation(EXPERTS) if wrong else np.unique(above)


@settings(max_examples=60, deadline=None)
@given(steps, budgets, st.sampled_from(["lru", "learned", "whim"]))
def test_what_is_needed_is_there_within_the_budget(steps, extents, policy):
    memory = Memory()
    engine = LlamaEngine(memory, extents * EXTENT_BYTES, policy)
    caches = [ExpertCache(engine.residency.pools.new_policy(n)) for n in range(LAYERS)]
    routing = Routing(TOP_K, LAYERS)
    try:
        for tokens, seed, wrong in steps:
            for layer, rows, likely in choices(tokens, seed, wrong):
                engine.at_once.make_ready(layer, rows, likely.tolist)
                for expert in np.unique(rows).tolist():
                    assert memory.holds(layer, expert)
                assert len(memory.settled_content(engine)) <= extents
                list(caches[layer].waves(routing.event(layer, rows, None, 0, EXPERTS)))
        assert engine.snapshot().hits == sum(cache.hits for cache in caches)
        assert engine.snapshot().resident_bytes <= engine.snapshot().memory_bytes
        engine.reset()
        assert memory.settled_content(engine) == {}
    finally:
        engine.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), max_size=30),
    budgets,
    st.sampled_from(["learned", "whim"]),
)
def test_a_token_never_takes_a_residents_room(tokens, extents, policy):
    """Whatever is computed and not kept, or guessed in vain."""
    memory = Memory()
    engine = LlamaEngine(memory, extents * EXTENT_BYTES, policy)
    marks = engine.at_once.places.marks
    try:
        for seed, wrong in tokens:
            for layer, rows, likely in choices(1, seed, wrong):
                engine.at_once.make_ready(layer, rows, likely.tolist)
                assert all(memory.holds(layer, expert) for expert in rows.ravel().tolist())
                if engine.residency.pools.slots.bypass:
                    assert (marks[marks & RESIDENT > 0] & FILLED).all()
    finally:
        engine.close()


@settings(max_examples=60, deadline=None)
@given(steps, budgets, budgets)
def test_what_was_lent_is_read_again_after_a_resize(steps, before, after):
    memory = Memory()
    engine = LlamaEngine(memory, before * EXTENT_BYTES, "lru")
    try:
        for number, (tokens, seed, _) in enumerate(steps):
            choice = np.random.default_rng(seed).random((LAYERS, tokens, EXPERTS)).argsort(2)
            for layer, rows in enumerate(choice[:, :, :TOP_K]):
                engine.at_once.make_ready(layer, rows)
                assert all(memory.holds(layer, expert) for expert in rows.ravel().tolist())
            if number % 2 == 0:
                engine.resize(after * EXTENT_BYTES)
                assert len(memory.settled_content(engine)) <= after
                before, after = after, before
    finally:
        engine.close()


@settings(max_examples=60, deadline=None)
@given(steps, budgets, budgets, st.sampled_from(["lru", "learned", "whim"]))
def test_a_budget_that_changes_within_a_graph_leaves_what_is_multiplied_by(
    steps, before, after, policy
):
    memory = Memory()
    engine = LlamaEngine(memory, before * EXTENT_BYTES, policy)
    engine.follower._ended.clear()  # somebody follows
    try:
        with ThreadPoolExecutor(1) as graph:  # a graph is computed
            graph.submit(engine._computing.acquire).result()
            for tokens, seed, wrong in steps:
                for layer, rows, likely in choices(tokens, seed, wrong):
                    engine.at_once.make_ready(layer, rows, likely.tolist)
                    engine.adjust(after * EXTENT_BYTES)
                    before, after = after, before
                    assert all(memory.holds(layer, expert) for expert in rows.ravel().tolist())
                    assert len(memory.settled_content(engine)) <= before
                    assert engine.present_bytes <= engine.memory_bytes == before * EXTENT_BYTES
            graph.submit(engine._computing.release).result()
        engine.reset()
        assert memory.settled_content(engine) == {}
    finally:
        engine.close()


def test_what_could_not_be_read_is_neither_resident_nor_filled():
    memory = Memory()
    engine = LlamaEngine(memory, EXPERTS * LAYERS * EXTENT_BYTES, "lru")
    memory.broken = {(1, 3)}
    rows = np.array([[3, 4]])
    engine.at_once.make_ready(0, rows, lambda: [3])
    with pytest.raises(FlashMoEError, match="expert 3 of 1"):
        engine.at_once.make_ready(1, rows)
    assert (1, 3) not in memory.settled_content(engine)
    memory.broken = set()
    engine.at_once.make_ready(1, rows)
    assert memory.holds(1, 3) and memory.holds(1, 4)
    engine.close()


def test_all_are_read_ahead_where_all_fit_and_counted_as_ever():
    fitting, tight = Memory(), Memory()
    engine = LlamaEngine(fitting, EXPERTS * LAYERS * EXTENT_BYTES, "lru")
    assert engine.read_all() == EXPERTS * LAYERS
    assert len(fitting.settled_content(engine)) == EXPERTS * LAYERS
    assert engine.read_all() == 0
    before = engine.snapshot().bytes_read
    for layer in range(LAYERS):
        engine.at_once.make_ready(layer, np.array([[3, 4]]))
        assert fitting.holds(layer, 3) and fitting.holds(layer, 4)
    assert engine.snapshot().bytes_read == before
    assert engine.snapshot().hits == 0
    engine.close()
    engine = LlamaEngine(tight, (EXPERTS * LAYERS - 1) * EXTENT_BYTES, "lru")
    assert engine.read_all() == 0
    assert tight.settled_content(engine) == {}
    engine.close()


def test_an_expert_that_cannot_be_read_ahead_is_named_and_read_again():
    memory = Memory()
    engine = LlamaEngine(memory, EXPERTS * LAYERS * EXTENT_BYTES, "lru")
    memory.broken = {(1, 3)}
    with pytest.raises(FlashMoEError, match="expert 3 of 1"):
        engine.read_all()
    assert (1, 3) not in memory.settled_content(engine)
    memory.broken = set()
    assert engine.read_all() >= 1
    assert memory.holds(1, 3)
    engine.close()


def test_what_was_read_of_a_changed_file_is_forgotten():
    memory = Memory()
    engine = LlamaEngine(memory, EXPERTS * LAYERS * EXTENT_BYTES, "lru")
    memory.changed = True
    with pytest.raises(OSError, match="changed"):
        engine.at_once.make_ready(0, np.array([[3, 4]]))
    assert memory.settled_content(engine) == {}
    memory.changed = False
    engine.at_once.make_ready(0, np.array([[3, 4]]))
    assert memory.holds(0, 3) and memory.holds(0, 4)
    assert set(memory.settled_content(engine)) == {(0, 3), (0, 4)}
    memory.changed = True
    engine.at_once.make_ready(0, np.array([[3, 4]]))  # nothing is read
    engine.close()


def test_a_guess_that_raises_leaves_nothing_unread():
    memory = Memory()
    engine = LlamaEngine(memory, EXPERTS * LAYERS * EXTENT_BYTES, "lru")
    memory.broken = {(0, 3)}

    def likely() -> list[int]:
        raise ValueError

    with pytest.raises(ValueError):
        engine.at_once.make_ready(0, np.array([[3, 4]]), likely)
    assert set(memory.settled_content(engine)) == set()
    memory.broken = set()
    engine.at_once.make_ready(0, np.array([[3, 4]]))
    assert memory.holds(0, 3) and memory.holds(0, 4)
    engine.close()


def test_a_warm_start_that_cannot_be_read_is_a_cold_one(tmp_path):
    memory = Memory()
    engine = LlamaEngine(memory, EXPERTS * LAYERS * EXTENT_BYTES, "lru")
    engine.at_once.make_ready(0, np.array([[3, 4]]))
    warm_start.save(engine.residency, tmp_path / "warm.npz")
    engine.close()
    memory = Memory()
    engine = LlamaEngine(memory, EXPERTS * LAYERS * EXTENT_BYTES, "lru")
    memory.broken = {(0, 3)}
    with pytest.raises(FlashMoEError, match="expert 3 of 0"):
        engine.restore(tmp_path / "warm.npz")
    memory.broken = set()
    engine.at_once.make_ready(0, np.array([[3, 4]]))
    assert memory.holds(0, 3) and memory.holds(0, 4)
    engine.close()


def test_a_failure_is_known_in_a_forked_child():
    memory = Memory()
    engine = LlamaEngine(memory, EXPERTS * LAYERS * EXTENT_BYTES, "lru")
    memory.broken = {(1, 3)}
    engine.at_once.make_ready(0, np.array([[0, 1]]), lambda: [3])
    child = os.fork()
    if child == 0:
        with pytest.raises(FlashMoEError, match="expert 3 of 1"):
            engine.at_once.make_ready(1, np.array([[3, 4]]))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    engine.close()
