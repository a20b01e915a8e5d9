"""The table of served answers, on a server that is made up."""

from __future__ import annotations

import time
from contextlib import contextmanager
from threading import Lock

import pytest

from flashmoe.errors import FlashMoEError
from harness.runs.served import Answer, Usage
from harness.tables import served_table


class MadeUp:
    """Answers each prompt with its length; the second request for a long prompt is quick."""

    def __init__(self, wrong_at=None, short=False):
        self.asked, self.hung_up, self.wrong_at, self.short = 0, 0, wrong_at, short
        self.known, self.lock = set(), Lock()

    def complete(self, prompt, tokens):
        with self.lock:
            self.asked += 1
            wrong = self.asked == self.wrong_at
        length = len(prompt.split())
        seconds = 0.1 if length > 1900 and prompt[:500] in self.known else 1.0
        self.known.add(prompt[:500])
        text = " wrong" if wrong else f" {length}"
        return Answer(text, tokens - self.short, length, seconds + tokens / 10)

    def stream(self, prompt, tokens):
        return self.complete(prompt, tokens).text, [tokens / 20]

    def hang_up(self, prompt, tokens):
        with self.lock:
            self.hung_up += 1

    @contextmanager
    def watched(self):
        yield

    def usage(self):
        return Usage(self.asked, 7, time.monotonic_ns())


@pytest.mark.parametrize("wrong_at", [None, 120])
def test_of_a_crowd_everyone_is_counted_once(wrong_at):
    served = MadeUp(wrong_at)
    row = served_table.crowd(served, served_table._Prompts(ids=False))
    assert row["requests"] == row["hung_up"] + row["equal"] + row["different"] == 200
    assert row["hung_up"] == 20
    assert served.hung_up == 25  # five of them while it warmed up
    assert row["different"] == (wrong_at is not None)
    assert row["threads_after"] - row["threads_before"] == 180 + 1


def test_a_second_turn_goes_on_where_the_first_ended():
    row = served_table.second_turn(MadeUp(), served_table._Prompts(ids=False))
    assert row["first_turn_tokens"] == served_table.TURN_TOKENS
    assert row["second_turn_tokens"] == served_table.TURN_TOKENS + 1 + 50
    assert row["second_turn_share"] == pytest.approx(0.2 / 1.1)


def test_decode_is_what_more_tokens_take_beside_plain_generation():
    row = served_table.decode(MadeUp(), "a b", lambda prompt: 0.2, 3)
    assert row["whole_tokens_per_second"] == pytest.approx(10)
    assert row["whole_of_plain"] == pytest.approx(2)
    assert row["streamed_of_plain"] == row["streamed_of_plain_max"] == pytest.approx(4)
    assert row["watched_of_whole"] == pytest.approx(1)
    with pytest.raises(FlashMoEError, match="of 96"):
        served_table.decode(MadeUp(short=True), "a b", lambda prompt: 0.2, 1)
