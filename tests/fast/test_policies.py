"""Each policy against cases worked by hand; Belady against exhaustive search."""

from __future__ import annotations

import re
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import cachetools
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event, Events
from flashmoe.policies.base import Scope
from flashmoe.trace import Trace


def replay(name: str, n_slots: int, rows: list[list[int]]) -> tuple[int, list[int]]:
    events = [Event.of_rows([row]) for row in rows]
    policy = policies.get(name)(Scope(10), n_slots)
    if policy.offline:
        policy.foresee(Events.of(events))
    expert_cache = ExpertCache(policy)
    for event in events:
        for _ in expert_cache.waves(event):
            pass
    return expert_cache.hits, sorted(expert_cache.resident)


def singles(keys: str) -> list[list[int]]:
    return [[int(key)] for key in keys]


WORKED = [
    # 1 2 3 fill; 1 hits; 4 evicts: fifo 1, lru 2, lfu 2 (one use, older than 3), belady 3
    ("fifo", "12314", 1, [2, 3, 4]),
    ("lru", "12314", 1, [1, 3, 4]),
    ("lfu", "12314", 1, [1, 3, 4]),
    ("belady", "1231412", 3, [1, 2, 4]),
    # 1 was used three times, then long ago: lru drops it, lfu keeps it
    ("lru", "1112345", 2, [3, 4, 5]),
    ("lfu", "1112345", 2, [1, 4, 5]),
    # uses outlive residency: 3 comes back with its first use counted, so 1 goes before it
    ("lfu", "2211345234", 3, [2, 3, 4]),
    # they do not outlive it here: 3 comes back with one use, so it goes when 4 comes back
    ("lfu-in-cache", "12314", 1, [1, 3, 4]),
    ("lfu-in-cache", "2211345234", 3, [1, 2, 4]),
    # 3, then 4 came in last; 1 and 2 stay for good
    ("lifo", "12314", 1, [1, 2, 4]),
    ("lifo", "1234125", 2, [1, 2, 5]),
    # three old uses of 1 weigh less than one new one after 64 tokens, more after 8
    ("lfu-decay:2", "11123345", 3, [3, 4, 5]),
    ("lfu-decay:64", "11123345", 3, [1, 3, 5]),
    # 1 leaves with one use at age 1; 5 comes in at 1 + 1 = 2 and outlives 2 (1 use)
    ("lfuda", "1233455", 2, [3, 4, 5]),
    # uses / age when 5 comes: 1: 3/6, 2: 1/3, 3: 1/2, so 2 goes; then 1: 3/7, 3: 1/3
    ("lfru", "11123", 2, [1, 2, 3]),
    ("lfru", "111235", 2, [1, 3, 5]),
    ("lfru", "1112356", 2, [1, 5, 6]),
    # 2 and 3 were used once: the older goes, though 1's last use is older still
    ("lru-k", "11234", 1, [1, 3, 4]),
    ("lru-k", "112345", 1, [1, 4, 5]),
    # one hit takes 1 to the protected segment: 2, then 3, go before it
    ("slru", "112345", 1, [1, 4, 5]),
    # 1 and 2 move to T2; 3 and 4 pass through T1
    ("arc", "121234", 2, [1, 2, 4]),
    # 1 was used twice in the small queue and moves to the main one; 2, 3 leave
    ("s3-fifo", "111234", 2, [1, 3, 4]),
    ("s3-fifo", "1112345", 2, [1, 4, 5]),
    # the hand spares 1 once: 2 goes, then 3 (the hand has passed 1)
    ("sieve", "11234", 1, [1, 3, 4]),
    ("sieve", "112345", 1, [1, 4, 5]),
    # 4 must come in, and 3 in the window is no better than 1; 4 and 5 are worse than 1
    ("w-tinylfu", "112233456", 3, [1, 2, 6]),
    # 2, 3 and 4 are equally popular in the end: the longest resident of them goes
    ("static", "1112233454", 5, [1, 4, 5]),
    ("activation-aware", "1112345", 2, [1, 4, 5]),
    ("least-stale", "12314", 1, [2, 3, 4]),
    ("llru", "12314", 1, [1, 3, 4]),
    ("belady-bypass", "1231412", 3, [1, 2, 4]),
]


@pytest.mark.parametrize(
    ("name", "keys", "hits", "left"), WORKED, ids=[f"{name}-{keys}" for name, keys, *_ in WORKED]
)
def test_a_policy_keeps_what_was_worked_out_by_hand(name, keys, hits, left):
    assert replay(name, 3, singles(keys)) == (hits, left)


def test_members_of_an_event_do_not_evict_each_other():
    # 2 and 3 are the least recent when [2, 4] comes, but 2 is needed now, so 3 goes
    assert replay("lru", 3, [[2], [3], [1], [2, 4]]) == (1, [1, 2, 4])


def test_ties_go_to_the_longest_resident():
    assert replay("lru", 3, [[3, 1, 2], [5]])[1] == [1, 2, 5]


def test_prefill_counts_every_token_for_recency_and_frequency():
    policy = policies.get("lfu")(Scope(10), 4)
    policy.touch(Event.of_rows([[1, 2], [1, 3], [1, 4]]), 0)
    assert [policy.victim(np.array(keys)) for keys in ([1, 2, 3, 4], [4, 3, 1])] == [2, 3]


def recorded(seed: int = 0, n: int = 400) -> list[int]:
    """Single requests with some locality: what other libraries' caches can replay too."""
    rng = np.random.default_rng(seed)
    hot = rng.permutation(10)
    return [int(hot[min(rng.geometric(0.3) - 1, 9)]) for _ in range(n)]


@pytest.mark.parametrize("n_slots", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("name", "peer"), [("lru", cachetools.LRUCache), ("fifo", cachetools.FIFOCache)]
)
def test_classical_policies_agree_with_cachetools(name, peer, n_slots):
    requests, peer_hits = recorded(), 0
    theirs = peer(n_slots)
    for key in requests:
        if key in theirs:
            peer_hits += 1
            theirs[key]
        else:
            theirs[key] = True
    assert replay(name, n_slots, [[key] for key in requests])[0] == peer_hits


def hits_of_lfu_in_cache(requests: list[int], n_slots: int) -> int:
    """A dict of counts and a list in order of use: what is evicted leaves both."""
    hits, uses, by_recency = 0, {}, []
    for key in requests:
        hits += key in uses
        if key in uses:
            by_recency.remove(key)
        elif len(uses) == n_slots:
            gone = min(by_recency, key=lambda k: uses[k])  # the first of equals is the oldest
            by_recency.remove(gone)
            del uses[gone]
        uses[key] = uses.get(key, 0) + 1
        by_recency.append(key)
    return hits


def hits_of_lifo(requests: list[int], n_slots: int) -> int:
    hits, stack = 0, []
    for key in requests:
        hits += key in stack
        if key not in stack:
            if len(stack) == n_slots:
                stack.pop()
            stack.append(key)
    return hits


@pytest.mark.parametrize(
    ("name", "plain"), [("lfu-in-cache", hits_of_lfu_in_cache), ("lifo", hits_of_lifo)]
)
@settings(deadline=None)
@given(requests=st.lists(st.integers(0, 9), max_size=60), n_slots=st.integers(1, 6))
def test_policies_without_a_peer_agree_with_plain_python(name, plain, requests, n_slots):
    assert replay(name, n_slots, [[key] for key in requests])[0] == plain(requests, n_slots)


def left_of_shared(name: str, rows: list[tuple[int, int]]) -> list[int]:
    """Keys (3 * layer + expert) that 4 slots hold after (layer, expert) of 2 layers of 3."""
    cache = ExpertCache(policies.get(name)(Scope(3, 1, 2, 0, 2), 4))
    for layer, expert in rows:
        list(cache.waves(Event.of_rows([[expert]], 3 * layer)))
    return sorted(cache.resident)


@pytest.mark.parametrize("name", ["lru", "llru", "least-stale"])
def test_when_the_first_layer_misses_its_own_old_experts_are_due_last(name):
    """(0, 0) is the oldest, of the oldest pass, and of the layer that runs again last."""
    assert left_of_shared(name, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        # keys 0, 4, 3, 1 came in that order and were last used in passes 2, 3, 2, 4; in pass 4
        # layer 1 misses key 5, and layer 0 runs next
        ("lru", [1, 3, 4, 5]),  # 0 goes, used just before 3, though its layer runs next
        ("llru", [0, 1, 4, 5]),  # of 0 and 3, both of pass 2, 3 goes: layer 1 is due last
        ("least-stale", [0, 1, 3, 5]),  # 0, 3 and 4 are stale; of 3 and 4, due last, 4 came first
    ],
)
def test_a_shared_cache_keeps_the_layer_that_runs_next(name, left):
    rows = [(0, 0), (1, 1), (0, 0), (1, 0), (0, 1), (1, 1), (0, 1), (1, 2)]
    assert left_of_shared(name, rows) == left


def test_lecar_learns_to_trust_the_better_of_its_two():
    """On a scan over a hot pair, LFU keeps the pair and LRU does not."""
    policy = policies.get("lecar")(Scope(10), 3)
    cache = ExpertCache(policy)
    for turn in range(200):
        for key in (0, 1, 2 + 2 * turn % 8, 3 + 2 * turn % 8):
            list(cache.waves(Event.of_rows([[key]])))
    assert policy.weight[1] > 0.9
    assert policy.weight.sum() == pytest.approx(1)


def test_static_takes_its_profile_from_a_trace(tmp_path):
    experts = np.array([[[3]], [[3]], [[1]]], np.uint8)
    Trace(experts, np.zeros(3, np.int32), 10).save(tmp_path / "profile.npz")
    choice = policies.get(f"static:{tmp_path / 'profile.npz'}", online=True)
    policy = choice(Scope(10), 3)
    assert policy.victim(np.array([3, 1, 2])) == 2
    with pytest.raises(FlashMoEError, match="needs the future"):
        policies.get("static", online=True)
    with pytest.raises(FlashMoEError, match="the profile has 1 layers of 10"):
        choice(Scope(12), 3)


@pytest.mark.parametrize(
    "label", ["lru:3", "lfu-decay:0", "lfu-decay:x", "learned:/no/file", "static:/no"]
)
def test_arguments_that_make_no_sense_are_refused(label):
    with pytest.raises(FlashMoEError):
        policies.get(label)


def most_hits(rows, n_slots, choices) -> int:
    """By exhaustive search; `choices(resident, wanted, n_slots)` are the sets that may be kept."""

    @cache
    def best(position: int, resident: frozenset[int]) -> int:
        if position == len(rows):
            return 0
        wanted = frozenset(rows[position])
        kept = choices(resident, wanted, n_slots)
        return len(resident & wanted) + max(best(position + 1, keep) for keep in kept)

    return best(0, frozenset())


def any_of_both(resident, wanted, n_slots):
    pool = resident | wanted
    return map(frozenset, combinations(pool, min(n_slots, len(pool))))


def wanted_and_some_others(resident, wanted, n_slots):
    others, room = resident - wanted, n_slots - len(wanted)
    chosen = [others] if len(others) <= room else map(frozenset, combinations(others, room))
    return (wanted | some for some in chosen)


def pairs(at_most: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 5), min_size=2, max_size=2)  # [3, 3] is an event of one key
    return st.lists(row, min_size=1, max_size=at_most)


@settings(max_examples=80, deadline=None)
@given(rows=pairs(8), n_slots=st.integers(2, 3))
def test_belady_bypass_is_the_best_there_is(rows, n_slots):
    assert replay("belady-bypass", n_slots, rows)[0] == most_hits(rows, n_slots, any_of_both)


@settings(max_examples=150, deadline=None)
@given(rows=pairs(9), n_slots=st.integers(2, 4))
def test_belady_is_the_best_there_is(rows, n_slots):
    assert replay("belady", n_slots, rows)[0] == most_hits(rows, n_slots, wanted_and_some_others)


def test_unknown_and_offline_policies_are_refused_in_a_sentence():
    with pytest.raises(FlashMoEError, match="no policy is called 'mru'"):
        policies.get("mru")
    with pytest.raises(FlashMoEError, match="needs the future"):
        policies.get("belady", online=True)


def test_the_policy_in_the_readme_is_one_file_and_works(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (source,) = (
        block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "(Policy)" in block
    )
    (tmp_path / "mru.py").write_text(source)
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    policies.available.cache_clear()
    try:
        # 3 was used last when 4 comes, then 4 when 3 comes back
        assert replay("mru", 3, singles("12343")) == (0, [1, 2, 3])
    finally:
        policies.available.cache_clear()
        sys.modules.pop("flashmoe.policies.mru", None)
