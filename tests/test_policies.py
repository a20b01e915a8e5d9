"""Each policy against cases worked by hand; Belady against exhaustive search."""

from __future__ import annotations

import re
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import policies
from flashmoe.cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event


def replay(name: str, n_slots: int, rows: list[list[int]]) -> tuple[int, list[int]]:
    events = [Event.of_rows([row]) for row in rows]
    policy = policies.get(name)(10, n_slots)
    policy.foresee(events)
    expert_cache = ExpertCache(policy)
    for event in events:
        for _ in expert_cache.waves(event):
            pass
    return expert_cache.hits, sorted(expert_cache.slot_of)


def singles(keys: str) -> list[list[int]]:
    return [[int(key)] for key in keys]


@pytest.mark.parametrize(
    ("name", "keys", "hits", "left"),
    [
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
    ],
)
def test_worked_by_hand(name, keys, hits, left):
    assert replay(name, 3, singles(keys)) == (hits, left)


def test_members_of_an_event_do_not_evict_each_other():
    # 2 and 3 are the least recent when [2, 4] comes, but 2 is needed now, so 3 goes
    assert replay("lru", 3, [[2], [3], [1], [2, 4]]) == (1, [1, 2, 4])


def test_ties_go_to_the_longest_resident():
    assert replay("lru", 3, [[3, 1, 2], [5]])[1] == [1, 2, 5]


def test_prefill_counts_every_token_for_recency_and_frequency():
    policy = policies.get("lfu")(10, 4)
    policy.touch(Event.of_rows([[1, 2], [1, 3], [1, 4]]), 0)
    assert [policy.victim([1, 2, 3, 4]), policy.victim([4, 3, 1])] == [2, 3]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True), min_size=1, max_size=9
    ),
    n_slots=st.integers(2, 4),
)
def test_belady_is_the_best_there_is(rows, n_slots):
    @cache
    def best(position: int, resident: frozenset[int]) -> int:
        if position == len(rows):
            return 0
        wanted = frozenset(rows[position])
        hits = len(resident & wanted)
        others = resident - wanted
        room = n_slots - len(wanted)
        kept = [others] if len(others) <= room else map(frozenset, combinations(others, room))
        return hits + max(best(position + 1, wanted | keep) for keep in kept)

    assert replay("belady", n_slots, rows)[0] == best(0, frozenset())


def test_unknown_and_offline_policies_are_refused_in_a_sentence():
    with pytest.raises(FlashMoEError, match="no policy is called 'mru'"):
        policies.get("mru")
    with pytest.raises(FlashMoEError, match="needs the future"):
        policies.get("belady", online=True)


def test_the_policy_in_the_readme_is_one_file_and_works(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
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
