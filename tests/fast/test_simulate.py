"""The simulator against an independent replay written out longhand, and its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache import simulate
from flashmoe.cache.simulate import Conditions
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace

SHARED = Path(__file__).parents[3] / "shared" / "traces"
REAL = [flashmoe.demo_routing_path(), *sorted(SHARED.glob("*.npz"))]


def random_trace(tokens=60, layers=3, n_experts=12, top_k=3, seed=1) -> Trace:
    rng = np.random.default_rng(seed)
    order = [rng.permutation(n_experts)[:top_k] for _ in range(tokens * layers)]
    experts = np.stack(order).reshape(tokens, layers, top_k).astype(np.uint8)
    sequence = np.sort(rng.integers(0, 4, tokens)).astype(np.int32)
    return Trace(experts, sequence, n_experts)


def longhand_lru(recorded: Trace, slots: int, *, warm: bool, shared: bool) -> int:
    """Lists in order of use; ties within an event go by order of admission."""
    hits = 0
    groups = [range(recorded.n_layers)] if shared else [[x] for x in range(recorded.n_layers)]
    for group in groups:
        use: dict[tuple[int, int], int] = {}
        resident: list[tuple[int, int]] = []
        capacity, clock, previous = slots * len(group), 0, None
        for token in range(len(recorded.experts)):
            if recorded.sequence[token] != previous and not warm:
                use, resident = {}, []
            previous = recorded.sequence[token]
            for layer in group:
                wanted = [(layer, int(e)) for e in recorded.experts[token, layer]]
                hits += sum(key in resident for key in wanted)
                for key in wanted:
                    use[key] = clock
                clock += 1
                for key in wanted:
                    if key not in resident:
                        if len(resident) == capacity:
                            others = [r for r in resident if r not in wanted]
                            resident.remove(min(others, key=lambda r: use[r]))
                        resident.append(key)
    return hits


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_lru_equals_a_longhand_replay(warm, shared):
    recorded = random_trace()
    outcome = simulate.replay(recorded, "lru", 0.5, Conditions(warm, shared))
    assert outcome.hits == longhand_lru(recorded, outcome.slots, warm=warm, shared=shared)
    assert outcome.requests == recorded.experts.size


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_routing_behaves_as_real_routing(path):
    """On 1,000 real tokens: more slots hit more, nobody beats Belady, frequency beats random."""
    whole = trace.load(path)
    recorded = Trace(whole.experts[:1000], whole.sequence[:1000], whole.n_experts)
    rates = {}
    for policy in ("fifo", "lru", "lfu", "belady"):
        rates[policy] = [
            simulate.replay(recorded, policy, f).hit_rate for f in (0.25, 0.5, 0.75, 1)
        ]
        assert rates[policy] == sorted(rates[policy])
    for policy in ("fifo", "lru", "lfu"):
        assert all(a <= b for a, b in zip(rates[policy], rates["belady"], strict=True))
        assert rates[policy][1] > 0.5  # a random router would hit exactly half


def test_at_the_least_capacity_all_policies_tie():
    recorded = random_trace(top_k=4)
    admitting = Conditions(bypass=False)
    names = [name for name in policies.available() if name != "belady-bypass"]
    hits = {simulate.replay(recorded, name, 0.01, admitting).hits for name in names}
    assert len(hits) == 1


def test_of_a_fraction_of_slots_the_lowest_layers_have_one_more():
    recorded = random_trace()
    three, four, between = (
        simulate.replay(recorded, "lru", 1.0, slots=slots).counted for slots in (3, 4, 11 / 3)
    )
    np.testing.assert_array_equal(between, np.concatenate([four[:2], three[2:]]))


def test_bypass_is_granted_unless_it_is_not():
    """To policies that make use of it; with it, Belady's bound rises."""
    recorded = random_trace(tokens=200)
    without = Conditions(bypass=False)
    for name in policies.available():
        both = [simulate.replay(recorded, name, 0.4, how).hits for how in (Conditions(), without)]
        assert (both[0] != both[1]) == (name == "learned")
    bound = simulate.replay(recorded, "belady-bypass", 0.4).hits
    assert bound > simulate.replay(recorded, "belady", 0.4).hits


def test_with_room_for_all_only_first_uses_miss():
    recorded = random_trace()
    outcome = simulate.replay(recorded, "fifo", 1.0, Conditions(warm=True))
    firsts = sum(len(np.unique(recorded.experts[:, x])) for x in range(recorded.n_layers))
    assert outcome.requests - outcome.hits == firsts


@pytest.mark.parametrize("capacity", [0, -1, 1.5, float("nan")])
def test_capacity_out_of_range_is_refused(capacity):
    with pytest.raises(FlashMoEError, match="capacity"):
        simulate.replay(random_trace(), "lru", capacity)


def partly_computed(steps: list[tuple[int, int]]) -> Trace:
    """Forward passes of so many tokens, of which the last layer computes only the last so many."""
    whole = random_trace()
    tokens = sum(count for count, _ in steps)
    computed = np.ones((tokens, whole.n_layers), bool)
    computed[:, -1] = np.concatenate([np.arange(count) >= count - last for count, last in steps])
    return Trace(
        whole.experts[:tokens], np.zeros(tokens, np.int32), whole.n_experts,
        step=np.repeat(np.arange(len(steps), dtype=np.int32), [count for count, _ in steps]),
        computed=computed,
    )  # fmt: skip


@pytest.mark.parametrize("as_recorded", [False, True])
def test_what_a_layer_did_not_compute_is_never_requested(as_recorded):
    recorded = partly_computed([(5, 1), (4, 0), (1, 1), (3, 3)])
    filler = recorded.experts.copy()
    filler[~recorded.computed] = np.arange(recorded.top_k)
    conditions = Conditions(as_recorded=as_recorded)
    for policy in policies.available():
        outcome = simulate.replay(recorded, policy, 0.5, conditions)
        other = simulate.replay(replace(recorded, experts=filler), policy, 0.5, conditions)
        np.testing.assert_array_equal(outcome.counted, other.counted)
    last = recorded.experts[recorded.computed[:, -1], -1]
    wanted = [len(np.unique(rows)) for rows in (last[:1], last[1:2], last[2:])]
    requests = outcome.counted[-1, 0, 0]
    assert requests == (sum(wanted) if as_recorded else last.size)


def test_a_layer_that_computed_nothing_has_no_request():
    recorded = partly_computed([(5, 0), (4, 0)])
    for policy in policies.available():
        outcome = simulate.replay(recorded, policy, 0.5, Conditions(as_recorded=True))
        assert outcome.counted[-1].tolist() == [[0, 0]]
        assert outcome.requests > 0
