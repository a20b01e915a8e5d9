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
from flashmoe.reading.range_reader import PlacedExperts, RangeReader
from flashmoe.reading.range_work import read_through
from flashmoe.store.manifest import LayerSpec, Manifest

EXPERTS, LAYERS, RANGES, RANGE_BYTES = 4, 2, 3, 100


class Experts(PlacedExperts):
    """Each expert is three ranges, a third of the file apart, and has a row of `memory`."""

    remedy = "fetch it again"
    path = Path("a file")
    direct = True
    most_ranges = RANGES

    def __init__(self) -> None:
        layers = tuple(LayerSpec(f"blk.{n}", EXPERTS, 0, 0, ()) for n in range(LAYERS))
        self.manifest = Manifest("", "", 2, "", "", 0, layers)
        shape = (RANGES, LAYERS * EXPERTS, RANGE_BYTES)
        self.content = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
        self.memory = np.zeros(shape, np.uint8)
        self.descriptor = os.memfd_create("experts")
        os.write(self.descriptor, self.content.tobytes())

    def ranges(self, layer: int, expert: int, ticket: int) -> np.ndarray:
        offsets = [(n * LAYERS * EXPERTS + ticket) * RANGE_BYTES for n in range(RANGES)]
        base = self.memory.ctypes.data
        size = RANGE_BYTES
        return np.array(
            [(self.descriptor, offset, base + offset, size, size, 0, ticket) for offset in offsets]
        )

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        os.close(self.descriptor)

    def is_there(self, layer: int, expert: int) -> bool:
        row = layer * EXPERTS + expert
        return bool((self.memory[:, row] == self.content[:, row]).all())


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
        guessed = [read for at in experts[:guesses] for read in reader.guess(at[0], [at[1]])]
        demanded = [read for at in experts[guesses:] for read in reader.demand(at[0], [at[1]])]
        for read in guessed:
            if then == "promote":
                reader.promote(read)
            elif then == "cancel":
                reader.cancel(read)
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


def test_demands_go_before_guesses_that_wait(reader):
    order, may_go = [], threading.Event()

    def slow(descriptor, buffers, offset):
        may_go.wait(20)
        order.append(offset // RANGE_BYTES % (LAYERS * EXPERTS))
        return os.preadv(descriptor, buffers, offset)

    read_through(slow)
    first = reader.demand(0, [0])
    guess = reader.guess(1, [1])
    second = reader.demand(0, [2])
    may_go.set()
    for read in first + guess + second:
        read.result()
    assert set(order[-RANGES:]) == {EXPERTS + 1}


def test_a_failed_read_names_its_expert(reader):
    def broken(descriptor, buffers, offset):
        raise OSError(5, os.strerror(5))

    read_through(broken)
    (read,) = reader.demand(1, [3])
    with pytest.raises(FlashMoEError, match=r"a file: expert 3 of blk\.1 .*Input/output error"):
        read.result()
    read_through(None)
    (read,) = reader.demand(1, [3])
    read.result()
    assert reader.backend.is_there(1, 3)


def test_a_file_that_ends_early_is_told_from_a_broken_drive(reader):
    os.truncate(reader.backend.descriptor, RANGE_BYTES)
    (read,) = reader.demand(0, [0])
    with pytest.raises(FlashMoEError, match="cut short"):
        read.result()


def test_it_reads_on_in_a_forked_child(reader):
    (read,) = reader.demand(0, [0])
    read.result()
    reader.stand_still()
    child = os.fork()
    if child == 0:
        reader.go_on(in_child=True)
        (read,) = reader.demand(1, [1])
        os._exit(0 if read.exception() is None and reader.backend.is_there(1, 1) else 1)
    reader.go_on(in_child=False)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    (read,) = reader.demand(0, [1])
    read.result()
    assert reader.backend.is_there(0, 1)
