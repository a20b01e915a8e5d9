"""Single tokens without Python: the same residency, bytes, record and errors as by Python."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_memory import EXPERTS, EXTENT_BYTES, LAYERS, TOP_K, Memory

from flashmoe.engines.llama.decode_event import CHANGED, PYTHON
from flashmoe.engines.llama.decoder import Decoder
from flashmoe.engines.llama.engine import LlamaEngine
from flashmoe.errors import FlashMoEError
from flashmoe.reading.pread import read_through
from flashmoe.reading.range_work import GUESS_LIMIT
from flashmoe.residency import prefetch
from flashmoe.residency.at_once_work import FAILED, PART, READY
from flashmoe.residency.guess_record import MISSES

_GET = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
SHAPE, SOURCES, DATA = 0, 4, 6  # words of a tensor here


@_GET
def tensor_get(tensor: int, memory: int, offset: int, size: int) -> None:
    data = ctypes.c_int64.from_address(tensor + 8 * DATA).value
    ctypes.memmove(memory, data + offset, size)


class Tensors:
    """Stands for a graph: a choice, the product that it comes of, and that one's input."""

    layout = SimpleNamespace(shape=8 * SHAPE, sources=8 * SOURCES)

    def __init__(self) -> None:
        self.words = np.zeros((3, 7), np.int64)
        self.ids = np.zeros(TOP_K, np.int32)
        self.hidden = np.zeros(EXPERTS, np.float32)
        choice, product, hidden = (row.ctypes.data for row in self.words)
        self.words[0, SHAPE : SHAPE + 4] = TOP_K, 1, 1, 1
        self.words[0, SOURCES], self.words[1, SOURCES + 1] = product, hidden
        self.words[0, DATA] = self.ids.ctypes.data
        self.words[2, DATA] = self.hidden.ctypes.data
        self.choice = choice
        self.router = np.eye(EXPERTS, dtype=np.float32)  # the input is the scores
        self.scale = np.ones(EXPERTS, np.float32)
        self.bias = np.zeros(EXPERTS, np.float32)

    def address_of(self, name: str) -> int:
        return ctypes.cast(tensor_get, ctypes.c_void_p).value

    def tabulate(self, rows: np.ndarray) -> None:
        rows[:, :3] = [a.ctypes.data for a in (self.router, self.scale, self.bias)]
        rows[:, 4:] = EXPERTS, EXPERTS, 1

    def set(self, chosen: np.ndarray, likely: np.ndarray) -> None:
        self.ids[:] = chosen
        self.hidden[:] = 0
        self.hidden[likely] = np.arange(len(likely), 0, -1)


class Run:
    """An engine, of which `decode` serves single tokens."""

    def __init__(self, memory: Memory, extents: int, policy: str, *, record: bool = False) -> None:
        self.memory = memory
        memory.numbers = list(range(LAYERS))
        self.engine = LlamaEngine(memory, extents * EXTENT_BYTES, policy)
        if record:
            self.engine.record()
        self.tensors = Tensors()
        self.engine.use(Decoder(self.engine, self.tensors, self.tensors, apart=True))
        self.engine.residency.reader.queue.start_threads()
        self.engine.decoder.arm()

    def begin(self, layer: int, chosen: np.ndarray, likely: np.ndarray) -> int:
        self.tensors.set(chosen, likely)
        return self._code(layer, self.tensors.choice)

    def rest(self, layer: int) -> int:
        return self._code(layer, 0)

    def _code(self, layer: int, tensor: int) -> int:
        decoder = self.engine.decoder
        return decoder.code(decoder.words.ctypes.data, layer, tensor)

    def decode(self, layer: int, chosen: np.ndarray, likely: np.ndarray) -> int:
        """All of it."""
        answer = self.begin(layer, chosen, likely)
        if answer != PART:
            return answer
        for expert in chosen.tolist():
            assert self.memory.holds(layer, expert, part=0)
        return self.rest(layer)

    def serve(self, layer: int, chosen: np.ndarray, likely: np.ndarray) -> None:
        """As `Attachment` does."""
        answer = self.decode(layer, chosen, likely)
        if answer not in (READY, PYTHON):
            self.engine.end(layer, answer)
        elif answer == PYTHON:
            self.engine.note(layer, chosen[None])
            self.engine.at_once.make_ready(layer, chosen[None], likely.tolist)


pytestmark = pytest.mark.usefixtures("whim")


@pytest.fixture(autouse=True)
def small_experts_are_guessed(monkeypatch):
    monkeypatch.setattr(prefetch, "PREFETCH_FROM_BYTES", 1)


def choices(seed: int, tokens: int) -> np.ndarray:
    """[layers, tokens, top_k]."""
    return np.random.default_rng(seed).random((LAYERS, tokens, EXPERTS)).argsort(2)[..., :TOP_K]


steps = st.lists(  # of each step: how many tokens, a seed for what they choose, and wrong guesses
    st.tuples(st.sampled_from([1, 1, 1, 5]), st.integers(0, 2**32 - 1), st.booleans()), max_size=12
)
budgets = st.integers(EXPERTS, EXPERTS * LAYERS + 2)  # in extents


@settings(max_examples=60, deadline=None)
@given(steps, budgets, st.sampled_from(["lru", "learned", "whim"]))
def test_it_does_what_python_does(steps, extents, policy):
    run = Run(Memory(), extents, policy, record=True)
    other = LlamaEngine(Memory(), extents * EXTENT_BYTES, policy)
    other.record()
    try:
        for tokens, seed, wrong in steps:
            choice = choices(seed, tokens)
            for layer, rows in enumerate(choice):
                likely = np.unique(choice[min(layer + 1, LAYERS - 1)])
                likely = (likely + 1) % EXPERTS if wrong else likely
                if tokens > 1:
                    run.engine.note(layer, rows)
                    run.engine.at_once.make_ready(layer, rows, likely.tolist)
                else:
                    assert run.decode(layer, rows[0], likely) == READY
                other.note(layer, rows)
                other.at_once.make_ready(layer, rows, likely.tolist)
                for expert in np.unique(rows).tolist():
                    assert run.memory.holds(layer, expert)
                assert len(run.memory.settled_content(run.engine)) <= extents
                assert run.engine.snapshot().hits == other.snapshot().hits
                for ours, others in zip(
                    run.engine.residency.pools.caches, other.residency.pools.caches, strict=True
                ):
                    assert ours.resident == others.resident
        if steps:
            ours, others = run.engine.trace(), other.trace()
            assert np.array_equal(ours.experts, others.experts)
            assert np.array_equal(ours.step, others.step)
    finally:
        other.close()
        run.engine.close()


@pytest.mark.parametrize("records", [False, True])
def test_who_looks_on_sees_every_choice_in_order(records):
    """Those of machine code, and of Python in between; a record beside it has them too."""
    run = Run(Memory(), EXPERTS * LAYERS, "lru")
    if records:
        run.engine.record()
    run.engine.watch_choices(True)
    served = []
    for step, tokens in enumerate([1, 1, 5, 1]):
        for layer, rows in enumerate(choices(step, tokens)):
            if tokens > 1:
                run.engine.note(layer, rows)
                run.engine.at_once.make_ready(layer, rows, rows[0].tolist)
            else:
                assert run.decode(layer, rows[0], rows[0]) == READY
            served.append((layer, rows.tolist()))
    seen = run.engine.take_choices()
    assert [(choice.layer, choice.rows.tolist()) for choice in seen] == served
    if records:
        assert len(run.engine.trace().experts) == 8
    run.engine.watch_choices(False)
    run.decode(0, np.arange(TOP_K), np.arange(TOP_K))
    assert run.engine.take_choices() == []
    run.engine.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.sets(st.integers(0, 23), max_size=3)),
                max_size=8), budgets)  # fmt: skip
def test_whatever_fails_to_be_read_nothing_wrong_is_computed(steps, extents):
    run = Run(Memory(), extents, "lru")
    try:
        for seed, broken in steps:
            run.memory.broken = {divmod(number, EXPERTS) for number in broken}
            choice = choices(seed, 1)[:, 0]
            for layer, chosen in enumerate(choice):
                likely = choice[min(layer + 1, LAYERS - 1)]
                try:
                    run.serve(layer, chosen, likely)
                except FlashMoEError:
                    break
                for expert in chosen.tolist():
                    assert run.memory.holds(layer, expert)
                assert len(run.memory.settled_content(run.engine)) <= extents
    finally:
        run.engine.close()


def test_half_of_a_wrong_guess_is_emptied_before_it_is_used():
    """Its other half was taken back before a thread came to it."""
    memory, begun = Memory(), []
    run, read = Run(memory, EXPERTS * LAYERS, "lru"), memory._read
    whole = run.engine.at_once.whole  # guesses pay however slow the machine is
    whole.record[MISSES], whole.queue.times[GUESS_LIMIT] = 1e9, np.inf
    first_halves, all_halves = threading.Event(), threading.Event()

    def when_let(descriptor, buffers, offset):
        is_late = offset % EXTENT_BYTES != 0
        expert = offset // EXTENT_BYTES % EXPERTS
        begun.append((expert, is_late))
        gate = first_halves if expert in (5, 6) and not is_late else all_halves
        assert gate.wait(60)
        return read(descriptor, buffers, offset)

    some = np.array([0, 1])
    run.serve(0, some, some)
    run.serve(1, some, some)  # all that is needed below is there
    memory.settled_content(run.engine)  # nothing is on its way that would be taken for a guess
    read_through(when_let)
    run.serve(0, some, np.array([5, 6]))
    wait_until(lambda: len(begun) == 4)  # no more guesses are read at once
    run.serve(0, some, np.array([2, 3]))
    first_halves.set()
    wait_until(lambda: {(2, False), (3, False)} <= set(begun))
    run.serve(0, some, some)
    all_halves.set()
    content = memory.settled_content(run.engine)
    assert {(1, 2), (1, 3)} <= content.keys()
    assert all(memory.holds(1, expert, 0) and not memory.holds(1, expert) for expert in (2, 3))
    read_through(read)
    run.serve(1, np.array([2, 3]), some)
    assert memory.holds(1, 2)
    assert memory.holds(1, 3)
    run.engine.close()


def wait_until(reached):
    until = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_failed_read_is_told_and_the_next_one_comes():
    run = Run(Memory(), EXPERTS * LAYERS, "lru")
    run.memory.broken = {(0, 3)}
    chosen = np.array([3, 4])
    assert run.decode(0, chosen, chosen) == FAILED
    with pytest.raises(FlashMoEError, match="expert 3 of 0"):
        run.engine.end(0, FAILED)
    assert (0, 3) not in run.memory.settled_content(run.engine)
    run.memory.broken = set()
    assert run.decode(0, chosen, chosen) == READY
    assert run.memory.holds(0, 3) and run.memory.holds(0, 4)
    run.engine.close()


@pytest.fixture
def slow():
    """A run whose late reads wait for `go`."""
    run = Run(Memory(), EXPERTS * LAYERS, "lru")
    run.go = threading.Event()

    def read(descriptor, buffers, offset):
        if offset % EXTENT_BYTES:
            run.go.wait(20)
        return run.memory._read(descriptor, buffers, offset)

    read_through(read)
    yield run
    run.go.set()
    run.engine.close()


def test_late_reads_are_awaited_apart(slow):
    chosen = np.array([3, 4])
    assert slow.begin(0, chosen, np.array([5])) == PART
    assert all(slow.memory.holds(0, expert, part=0) for expert in (3, 4))
    assert not any(slow.memory.holds(0, expert) for expert in (3, 4))
    threading.Timer(0.1, slow.go.set).start()
    assert slow.rest(0) == READY
    assert all(slow.memory.holds(0, expert) for expert in (3, 4))
    assert slow.rest(0) == PYTHON  # nothing is awaited any more
    assert slow.decode(0, chosen, np.array([5])) == READY


def test_a_late_read_that_fails_is_told_before_it_is_used(slow):
    chosen = np.array([3, 4])
    assert slow.begin(0, chosen, np.array([5])) == PART
    slow.memory.broken = {(0, 3)}
    slow.go.set()
    assert slow.rest(0) == FAILED
    with pytest.raises(FlashMoEError, match="expert 3 of 0"):
        slow.engine.end(0, FAILED)
    slow.memory.broken = set()
    assert slow.decode(0, chosen, np.array([5])) == READY
    assert all(slow.memory.holds(0, expert) for expert in (3, 4))


@pytest.mark.parametrize("then", ["another event", "a resize", "a reset"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_nobody_came_to_need_leaves_nothing_wrong(slow, then, fails):
    chosen = np.array([3, 4])
    assert slow.begin(0, chosen, np.array([5])) == PART
    slow.memory.broken = {(0, 3)} if fails else set()
    threading.Timer(0.1, slow.go.set).start()
    if then == "another event":
        assert slow.begin(1, chosen, np.array([5])) == PYTHON
        slow.engine.note(1, chosen[None])
        slow.engine.at_once.make_ready(1, chosen[None])
        assert all(slow.memory.holds(1, expert) for expert in (3, 4))
    elif then == "a resize":
        slow.engine.resize(EXPERTS * EXTENT_BYTES)
    else:
        slow.engine.reset()
    slow.memory.broken = set()
    content = slow.memory.settled_content(slow.engine)
    assert ((0, 3) in content) == (then != "a reset" and not fails)
    slow.engine.decoder.arm()
    assert slow.decode(0, chosen, np.array([5])) == READY
    assert all(slow.memory.holds(0, expert) for expert in (3, 4))


@pytest.mark.parametrize("fails", [False, True])
def test_late_reads_come_also_where_the_budget_changes_meanwhile(slow, fails):
    chosen, engine = np.array([3, 4]), slow.engine
    assert slow.begin(0, chosen, np.array([5])) == PART
    engine.follower._ended.clear()  # somebody follows
    with ThreadPoolExecutor(1) as graph:  # a graph is computed
        graph.submit(engine._computing.acquire).result()
        engine.adjust(EXPERTS * EXTENT_BYTES)
        assert engine.memory_bytes == EXPERTS * EXTENT_BYTES
        slow.memory.broken = {(0, 3)} if fails else set()
        slow.go.set()
        assert slow.rest(0) == PYTHON
        if fails:
            with pytest.raises(FlashMoEError, match="expert 3 of 0"):
                engine.at_once.await_late()
        else:
            engine.at_once.await_late()
            assert all(slow.memory.holds(0, expert) for expert in (3, 4))
        graph.submit(engine._computing.release).result()
    slow.memory.broken = set()
    engine.decoder.arm()
    assert slow.decode(0, chosen, np.array([5])) == READY
    assert all(slow.memory.holds(0, expert) for expert in (3, 4))


def test_what_is_unusual_is_left_to_python():
    run = Run(Memory(), EXPERTS * LAYERS, "lru")
    chosen = np.array([3, 4])
    run.tensors.words[0, SHAPE + 1] = 2
    assert run.decode(0, chosen, chosen) == PYTHON  # two tokens
    run.tensors.words[0, SHAPE + 1] = 1
    for unusual in ([3, 3], [3, EXPERTS], [-1, 3]):
        assert run.decode(0, np.array(unusual), chosen) == PYTHON
    assert run.decode(LAYERS, chosen, chosen) == PYTHON  # a layer that is not ours
    with ThreadPoolExecutor(1) as thread:  # somebody changes the engine
        thread.submit(run.engine.lock.acquire).result()
        assert run.decode(0, chosen, chosen) == PYTHON
        thread.submit(run.engine.lock.release).result()
    assert run.engine.snapshot().requests == 0
    run.engine.resize(EXPERTS * EXTENT_BYTES)
    assert run.decode(0, chosen, chosen) == PYTHON  # until it is armed anew
    run.engine.decoder.arm()
    assert run.decode(0, chosen, chosen) == READY
    run.engine.close()
    assert run.decode(0, chosen, chosen) == PYTHON


def test_a_file_that_changes_is_noticed(tmp_path):
    memory = Memory()
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    descriptor = os.open(path, os.O_RDONLY)
    status = os.fstat(descriptor)
    identity = descriptor, status.st_size, status.st_mtime_ns
    memory.files = [SimpleNamespace(identities=[identity], drop_experts=lambda: None)]
    run = Run(memory, EXPERTS * LAYERS, "lru")
    chosen = np.array([3, 4])
    assert run.decode(0, chosen, chosen) == READY
    path.write_bytes(b"another")
    memory.changed = True
    assert run.decode(1, np.array([0, 1]), chosen) == CHANGED  # after a read
    with pytest.raises(OSError, match="changed"):
        run.engine.end(1, CHANGED)
    assert not {(1, 0), (1, 1)} & set(memory.settled_content(run.engine))
    assert run.decode(0, chosen, chosen) == PYTHON  # which asks for the file too
    run.engine.close()
    os.close(descriptor)


def test_each_sequence_has_its_own_tokens_in_the_record():
    run = Run(Memory(), EXPERTS * LAYERS, "lru", record=True)
    for length in (2, 3):
        run.engine.next_sequence()
        for token in range(length):
            for layer, chosen in enumerate(choices(token, 1)[:, 0]):
                assert run.decode(layer, chosen, chosen) == READY
    assert run.engine.trace().sequence.tolist() == [0, 0, 1, 1, 1]
    run.engine.close()


def test_a_reset_begins_with_nothing():
    run = Run(Memory(), EXPERTS * LAYERS, "lru")
    assert run.decode(0, np.array([3, 4]), np.array([5])) == READY
    assert run.engine.snapshot().experts_seconds > 0
    run.engine.reset()
    stats = run.engine.snapshot()
    assert stats.experts_seconds == stats.wait_seconds == stats.policy_seconds == 0
    assert stats.resident_bytes == stats.peak_resident_bytes == stats.requests == 0
    run.engine.close()
