"""What guesses of a layer's experts were worth, and so whether the next one is."""

from __future__ import annotations

import numpy as np

from flashmoe.util.machine_code import helper

# Of the last RECENT_GUESSES or so, the share that must have been right for every layer to be
# guessed; below it, one call in PROBE_EVERY is still answered (docs/speed.md#spare-slots).
RIGHT_ENOUGH, RECENT_GUESSES, PROBE_EVERY = 0.3, 64, 16
# Positions in a record, float64. Of late: MISSES of an event, seconds of ASKING a router. OFF:
# calls that were refused.
RIGHT, CALLS, USED, WASTED, WASTED_BYTES, MISSES, ASKING, OFF = range(8)
_RECENT_EVENTS = 64


@helper
def is_worth_a_call(record):
    """Shall a layer be guessed? Each question counts as a call."""
    record[CALLS] += 1
    return _answer(record, record[RIGHT] >= RIGHT_ENOUGH)


@helper
def _answer(record, is_worth_it):
    """One call in PROBE_EVERY is not refused whatever guesses were worth."""
    refused = not (is_worth_it or record[CALLS] % PROBE_EVERY == 0)
    record[OFF] += refused
    return not refused


@helper
def saves_time(record, read_seconds):
    """Does a guess save more time of reading than it takes? The call was counted already."""
    saved_seconds = record[MISSES] * record[RIGHT] * read_seconds
    return _answer(record, saved_seconds >= record[ASKING])


@helper
def add_event(record, misses):
    """So many experts of an event were missing, guessed or not."""
    record[MISSES] += (misses - record[MISSES]) / _RECENT_EVENTS


@helper
def add_guess(record, seconds):
    """A router was asked for so long."""
    record[ASKING] += (seconds - record[ASKING]) / RECENT_GUESSES


@helper
def add_right(record):
    """A miss was needed that a guess had begun to read."""
    record[USED] += 1
    record[RIGHT] += (1 - record[RIGHT]) / RECENT_GUESSES


@helper
def add_wrong(record, bytes_read):
    """A guess had been begun in vain."""
    record[WASTED] += 1
    record[WASTED_BYTES] += bytes_read
    record[RIGHT] -= record[RIGHT] / RECENT_GUESSES


class GuessRecord:
    """The counts of one model's guesses, in an array that machine code writes to as well."""

    def __init__(self) -> None:
        self.array = np.zeros(8)
        self.array[RIGHT] = 1  # the recent share of guesses begun that were needed

    def is_worth_a_call(self) -> bool:
        return bool(is_worth_a_call(self.array))

    def saves_time(self, read_seconds: float) -> bool:
        """Shall a layer be guessed, whose experts take so long to read? Counts as a call."""
        return self.is_worth_a_call() and bool(saves_time(self.array, read_seconds))

    def add_event(self, misses: int) -> None:
        add_event(self.array, misses)

    def add_guess(self, seconds: float) -> None:
        add_guess(self.array, seconds)

    def add_right(self) -> None:
        add_right(self.array)

    def add_wrong(self, bytes_read: int) -> None:
        add_wrong(self.array, bytes_read)

    @property
    def used(self) -> int:
        """Misses that a guess had begun to read."""
        return int(self.array[USED])

    @property
    def wasted(self) -> int:
        """Guesses begun in vain."""
        return int(self.array[WASTED])

    @property
    def wasted_bytes(self) -> int:
        return int(self.array[WASTED_BYTES])

    @property
    def off(self) -> int:
        """Times that a layer was not guessed, because it would not have paid."""
        return int(self.array[OFF])

    def reset_counts(self) -> None:
        self.array[[USED, WASTED, WASTED_BYTES, OFF]] = 0
