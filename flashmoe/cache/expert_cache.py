"""The expert cache: which expert is in which slot, and who makes room for whom.

It moves no bytes. The engine (an event at a time) and the simulator (a sequence at a time)
run the same compiled functions of this file, so a recorded run replayed through the
simulator gives the hits and misses that the engine counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashmoe.events import Event, Events
from flashmoe.policies.base import Policy
from flashmoe.policies.parts import saved_state
from flashmoe.policies.parts.compiled import helper, kernel, state_of, touch, victim

# Tokens times top_k above which an event is served in ascending order of expert, so that no
# outputs have to be kept for the order of their sum (docs/speed.md#long-prompts).
LONG_CHOICES = 4096
RESIDENT, FREE = 0, 1  # positions in `Residency.sizes`


class Wave(NamedTuple):
    """A part of an event that fits the slots: (key, slot) pairs resident, and to be read."""

    hits: list[tuple[int, int]]
    loads: list[tuple[int, int]]


class Residency(NamedTuple):
    """Who is where. Arrays, so that compiled code can change them."""

    slot_of: np.ndarray  # [n_keys] int64, -1 when not resident
    residents: np.ndarray  # [n_slots] int64, keys in order of admission
    free: np.ndarray  # [n_slots] int64, a stack of empty slots
    sizes: np.ndarray  # [2] int64: how many of `residents` and of `free` count: RESIDENT, FREE
    candidates: np.ndarray  # [n_slots + 1] int64, scratch: who may be evicted
    protected: np.ndarray  # [n_keys] bool, all False between calls

    @classmethod
    def empty(cls, n_keys: int, n_slots: int) -> Residency:
        return cls(
            np.full(n_keys, -1),
            np.empty(n_slots, np.int64),
            np.arange(n_slots)[::-1].copy(),
            np.array([0, n_slots]),
            np.empty(n_slots + 1, np.int64),
            np.zeros(n_keys, np.bool_),
        )


@helper
def is_long(event):
    """Too long for its experts' outputs to be kept until those of lower experts are added."""
    return event.rows.size > LONG_CHOICES


@helper
def _open(policy, residency, event, now, members):
    """Tell the policy; write the event's keys to `members` as they are served; how many hit.

    Hits come first, then the others. A long event in more than one wave is served in ascending
    order, where a hit stays resident until its turn.
    """
    touch(policy, event, now)
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
    if is_long(event) and n > n_slots and not policy.bypasses:
        members[:n] = np.sort(members[:n])
        if hits == n_slots:  # the lowest hit goes first, so that there is a slot to read into
            lowest = 0
            while residency.slot_of[members[lowest]] < 0:
                lowest += 1
            key = members[lowest]
            for i in range(lowest, 0, -1):
                members[i] = members[i - 1]
            members[0] = key
    return hits


@helper
def _next_wave(policy, residency, members, start):
    """Make members from `start` on resident until no slot is left; where this wave ends.

    None that is still to be served makes room (unless the policy bypasses).
    """
    room = len(residency.residents)
    for key in members[start:]:
        residency.protected[key] = not policy.bypasses
        if residency.slot_of[key] >= 0:
            room -= 1
    end = start
    while end < len(members):
        key = members[end]
        if residency.slot_of[key] < 0:
            if not room:
                break
            room -= 1
            _admit(policy, residency, key)
        end += 1
    for key in members[start:]:
        residency.protected[key] = False
    return end


@helper
def _admit(policy, residency, key):
    """Give `key` a free slot, or that of the resident whom the policy chooses."""
    if residency.sizes[FREE]:
        residency.sizes[FREE] -= 1
        slot = residency.free[residency.sizes[FREE]]
    else:
        n = 0
        for resident in residency.residents[: residency.sizes[RESIDENT]]:
            if not residency.protected[resident]:
                residency.candidates[n] = resident
                n += 1
        if policy.bypasses:
            residency.candidates[n] = key
            n += 1
        evicted = victim(policy, residency.candidates[:n])
        if evicted == key:
            return
        slot = _remove(residency, evicted)
    residency.slot_of[key] = slot
    residency.residents[residency.sizes[RESIDENT]] = key
    residency.sizes[RESIDENT] += 1


@helper
def _remove(residency, key):
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
def _shrink(policy, residency, n_slots):
    """Evict, as the policy says, until no more than `n_slots` are resident."""
    while residency.sizes[RESIDENT] > n_slots:
        residents = residency.residents[: residency.sizes[RESIDENT]].copy()
        _remove(residency, victim(policy, residents))


@helper
def _replay(policy, residency, events, now, members):
    """Serve every event, waves included; (requests, hits, tokens served)."""
    requests, total_hits = 0, 0
    for i in range(len(events.starts) - 1):
        start, end = events.starts[i], events.starts[i + 1]
        first, until = events.firsts[i], events.firsts[i + 1]
        event = Event(
            events.keys[start:end],
            events.counts[start:end],
            events.last[start:end],
            events.rows[first:until],
            events.weights[first:until],  # of none: still none
            events.below[first:until],
        )
        n = len(event.keys)
        hits = _open(policy, residency, event, now, members)
        requests += n
        total_hits += hits
        now += len(event.rows)
        done = n if hits == n else 0
        while done < n:
            done = _next_wave(policy, residency, members[:n], done)
    return requests, total_hits, now


class ExpertCache:
    """`policy.n_slots` slots under one policy; event-atomic (arXiv 2608.07911).

    Hits are counted against residency at the event's start, and no member of an event is
    evicted by it before it was served. An event with more members than slots (a prefill)
    comes as several waves; each member is served in exactly one of them, of a long event in
    ascending order.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.n_slots = policy.n_slots
        self.residency = Residency.empty(policy.n_keys, policy.n_slots)
        self.tokens = self.requests = self.hits = 0
        self.policy_seconds = 0.0
        self.most_resident = 0  # at any time since the last reset, where served by `waves`
        self._state = state_of(policy)
        self._members = np.empty(policy.n_keys, np.int64)
        self._open = kernel(_open, type(policy))
        self._next_wave = kernel(_next_wave, type(policy))

    def waves(self, event: Event) -> Iterator[Wave]:
        """Serve `event`: take a wave, make its loads resident, use its slots, take the next."""
        started = time.perf_counter()
        n, slot_of = len(event.keys), self.residency.slot_of
        n_hits = self._begin(event)
        members, done = self._members[:n], 0
        while done < n:
            slots_before = slot_of[members[done:]].tolist()  # -1 of those to be read
            end = n  # where all are resident, there is no one to admit
            if n_hits < n:
                end = self._next_wave(self._state, self.residency, members, done)
                self.most_resident = max(self.most_resident, int(self.residency.sizes[RESIDENT]))
            keys = members[done:end]
            wave = Wave([], [])
            for key, slot, before in zip(
                keys.tolist(), slot_of[keys].tolist(), slots_before, strict=False
            ):
                (wave.loads if before < 0 else wave.hits).append((key, slot))
            self.policy_seconds += time.perf_counter() - started
            yield wave
            done, started = end, time.perf_counter()

    def serve(self, event: Event) -> None:
        """All waves of `event`, for one who keeps experts in places of their own."""
        started = time.perf_counter()
        n = len(event.keys)
        done = n if self._begin(event) == n else 0
        while done < n:
            done = self._next_wave(self._state, self.residency, self._members[:n], done)
        self.most_resident = max(self.most_resident, int(self.residency.sizes[RESIDENT]))
        self.policy_seconds += time.perf_counter() - started

    def _begin(self, event: Event) -> int:
        """Count `event` and tell the policy of it; how many hit."""
        n_hits: int = self._open(self._state, self.residency, event, self.tokens, self._members)
        self.tokens += len(event.rows)
        self.requests += len(event.keys)
        self.hits += n_hits
        return n_hits

    def replay(self, events: Events) -> None:
        """Serve all of `events`, with nothing to be read in between."""
        run: Any = kernel(_replay, type(self.policy))  # numba's dispatcher
        state, residency, members = self._state, self.residency, self._members
        if not run.signatures:  # compiling is no time of the policy's
            none = Events(**events._asdict() | {"starts": events.starts[:1]})
            run(state, residency, none, self.tokens, members)
        started = time.perf_counter()
        requests, hits, self.tokens = run(state, residency, events, self.tokens, members)
        self.requests += requests
        self.hits += hits
        self.policy_seconds += time.perf_counter() - started

    def resized(self, policy: Policy) -> tuple[ExpertCache, list[int]]:
        """A cache under a fresh `policy` of the same kind, with this one's experts and state.

        As many as it has slots stay resident, as this policy chooses. Also returns, for each
        slot of the new cache from 0 on, the slot here that its expert is in. This cache is not
        to be used afterwards.
        """
        kernel(_shrink, type(self.policy))(self._state, self.residency, policy.n_slots)
        keys = self.resident
        slots = [int(self.residency.slot_of[key]) for key in keys]
        learnt = saved_state.arrays(self.policy)
        if saved_state.fits(policy, learnt):
            saved_state.take(policy, learnt)
        new = ExpertCache(policy)
        new.fill_with(keys)
        new.tokens = self.tokens
        new.count_on([self])
        return new, slots

    def count_on(self, earlier: Sequence[ExpertCache]) -> None:
        """Take over what the caches that this one follows have counted."""
        self.requests = sum(cache.requests for cache in earlier)
        self.hits = sum(cache.hits for cache in earlier)
        self.policy_seconds = sum(cache.policy_seconds for cache in earlier)

    def reset_counts(self) -> None:
        self.requests = self.hits = 0
        self.policy_seconds = 0.0
        self.most_resident = int(self.residency.sizes[RESIDENT])

    def fill_with(self, keys: Sequence[int]) -> None:
        """Make `keys` resident in slots 0, 1, ... of an empty cache; the policy is not told."""
        residency, count = self.residency, len(keys)
        residency.slot_of[list(keys)] = np.arange(count)
        residency.residents[:count] = keys
        residency.sizes[:] = count, self.n_slots - count
        residency.free[: self.n_slots - count] = np.arange(count, self.n_slots)[::-1]
        self.most_resident = count

    def forget(self, key: int) -> None:
        """Free the key's slot: its bytes never arrived."""
        residency = self.residency
        residency.free[residency.sizes[FREE]] = _remove(residency, key)
        residency.sizes[FREE] += 1

    @property
    def resident(self) -> list[int]:
        """Keys in slots, longest resident first."""
        keys: list[int] = self.residency.residents[: self.residency.sizes[RESIDENT]].tolist()
        return keys

    @property
    def misses(self) -> int:
        return self.requests - self.hits
