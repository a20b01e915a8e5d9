"""Decides which budget suits the memory that is free now: facts in, bytes out."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe.memory.free_memory import reserve_of

# Of the reserve, which others may take before experts give back; of it all under pressure.
LOW_SHARE = 0.5
# Of the budget, which is given back at least, so that few steps do it.
LEAST_STEP_SHARE = 1 / 64
# Of all experts, by which a budget grows at most at once.
MOST_STEP_SHARE = 1 / 16
# Since memory was last short, and since a budget last grew; until then it does not grow.
CALM_SECONDS, STEP_SECONDS = 5.0, 1.0
# No program takes fresh memory faster, so that between two looks it cannot take all that is free.
FASTEST_BYTES_PER_SECOND = 4 << 30
SOONEST_SECONDS, LATEST_SECONDS = 0.05, 0.5


class Facts(NamedTuple):
    """What is known of memory at one look."""

    available_bytes: int  # that can be taken still
    falling_bytes: int  # that others took since the last look
    present_bytes: int  # what experts take
    memory_bytes: int  # the budget, which experts may come to take
    least_bytes: int  # the smallest budget
    most_bytes: int  # of all experts: more is of no use
    reserve_bytes: int  # stays free, or a share of what there is
    beside_bytes: int  # what the rest of the model may still take beyond the reserve
    pressed: bool  # programs wait for memory
    calm_seconds: float  # since memory was last short
    steady_seconds: float  # since the budget last grew


def budget_bytes(facts: Facts) -> int:
    """The budget from now on; `facts.memory_bytes` where it shall stay.

    It counts as filled. It shrinks at once by all that is missing, to where the reserve is free
    again if others go on taking for one look more. It grows in steps, where there is room for all.
    """
    now = facts.memory_bytes
    reserve = reserve_of(facts.available_bytes + facts.present_bytes, facts.reserve_bytes)
    ahead = facts.available_bytes - facts.falling_bytes
    unfilled = max(0, min(now, facts.most_bytes) - facts.present_bytes)
    if ahead - unfilled < reserve * (1.0 if facts.pressed else LOW_SHARE):
        wanted = facts.present_bytes - (reserve - ahead)
        step = int(now * LEAST_STEP_SHARE)
        return min(now, max(facts.least_bytes, min(wanted, now - step)))
    if facts.pressed or facts.calm_seconds < CALM_SECONDS or facts.steady_seconds < STEP_SECONDS:
        return now
    room = ahead - reserve - facts.beside_bytes - unfilled
    step = int(facts.most_bytes * MOST_STEP_SHARE)
    if room < min(step, int(reserve * (1 - LOW_SHARE) / 2)):
        return now  # it would soon be given back
    return max(now, min(facts.most_bytes, now + min(room, step)))


def look_again_seconds(available_bytes: int) -> float:
    """How long nobody needs to look, with so much free."""
    seconds = available_bytes / FASTEST_BYTES_PER_SECOND
    return min(LATEST_SECONDS, max(SOONEST_SECONDS, seconds))
