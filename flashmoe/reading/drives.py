"""Which of several drives gives the bytes that all of them have.

The same few functions choose in Python, on lists, and in machine code, on arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashmoe.util.machine_code import helper

MOST_ERRORS = 3  # of a drive; after these only what no other drive has is read from it
NONE = -1
_FIRST_SECONDS_A_BYTE = 1e-9  # until a read has told
_MEMORY = 16  # reads over which a drive's speed is averaged
# A drive that looks slow is forgiven by so much with each read that others get: were it never asked
# again, nobody would see that it is fast now. One ten times slower gets a read in 300.
_FORGIVEN = 1 / 512


class Drives(NamedTuple):
    """What is known of each drive, by its number."""

    waiting_bytes: Any  # int64, or a list: of reads that are under way
    seconds_a_byte: Any  # float64, or a list: of late
    errors: Any  # int64, or a list: reads that failed
    last_failure: Any  # int64, or a list: of the last of these, see `pread.read_bytes`
    read_bytes: Any  # int64, or a list: that came

    @classmethod
    def lists(cls, count: int) -> Drives:
        zeros = [[0] * count for _ in range(4)]
        return cls(zeros[0], [_FIRST_SECONDS_A_BYTE] * count, *zeros[1:])

    @classmethod
    def arrays(cls, count: int) -> Drives:
        kinds = np.int64, np.float64, np.int64, np.int64, np.int64
        values = zip(cls.lists(count), kinds, strict=True)
        return cls(*(np.array(value, kind) for value, kind in values))


@helper
def choose(drives, size_bytes, tried):
    """The drive that would be the first to be done with a read; NONE: all were tried.

    tried: a bit for each drive that must not be it. One that failed often comes last.
    """
    for is_last_resort in (False, True):
        best, least = NONE, 0.0
        for drive in range(len(drives.errors)):
            if tried >> drive & 1 or (drives.errors[drive] >= MOST_ERRORS) != is_last_resort:
                continue
            seconds = (drives.waiting_bytes[drive] + size_bytes) * drives.seconds_a_byte[drive]
            if best == NONE or seconds < least:
                best, least = drive, seconds
        if best != NONE:
            break
    return best


@helper
def begin(drives, drive, size_bytes):
    """A read begins; returns the bytes that the drive then has to bring, for `end`."""
    for other in range(len(drives.errors)):
        if other != drive:
            drives.seconds_a_byte[other] *= 1 - _FORGIVEN
    drives.waiting_bytes[drive] += size_bytes
    return drives.waiting_bytes[drive]


@helper
def end(drives, drive, size_bytes, read_bytes, queued_bytes, seconds):
    """A read has ended. read_bytes: that came; queued_bytes: what `begin` returned."""
    drives.waiting_bytes[drive] -= size_bytes
    drives.read_bytes[drive] += read_bytes
    if read_bytes == size_bytes:
        taken = seconds / queued_bytes  # the drive brought about so much meanwhile
        drives.seconds_a_byte[drive] += (taken - drives.seconds_a_byte[drive]) / _MEMORY


def is_left_alone(errors: int) -> bool:
    """After so many errors a drive is asked only for what no other has."""
    return errors >= MOST_ERRORS


def what_happens(where: object, error: object, errors: int) -> str | None:
    """What the user should know of a drive's error, once each; None: nothing new."""
    if errors == 1:
        return f"{where}: a read failed ({error}); the other copy is read in its place"
    if errors == MOST_ERRORS:
        return f"{where}: {errors} reads failed: it is left alone from now on; look at this drive"
    return None
