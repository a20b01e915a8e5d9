"""The expert cache: which expert is in which slot, and who makes room for whom.

It moves no bytes. The engines (an event at a time) and the simulator (a sequence at a time)
run the same compiled functions of `serving`, so a recorded run replayed through the
simulator gives the hits and misses that the engine counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashmoe.cache import serving
from flashmoe.cache.serving import FREE, HITS, MOST, REQUESTS, RESIDENT, TOKENS, Decision, Residency
from flashmoe.events import Event, Events
from flashmoe.policies.base import Policy
from flashmoe.policies.parts import saved_state
from flashmoe.policies.parts.compiled import kernel, state_of


class Wave(NamedTuple):
    """A part of an event that fits the slots: (key, slot) pairs resident, and to be read.

    Slots from the cache's n_slots on are bypass slots, free again when the wave was used. moves:
    (slot, bypass slot) pairs of hits that have lost their slots to loads: what lies in them changes
    places before anything is read.
    """

    hits: list[tuple[int, int]]
    loads: list[tuple[int, int]]
    moves: list[tuple[int, int]]


class ExpertCache:
    """`policy.n_slots` slots under one policy; event-atomic (arXiv 2608.07911).

    Hits are counted against residency at the event's start, and no member of an event is
    evicted by it before it was served. An event with more members than slots (a prefill)
    comes as several waves; each member is served in exactly one of them, of a long event in
    ascending order. An event of no more members than the policy has bypass slots is one wave, in
    which these hold the members that it does not keep.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.n_slots = policy.n_slots
        self.residency = Residency.empty(policy.n_keys, policy.n_slots)
        self.policy_seconds = 0.0
        self._state = state_of(policy)
        self._begin = kernel(serving.begin, type(policy))
        self._next_wave = kernel(serving.next_wave, type(policy))

    def waves(self, event: Event) -> Iterator[Wave]:
        """Serve `event`: take a wave, make its loads resident, use its slots, take the next."""
        started = time.perf_counter()
        n, slot_of = len(event.keys), self.residency.slot_of
        n_hits = self._begin(self._state, self.residency, event)
        members, done = self.residency.members[:n], 0
        while done < n:
            slots_before = slot_of[members[done:]].tolist()  # -1 of those to be read
            end = n  # where all are resident, there is no one to admit
            if n_hits < n:
                end = self._next_wave(self._state, self.residency, n, done)
            keys = members[done:end]
            wave, outside = Wave([], [], []), self.n_slots
            for key, slot, before in zip(
                keys.tolist(), slot_of[keys].tolist(), slots_before, strict=False
            ):
                if slot < 0:
                    if before >= 0:
                        wave.moves.append((before, outside))
                    slot, outside = outside, outside + 1
                (wave.loads if before < 0 else wave.hits).append((key, slot))
            self.policy_seconds += time.perf_counter() - started
            yield wave
            done, started = end, time.perf_counter()

    def decision(self, event: Event) -> Decision:
        """This event for this cache, as `serving.decide` serves it."""
        return Decision(self._state, self.residency, event)

    def replay(self, events: Events) -> None:
        """Serve all of `events`, with nothing to be read in between."""
        run: Any = kernel(serving.replay, type(self.policy))  # numba's dispatcher
        if not run.signatures:  # compiling is no time of the policy's
            none = Events(**events._asdict() | {"starts": events.starts[:1]})
            run(self._state, self.residency, none)
        started = time.perf_counter()
        run(self._state, self.residency, events)
        self.policy_seconds += time.perf_counter() - started

    def resized(self, policy: Policy) -> tuple[ExpertCache, list[int]]:
        """A cache under a fresh `policy` of the same kind, with this one's experts and state.

        As many as it has slots stay resident, as this policy chooses. Also returns, for each
        slot of the new cache from 0 on, the slot here that its expert is in. This cache is not
        to be used afterwards.
        """
        kernel(serving.shrink, type(self.policy))(self._state, self.residency, policy.n_slots)
        keys = self.resident
        slots = [int(self.residency.slot_of[key]) for key in keys]
        learnt = saved_state.arrays(self.policy)
        if saved_state.fits(policy, learnt):
            saved_state.take(policy, learnt)
        new = ExpertCache(policy)
        new.fill_with(keys)
        new.residency.counts[TOKENS] = self.tokens
        new.count_on([self])
        return new, slots

    def count_on(self, earlier: Sequence[ExpertCache]) -> None:
        """Take over what the caches that this one follows have counted."""
        for position in (REQUESTS, HITS):
            self.residency.counts[position] = sum(c.residency.counts[position] for c in earlier)
        self.policy_seconds = sum(cache.policy_seconds for cache in earlier)

    def reset_counts(self) -> None:
        self.residency.counts[[REQUESTS, HITS]] = 0
        self.residency.counts[MOST] = self.residency.sizes[RESIDENT]
        self.policy_seconds = 0.0

    def fill_with(self, keys: Sequence[int]) -> None:
        """Make `keys` resident in slots 0, 1, ... of an empty cache; the policy is not told."""
        residency, count = self.residency, len(keys)
        residency.slot_of[list(keys)] = np.arange(count)
        residency.residents[:count] = keys
        residency.sizes[:] = count, self.n_slots - count
        residency.free[: self.n_slots - count] = np.arange(count, self.n_slots)[::-1]
        residency.counts[MOST] = count

    def evict_all_but(self, keys: np.ndarray) -> None:
        """Evict every resident that is not one of `keys`; the policy is told of each."""
        kernel(serving.evict_all_but, type(self.policy))(self._state, self.residency, keys)

    def forget(self, key: int) -> None:
        """Free the key's slot: its bytes never arrived."""
        residency = self.residency
        residency.free[residency.sizes[FREE]] = serving.remove(residency, key)
        residency.sizes[FREE] += 1

    @property
    def resident(self) -> list[int]:
        """Keys in slots, longest resident first."""
        keys: list[int] = self.residency.residents[: self.residency.sizes[RESIDENT]].tolist()
        return keys

    @property
    def n_resident(self) -> int:
        return int(self.residency.sizes[RESIDENT])

    @property
    def free(self) -> list[int]:
        """Empty slots; the last one is filled first."""
        slots: list[int] = self.residency.free[: self.residency.sizes[FREE]].tolist()
        return slots

    @property
    def tokens(self) -> int:
        """Served so far."""
        return int(self.residency.counts[TOKENS])

    @property
    def requests(self) -> int:
        return int(self.residency.counts[REQUESTS])

    @property
    def hits(self) -> int:
        return int(self.residency.counts[HITS])

    @property
    def most_resident(self) -> int:
        """At any time since the last reset."""
        return int(self.residency.counts[MOST])

    @property
    def misses(self) -> int:
        return self.requests - self.hits
