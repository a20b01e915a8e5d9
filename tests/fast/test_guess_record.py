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
