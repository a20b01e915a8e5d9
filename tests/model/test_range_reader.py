"""Ranges of files come whole to where they belong, what is needed first, or fail in a sentence."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.errors import FlashMoEError
from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import kernel
from flashmoe.reading.drives import MOST_ERRORS
from flashmoe.reading.pread import read_through
from flashmoe.reading.range_reader import PlacedExperts, RangeRead, RangeReader
from flashmoe.reading.range_work import start, take_back
from flashmoe.store.manifest import LayerSpec, Manifest

EXPERTS, LAYERS, RANGES, RANGE_BYTES = 4, 2, 3, 100


class Experts(PlacedExperts):
    """Each expert is three ranges, a third of the file apart, and has a row of `memory`."""

    remedy = "fetch it again"
    path = Path("a file")
    direct = True

    def __init__(self, n_copies: int = 1) -> None:
        layers = tuple(LayerSpec(f"blk.{n}", EXPERTS, 0, 0, ()) for n in range(LAYERS))
        self.manifest = Manifest("", "", 2, "", "", 0, layers)
        shape = (RANGES, LAYERS * EXPERTS, RANGE_BYTES)
        self.content = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
        self.memory = np.zeros(shape, np.uint8)
        self.descriptor = os.memfd_create("experts")
        os.write(self.descriptor, self.content.tobytes())
        if n_copies > 1:
            others = [os.memfd_create("a copy") for _ in range(n_copies - 1)]
            for other in others:
                os.write(other, self.content.tobytes())
            self.copies = np.array([[-1] * n_copies, [self.descriptor, *others]])
            self.places = [f"drive {number}" for number in range(n_copies)]
        count = LAYERS * EXPERTS
        offsets = np.arange(RANGES * count).reshape(RANGES, count).T * RANGE_BYTES
        self.pages = np.zeros((count, 1, 2), np.int64)
        self.n_ranges = np.full(count, RANGES)
        self.ranges = np.zeros((count, RANGES, 8), np.int64)
        address, size = self.memory.ctypes.data + offsets, RANGE_BYTES
        late = np.arange(RANGES) == RANGES - 1
        columns = self.descriptor, offsets, address, size, size, 0, late, np.arange(count)[:, None]
        for column, values in enumerate(columns):
            self.ranges[:, :, column] = values

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        for descriptor in [self.descriptor] if self.copies is None else self.copies[1]:
            os.close(descriptor)

    def is_there(self, layer: int, expert: int) -> bool:
        row = layer * EXPERTS + expert
        return bool((self.memory[:, row] == self.content[:, row]).all())


def demand(reader: RangeReader, layer: int, expert: int) -> RangeRead:
    return reader.submit(layer, [(expert, memoryview(b""))])[0]


def guess(reader: RangeReader, layer: int, expert: int) -> RangeRead:
    """As machine code does that fills places."""
    reader.queue.start_threads()
    number = layer * EXPERTS + expert
    kernel(start, Policy)(reader.queue.shared, reader.backend.ranges[number], True)
    return RangeRead(reader, layer, expert, number)


def take(read: RangeRead, reader: RangeReader, *, needed: bool) -> None:
    kernel(take_back, Policy)(reader.queue.shared, read.ticket, needed)


@pytest.fixture
def reader():
    reader = RangeReader(Experts(), readers=2)
    yield reader
    read_through(None)
    reader.close()


choices = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), unique=True)


@settings(max_examples=60, deadline=None)
@given(choices, st.integers(0, 7), st.sampled_from(["promote", "cancel", "leave"]), st.booleans())
def test_what_is_demanded_comes_and_nothing_else(experts, guesses, then, short):
    reader = RangeReader(Experts(), readers=3)
    if short:  # a drive may give less than it was asked for
        read_through(lambda fd, buffers, at: os.preadv(fd, [buffers[0][:33]], at))
    try:
        guessed = [guess(reader, *at) for at in experts[:guesses]]
        demanded = [demand(reader, *at) for at in experts[guesses:]]
        for read in guessed:
            if then != "leave":
                take(read, reader, needed=then == "promote")
        for read in guessed + demanded:
            assert read.exception() is None
            assert read.done()
        for read in demanded if then == "cancel" else guessed + demanded:
            assert reader.backend.is_there(read.layer, read.expert)
        assert reader.bytes_read == sum(read.bytes_read for read in guessed + demanded)
        assert np.count_nonzero(reader.backend.memory) == reader.bytes_read
    finally:
        read_through(None)
        reader.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(choices, min_size=1, max_size=4),
    st.integers(2, 3),
    st.sets(st.integers(0, 2)),
    st.sampled_from(["error", "end", "short"]),
)
def test_every_byte_comes_once_while_one_copy_is_sound(rounds, n_copies, broken, fault):
    experts = Experts(n_copies)
    reader = RangeReader(experts, readers=3)
    broken &= set(range(n_copies))
    bad = {int(experts.copies[1, drive]) for drive in broken}
    is_readable = len(broken) < n_copies or fault == "short"

    def preadv(descriptor, buffers, at):
        if descriptor not in bad:
            return os.preadv(descriptor, buffers, at)
        if fault == "error":
            raise OSError(5, os.strerror(5))
        return 0 if fault == "end" else os.preadv(descriptor, [buffers[0][:7]], at)

    read_through(preadv)
    try:
        for wanted in rounds:
            experts.memory[:] = 0
            reader.reset_counts()
            reads = [demand(reader, *at) for at in wanted]
            for read in reads:
                error = read.exception()
                assert error is None if is_readable else isinstance(error, FlashMoEError)
            if is_readable:
                assert all(experts.is_there(*at) for at in wanted)
                size = len(wanted) * RANGES * RANGE_BYTES
                assert reader.bytes_read == np.count_nonzero(experts.memory) == size
        if is_readable:
            asked = sum(map(len, rounds)) * RANGES * RANGE_BYTES
            assert sum(reader.bytes_by_drive) == asked
            failing = broken if fault != "short" else set()
            assert all(reader.bytes_by_drive[drive] == 0 for drive in failing)
        assert not reader.queue.shared.drives.waiting_bytes.any()
    finally:
        read_through(None)
        reader.close()


def test_a_failing_drive_is_told_of_once_and_left_alone(caplog):
    experts = Experts(2)
    reader = RangeReader(experts, readers=2)
    bad, calls = int(experts.copies[1, 1]), []

    def preadv(descriptor, buffers, at):
        if descriptor == bad:
            calls.append(at)
            raise OSError(5, os.strerror(5))
        return os.preadv(descriptor, buffers, at)

    read_through(preadv)
    for _ in range(40):
        demand(reader, 0, 1).result()
    read_through(None)
    reader.close()  # its threads have told all
    assert MOST_ERRORS <= len(calls) <= MOST_ERRORS + 1  # one more thread may be at it
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "drive 1: a read failed (Input/output error); the other copy is read in its place",
        "drive 1: 3 reads failed: it is left alone from now on; look at this drive",
    ]


def test_demands_go_before_guesses_that_wait(reader):
    order, may_go = [], threading.Event()

    def slow(descriptor, buffers, offset):
        may_go.wait(20)
        order.append(offset // RANGE_BYTES % (LAYERS * EXPERTS))
        return os.preadv(descriptor, buffers, offset)

    read_through(slow)
    first = demand(reader, 0, 0)
    guessed = guess(reader, 1, 1)
    second = demand(reader, 0, 2)
    may_go.set()
    for read in (first, guessed, second):
        read.result()
    assert set(order[-RANGES:]) == {EXPERTS + 1}


def test_a_failed_read_names_its_expert(reader):
    def broken(descriptor, buffers, offset):
        raise OSError(5, os.strerror(5))

    read_through(broken)
    read = demand(reader, 1, 3)
    with pytest.raises(FlashMoEError, match=r"a file: expert 3 of blk\.1 .*Input/output error"):
        read.result()
    read_through(None)
    read = demand(reader, 1, 3)
    read.result()
    assert reader.backend.is_there(1, 3)


def test_a_file_that_ends_early_is_told_from_a_broken_drive(reader):
    os.truncate(reader.backend.descriptor, RANGE_BYTES)
    read = demand(reader, 0, 0)
    with pytest.raises(FlashMoEError, match="cut short"):
        read.result()


def test_it_reads_on_in_a_forked_child(reader):
    read = demand(reader, 0, 0)
    read.result()
    reader.stand_still()
    child = os.fork()
    if child == 0:
        reader.go_on(in_child=True)
        read = demand(reader, 1, 1)
        os._exit(0 if read.exception() is None and reader.backend.is_there(1, 1) else 1)
    reader.go_on(in_child=False)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    read = demand(reader, 0, 1)
    read.result()
    assert reader.backend.is_there(0, 1)
