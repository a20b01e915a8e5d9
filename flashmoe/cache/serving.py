"""Who is in which slot and who makes room for whom, in functions that are compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashmoe.events import Event, event_at
from flashmoe.policies.parts.compiled import c_kernel, touch, victim
from flashmoe.util.by_address import view
from flashmoe.util.machine_code import helper

# Tokens times top_k above which an event is served in ascending order of expert, so that no
# outputs have to be kept for the order of their sum (docs/speed.md#long-prompts).
LONG_CHOICES = 4096
RESIDENT, FREE = 0, 1  # positions in `Residency.sizes`
TOKENS, REQUESTS, HITS, MOST = range(4)  # positions in `Residency.counts`


class Residency(NamedTuple):
    """Who is where. Arrays, so that compiled code can change them."""

    slot_of: np.ndarray  # [n_keys] int64, -1 when not resident
    residents: np.ndarray  # [n_slots] int64, keys in order of admission
    free: np.ndarray  # [n_slots] int64, a stack of empty slots
    sizes: np.ndarray  # [2] int64: how many of `residents` and of `free` count: RESIDENT, FREE
    candidates: np.ndarray  # [n_slots + 1] int64, scratch: who may be evicted
    protected: np.ndarray  # [n_keys] bool, all False between calls
    members: np.ndarray  # [n_keys] int64, scratch: an event's keys as they are served
    counts: np.ndarray  # [4] int64: TOKENS served; REQUESTS, HITS, MOST resident since a reset

    @classmethod
    def empty(cls, n_keys: int, n_slots: int) -> Residency:
        return cls(
            np.full(n_keys, -1),
            np.empty(n_slots, np.int64),
            np.arange(n_slots)[::-1].copy(),
            np.array([0, n_slots]),
            np.empty(n_slots + 1, np.int64),
            np.zeros(n_keys, np.bool_),
            np.empty(n_keys, np.int64),
            np.zeros(4, np.int64),
        )


@helper
def is_long(event):
    """Too long for its experts' outputs to be kept until those of lower experts are added."""
    return event.rows.size > LONG_CHOICES


@helper
def may_bypass(policy, n):
    """May an event of `n` experts leave some of them without a slot?"""
    return n <= policy.bypass_slots


@helper
def begin(policy, residency, event):
    """Count the event, tell the policy, set `members` in the order of serving; how many hit.

    Hits come first, then the others. A long event in more than one wave is served in ascending
    order, where a hit stays resident until its turn.
    """
    counts, members = residency.counts, residency.members
    touch(policy, event, counts[TOKENS])
    hits = 0
    for key in event.keys:
        if residency.slot_of[key] >= 0:
            members[hits] = key
            hits += 1
    n = hits
    for key in event.keys:
        if residency.slot_of[key] < 0:
            members[n] = key
            n += 1
    n_slots = len(residency.residents)
    if is_long(event) and n > n_slots and not may_bypass(policy, n):
        members[:n] = np.sort(members[:n])
        if hits == n_slots:  # the lowest hit goes first, so that there is a slot to read into
            lowest = 0
            while residency.slot_of[members[lowest]] < 0:
                lowest += 1
            key = members[lowest]
            for i in range(lowest, 0, -1):
                members[i] = members[i - 1]
            members[0] = key
    counts[TOKENS] += len(event.rows)
    counts[REQUESTS] += len(event.keys)
    counts[HITS] += hits
    return hits


@helper
def next_wave(policy, residency, n, start):
    """Make the `n` members from `start` on resident until no slot is left; where this wave ends.

    None that is still to be served makes room. Where the event may bypass, it is one wave, and
    whom the policy does not keep has no slot afterwards.
    """
    room, members = len(residency.residents), residency.members[:n]
    bypass = may_bypass(policy, n)
    for key in members[start:]:
        residency.protected[key] = not bypass
        if residency.slot_of[key] >= 0:
            room -= 1
    end = start
    while end < len(members):
        key = members[end]
        if residency.slot_of[key] < 0:
            if room <= 0 and not bypass:
                break
            room -= 1
            _admit(policy, residency, key, bypass)
        end += 1
    for key in members[start:]:
        residency.protected[key] = False
    residency.counts[MOST] = max(residency.counts[MOST], residency.sizes[RESIDENT])
    return end


@helper
def serve(policy, residency, event):
    """All waves of `event`."""
    n = len(event.keys)
    done = n if begin(policy, residency, event) == n else 0
    while done < n:
        done = next_wave(policy, residency, n, done)


@helper
def _admit(policy, residency, key, bypass):
    """Give `key` a free slot, or that of the resident whom the policy chooses.

    bypass: it may choose `key` itself, which gets no slot then.
    """
    if residency.sizes[FREE]:
        residency.sizes[FREE] -= 1
        slot = residency.free[residency.sizes[FREE]]
    else:
        n = 0
        for resident in residency.residents[: residency.sizes[RESIDENT]]:
            if not residency.protected[resident]:
                residency.candidates[n] = resident
                n += 1
        if bypass:
            residency.candidates[n] = key
            n += 1
        evicted = victim(policy, residency.candidates[:n])
        if evicted == key:
            return
        slot = remove(residency, evicted)
    residency.slot_of[key] = slot
    residency.residents[residency.sizes[RESIDENT]] = key
    residency.sizes[RESIDENT] += 1


@helper
def remove(residency, key):
    """Take `key` out; its slot."""
    slot = residency.slot_of[key]
    residency.slot_of[key] = -1
    position = 0
    while residency.residents[position] != key:
        position += 1
    residency.sizes[RESIDENT] -= 1
    for i in range(position, residency.sizes[RESIDENT]):
        residency.residents[i] = residency.residents[i + 1]
    return slot


@helper
def shrink(policy, residency, n_slots):
    """Evict, as the policy says, until no more than `n_slots` are resident."""
    while residency.sizes[RESIDENT] > n_slots:
        residents = residency.residents[: residency.sizes[RESIDENT]].copy()
        remove(residency, victim(policy, residents))


@helper
def evict_all_but(policy, residency, keys):
    """Evict every other resident: each is the only candidate that the policy is offered."""
    for key in keys:
        residency.protected[key] = True
    for resident in residency.residents[: residency.sizes[RESIDENT]].copy():
        if not residency.protected[resident]:
            residency.candidates[0] = resident
            slot = remove(residency, victim(policy, residency.candidates[:1]))
            residency.free[residency.sizes[FREE]] = slot
            residency.sizes[FREE] += 1
    for key in keys:
        residency.protected[key] = False


@helper
def replay(policy, residency, events):
    """Serve every event, waves included."""
    for i in range(len(events.starts) - 1):
        serve(policy, residency, event_at(events, i))


class Decision(NamedTuple):
    """An event, and the cache and policy that serve it."""

    policy: Any  # what `state_of` gives
    residency: Residency
    event: Event


def decide(decision: Decision, policy_class: type) -> Any:
    """Machine code of `serve`: of the address of such a decision's table of words."""
    return c_kernel(_decide, decision, policy_class)


def _decide(at):
    policy, residency, event = view(at)
    serve(policy, residency, event)
    return 0
