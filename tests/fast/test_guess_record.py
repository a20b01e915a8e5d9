"""What guesses were worth decides whether the next one is made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.residency.guess_record import (
    PROBE_EVERY,
    GuessRecord,
    add_event,
    add_guess,
    saves_time,
)

READ_SECONDS, GUESS_SECONDS = 1e-3, 1e-4


def after_events(misses: int, *, wrong: bool = False) -> GuessRecord:
    record = GuessRecord()
    for _ in range(1000):
        add_event(record.array, misses)
        add_guess(record.array, GUESS_SECONDS)
        if wrong:
            record.add_wrong(1)
    return record


def answers(record: GuessRecord) -> list[bool]:
    """Of PROBE_EVERY calls: does a guess save time?"""
    given = []
    for _ in range(PROBE_EVERY):
        assert record.is_worth_a_call()
        given.append(bool(saves_time(record.array, READ_SECONDS)))
    return given


def test_a_guess_is_made_where_it_saves_more_reading_than_it_takes():
    assert all(answers(after_events(misses=1)))


def test_where_nothing_is_missing_one_guess_of_many_is_made():
    assert answers(after_events(misses=0)).count(True) == 1


def test_wrong_guesses_save_nothing():
    record = after_events(misses=1, wrong=True)
    record.is_worth_a_call()
    assert not saves_time(record.array, READ_SECONDS)


_STEPS = st.lists(
    st.tuples(st.floats(0, 1e-2), st.floats(0, 1e-2), st.integers(0, 64), st.booleans()),
    max_size=200,
)


@given(_STEPS)
def test_every_refusal_is_counted_and_none_lasts(steps):
    """steps: what a read and an answer take, what an event lacks, whether a guess was right."""
    record, refused, in_a_row = GuessRecord(), 0, 0
    for read_seconds, asking_seconds, misses, right in steps:
        record.add_event(misses)
        if record.saves_time(read_seconds):
            in_a_row = 0
            record.add_guess(asking_seconds)
            record.add_right() if right else record.add_wrong(1)
        else:
            refused, in_a_row = refused + 1, in_a_row + 1
        assert in_a_row < PROBE_EVERY
        assert record.off == refused
    record.reset_counts()
    assert record.off == 0


def test_a_change_is_noticed_either_way():
    record, asking_seconds, answers_given = GuessRecord(), 1e-2, []
    for call in range(20_000):
        if call == 10_000:
            asking_seconds = 1e-4
        record.add_event(1)
        answers_given.append(record.saves_time(READ_SECONDS))
        if answers_given[-1]:
            record.add_guess(asking_seconds)
            record.add_right()
    assert sum(answers_given[9_000:10_000]) == pytest.approx(1_000 / PROBE_EVERY, abs=1)
    assert all(answers_given[19_000:])
