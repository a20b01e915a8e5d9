"""The cache under arbitrary events and every policy: nothing is lost, doubled or unfair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whim import Whim

from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.serving import LONG_CHOICES
from flashmoe.events import Event, Events
from flashmoe.policies.base import Scope

N_KEYS = 9


def rows_of(top_k: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, N_KEYS - 1), min_size=top_k, max_size=top_k, unique=True)
    return st.lists(row, min_size=1, max_size=5)


steps = st.integers(1, 4).flatmap(lambda k: st.lists(rows_of(k), min_size=1, max_size=30))


def make(name: str, n_slots: int, events: list[Event]) -> ExpertCache:
    policy = policies.get(name)(Scope(N_KEYS), n_slots)
    if policy.offline:
        policy.foresee(Events.of(events))
    return ExpertCache(policy)


ADMITTING = [name for name in policies.available() if "bypass" not in name]


@pytest.mark.parametrize("name", ADMITTING)
@settings(max_examples=60, deadline=None)
@given(steps=steps, n_slots=st.integers(1, N_KEYS))
def test_every_event_is_served_whole_and_within_the_slots(name, steps, n_slots):
    events = [Event.of_rows(step) for step in steps]
    cache = make(name, n_slots, events)
    slots: dict[int, int] = {}  # what a reader of the waves believes lies in each slot
    hits = 0
    for event in events:
        resident = set(cache.resident)
        served: list[int] = []
        for number, wave in enumerate(cache.waves(event)):
            for key, slot in wave.loads:
                slots[slot] = key
            for key, slot in wave.hits + wave.loads:
                assert slots[slot] == key  # not overwritten before its use
                served.append(key)
            taken = cache.residency.slot_of[cache.resident]
            assert len(set(taken.tolist())) == len(cache.resident) <= n_slots
            if number == 0:
                assert {key for key, _ in wave.hits} == resident & set(event.keys.tolist())
                assert resident & set(event.keys.tolist()) <= set(cache.resident)
            else:
                assert not wave.hits
            hits += len(wave.hits)
        assert sorted(served) == sorted(event.keys.tolist())
    assert cache.requests == sum(len(event.keys) for event in events)
    assert cache.hits == hits


@pytest.mark.parametrize("name", ADMITTING)
@settings(max_examples=20, deadline=None)
@given(before=st.lists(rows_of(3), max_size=12), n_slots=st.integers(2, N_KEYS), seed=st.integers())
def test_a_long_event_is_served_in_ascending_order_and_its_hits_wait(name, before, n_slots, seed):
    """All but one hit, where hits take all slots: then it goes first and leaves its own."""
    chance = np.random.default_rng(abs(seed))
    some = chance.permutation(N_KEYS)[: chance.integers(3, N_KEYS + 1)]
    long = some[chance.random((LONG_CHOICES // 3 + 1, len(some))).argsort(1)[:, :3]]
    events = [*(Event.of_rows(step) for step in before), Event.of_rows(long)]
    cache, replayed = make(name, n_slots, events), make(name, n_slots, events)
    for event in events[:-1]:
        list(cache.waves(event))
    resident, slots = set(cache.resident), {}
    for key in resident:
        slots[int(cache.residency.slot_of[key])] = key
    served: list[int] = []
    for wave in cache.waves(events[-1]):
        slots |= {slot: key for key, slot in wave.loads}
        assert all(slots[slot] == key for key, slot in wave.hits + wave.loads)
        served += sorted(key for key, _ in wave.hits + wave.loads)
        assert all(key in resident for key, _ in wave.hits)  # no hit was evicted and read again
    members = sorted(events[-1].keys.tolist())
    early = served[:1] if served != members else []
    assert served == early + [key for key in members if key not in early]
    if early:
        assert early[0] in resident
        assert len(resident & set(members)) == n_slots
    replayed.replay(Events.of(events))
    assert (replayed.hits, replayed.resident) == (cache.hits, cache.resident)


def longhand(policy, events: list[Event], n_slots: int, bypass_slots: int):
    """Of each event: how many of it hit, who of it was not kept, and who is resident afterwards.

    Of events that fit the bypass slots, or the slots: one wave each.
    """
    resident: list[int] = []
    now = 0
    for event in events:
        policy.touch(event, now)
        now += len(event.rows)
        keys = event.keys.tolist()
        hits = [key for key in keys if key in resident]
        bypass = len(keys) <= bypass_slots
        for key in keys:
            if key in hits:
                continue
            if len(resident) == n_slots:
                others = [other for other in resident if bypass or other not in keys]
                victim = int(policy.victim(np.array(others + [key] * bypass)))
                if victim == key:
                    continue
                resident.remove(victim)
            resident.append(key)
        yield len(hits), {key for key in keys if key not in resident}, list(resident)


@pytest.mark.parametrize("kind", [Whim, policies.available()["learned"]], ids=lambda k: k.name)
@settings(max_examples=60, deadline=None)
@given(steps=steps, n_slots=st.integers(1, N_KEYS), bypass_slots=st.integers(0, 4))
def test_what_is_not_kept_lies_in_bypass_slots(kind, steps, n_slots, bypass_slots):
    events = [Event.of_rows(step) for step in steps]
    events = [e for e in events if len(e.keys) <= max(n_slots, bypass_slots)]
    scope = Scope(N_KEYS, bypass_slots=bypass_slots)
    cache, replayed = ExpertCache(kind(scope, n_slots)), ExpertCache(kind(scope, n_slots))
    told = longhand(kind(scope, n_slots), events, n_slots, bypass_slots)
    content: dict[int, int] = {}  # what lies in each slot, bypass slots included
    for event, (n_hits, not_kept, resident) in zip(events, told, strict=True):
        (wave,) = cache.waves(event)
        for slot, outside in wave.moves:
            content[outside] = content.pop(slot)
        for key, slot in wave.loads:
            content[slot] = key
        turns = wave.hits + wave.loads
        assert all(content[slot] == key for key, slot in turns)
        assert sorted(key for key, _ in turns) == sorted(event.keys.tolist())
        outside = {slot: key for key, slot in turns if slot >= n_slots}
        assert set(outside.values()) == not_kept
        assert set(outside) == set(range(n_slots, n_slots + len(not_kept)))
        assert len(not_kept) <= bypass_slots
        assert (len(wave.hits), cache.resident) == (n_hits, resident)
        assert len(resident) <= n_slots
    if events:
        replayed.replay(Events.of(events))
    assert (replayed.hits, replayed.resident) == (cache.hits, cache.resident)
    if kind is not Whim:  # `learned` knows who is resident, be it admitted or not
        marks = cache.policy.shadow.resident
        assert set(np.flatnonzero(marks).tolist()) == set(cache.resident)
        assert cache.policy.shadow.counts[2] == cache.hits  # HITS


@given(steps=steps)
def test_an_event_counts_every_token_once(steps):
    for step in steps:
        event = Event.of_rows(step)
        assert sum(event.counts) == sum(len(row) for row in step)
        assert list(event.last) == sorted(event.last)
        assert all(key in step[last] for key, last in zip(event.keys, event.last, strict=True))


def test_a_forgotten_key_is_a_miss_again_and_its_slot_is_free():
    cache = make("lru", 2, [])
    for key in (1, 2):
        list(cache.waves(Event.of_rows([[key]])))
    slot = int(cache.residency.slot_of[1])
    cache.forget(1)
    (wave,) = cache.waves(Event.of_rows([[3]]))
    assert wave.loads == [(3, slot)]
    (wave,) = cache.waves(Event.of_rows([[1]]))
    assert not wave.hits
