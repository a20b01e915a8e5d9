"""Which drive a read goes to, on simulated drives: so many seconds a byte, one by one."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.reading.drives import MOST_ERRORS, NONE, Drives, begin, choose, end

READ_BYTES, READS = 1000, 4000


def shares(seconds_a_byte: list[float], at_once: int, make=Drives.lists) -> list[float]:
    """Of all bytes each drive's part, with so many reads under way."""
    drives, free_at, now = make(len(seconds_a_byte)), [0.0] * len(seconds_a_byte), 0.0
    under_way: list[tuple[float, int, float, int]] = []
    for _ in range(READS):
        if len(under_way) == at_once:
            now, drive, began, queued = heapq.heappop(under_way)
            end(drives, drive, READ_BYTES, READ_BYTES, queued, now - began)
        drive = choose(drives, READ_BYTES, 0)
        queued = begin(drives, drive, READ_BYTES)
        free_at[drive] = max(now, free_at[drive]) + READ_BYTES * seconds_a_byte[drive]
        heapq.heappush(under_way, (free_at[drive], drive, now, queued))
    return [float(count / sum(drives.read_bytes)) for count in drives.read_bytes]


@pytest.mark.parametrize("make", [Drives.lists, Drives.arrays])
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_drives_that_are_alike_share_evenly(at_once, make):
    assert shares([1e-9, 1e-9], at_once, make) == pytest.approx([0.5, 0.5], abs=0.02)
    assert shares([1e-9] * 3, at_once, make) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_a_slow_drive_is_not_waited_for_but_is_tried_again():
    fast, slow = shares([1e-9, 10e-9], 1)
    assert 0 < slow < 0.01 < fast
    fast, slow = shares([1e-9, 2e-9], 8)
    assert slow == pytest.approx(1 / 3, abs=0.05)  # so that both are done at once


@given(st.lists(st.integers(0, MOST_ERRORS + 1), min_size=1, max_size=4), st.integers(0, 15))
def test_a_drive_that_failed_often_comes_last(errors, tried):
    drives = Drives.lists(len(errors))
    drives.errors[:] = errors
    order = []
    while (drive := choose(drives, READ_BYTES, tried)) != NONE:
        assert not tried >> drive & 1
        tried |= 1 << drive
        order.append(errors[drive] >= MOST_ERRORS)
    assert order == sorted(order)
    assert all(tried >> drive & 1 for drive in range(len(errors)))
