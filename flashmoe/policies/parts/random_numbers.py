"""Random numbers that compiled policies draw, the same in every replay."""

from __future__ import annotations

from flashmoe.util.machine_code import helper

MODULUS = 2**31


@helper
def draw(state):
    """The next of 0..MODULUS-1: a linear congruential generator, its `state` int64 [1]."""
    state[0] = (state[0] * 1103515245 + 12345) % MODULUS
    return state[0]


@helper
def uniform(state):
    """A number in [0, 1)."""
    return draw(state) / MODULUS
