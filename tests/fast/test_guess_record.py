"""What guesses were worth decides whether the next one is made."""

from __future__ import annotations

from flashmoe.residency.guess_record import (
    PROBE_EVERY,
    GuessRecord,
    add_event,
    add_guess,
    saves_time,
)

READ_SECONDS, GUESS_SECONDS = 1e-3, 1e-4


def asked(reads: int, events: int = 1000) -> list[bool]:
    """Of each of PROBE_EVERY calls after many such events: does a guess save time?"""
    record = GuessRecord()
    for _ in range(events):
        add_event(record.array, reads)
        add_guess(record.array, GUESS_SECONDS)
    answers = []
    for _ in range(PROBE_EVERY):
        assert record.is_worth_a_call()
        answers.append(bool(saves_time(record.array, READ_SECONDS)))
    return answers


def test_a_guess_is_made_where_it_saves_more_reading_than_it_takes():
    assert all(asked(reads=1))


def test_where_nothing_is_read_one_guess_of_many_is_made():
    assert asked(reads=0).count(True) == 1


def test_wrong_guesses_save_nothing():
    record = GuessRecord()
    for _ in range(1000):
        add_event(record.array, 1)
        add_guess(record.array, GUESS_SECONDS)
        record.add_wrong(1)
    record.is_worth_a_call()
    assert not saves_time(record.array, READ_SECONDS)
