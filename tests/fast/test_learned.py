"""The learned policy: its promise against LRU, its features, its files and its training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache import simulate
from flashmoe.errors import FlashMoEError
from flashmoe.events import LAYERS_BELOW, Event, below
from flashmoe.policies import learned
from flashmoe.policies.base import Scope
from flashmoe.policies.parts import policy_file
from flashmoe.policies.parts.features import (
    N_FEATURES,
    NAMES,
    RoutingHistory,
    describe,
    recall,
    remember,
)
from flashmoe.trace import Trace

TOKENS = 1200


def rows_to_trace(rows: np.ndarray, n_experts: int) -> Trace:
    experts = rows[:, None, :].astype(np.uint16)
    return Trace(experts, np.zeros(len(rows), np.int32), n_experts)


def uniform(rng: np.random.Generator, experts: int, top_k: int) -> np.ndarray:
    return np.stack([rng.permutation(experts)[:top_k] for _ in range(TOKENS)])


def cyclic(rng: np.random.Generator, experts: int, top_k: int) -> np.ndarray:
    """A scan over more experts than fit, over and over."""
    scanned = int(rng.integers(top_k, experts + 1))
    return np.stack([(np.arange(top_k) + t * top_k) % scanned for t in range(TOKENS)])


def domains(rng: np.random.Generator, experts: int, top_k: int) -> np.ndarray:
    """A change of popular experts every so many tokens."""
    rows, length = [], int(rng.integers(20, 150))
    for t in range(TOKENS):
        if t % length == 0:
            liking = rng.dirichlet(np.full(experts, 0.2)) + 1e-6
        rows.append(rng.choice(experts, top_k, replace=False, p=liking / liking.sum()))
    return np.stack(rows)


def recent(rng: np.random.Generator, experts: int, top_k: int) -> np.ndarray:
    """What was used last is likeliest: no policy can do better than LRU here."""
    stack, rows = list(rng.permutation(experts)), []
    slope = rng.uniform(0.6, 0.98)
    for _ in range(TOKENS):
        chance = slope ** np.arange(experts) + 1e-9
        places = rng.choice(experts, top_k, replace=False, p=chance / chance.sum())
        row = [stack[place] for place in places]
        stack = row + [key for key in stack if key not in row]
        rows.append(row)
    return np.array(rows)


ADVERSARIES = (uniform, cyclic, domains, recent)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(ADVERSARIES),
    seed=st.integers(0, 2**32 - 1),
    experts=st.integers(4, 64),
    top_k=st.integers(1, 6),
    capacity=st.floats(0.1, 0.9),
)
def test_hardly_ever_a_point_worse_than_lru(kind, seed, experts, top_k, capacity):
    top_k = min(top_k, experts - 1)
    made = rows_to_trace(kind(np.random.default_rng(seed), experts, top_k), experts)
    lru = simulate.replay(made, "lru", capacity)
    ours = simulate.replay(made, "learned", capacity)
    assert ours.hit_rate >= lru.hit_rate - 0.0125  # the worst found: 1.04 points


@pytest.mark.slow
def test_it_beats_every_other_online_policy_on_held_out_routing():
    """The held-out documents of the demo model, half of the experts resident."""
    whole = trace.load(flashmoe.demo_routing_path())
    held = whole.select([i for i, name in enumerate(whole.names()) if name.endswith(("-0", "-1"))])
    rates = {
        name: simulate.replay(held, name, 0.5).hit_rate
        for name, policy in policies.available().items()
        if not policy.offline
    }
    ours = rates.pop("learned")
    assert ours > max(rates.values()) + 0.005
    assert simulate.replay(held, "belady", 0.5).hit_rate > ours


def test_layers_below_are_told_nearest_first():
    experts = np.array([[[1], [2], [3]]])
    told = below(experts, 2, 10)
    assert told.tolist() == [[2, 11, *[-1] * (LAYERS_BELOW - 2)]]
    assert (below(experts, 0, 10) == -1).all()


def test_features_of_a_worked_case():
    """Three tokens [0 1], [2 3], [0 1] of 8 experts: what followed [0 1] before was [2 3]."""
    memory = RoutingHistory.empty(Scope(8, 2))
    for row in ([0, 1], [2, 3], [0, 1]):
        remember(memory, Event.of_rows([row]))
    similar, _ = recall(memory, 0)
    assert similar == pytest.approx(1, abs=0.01)
    out = np.zeros((3, N_FEATURES), np.float32)
    for i, key in enumerate((0, 2, 4)):
        describe(memory, 0, key, similar, 0.0, 4, 0.5, out[i])
    named = dict(zip(NAMES, out.T, strict=True))
    np.testing.assert_allclose(named["recency"], np.log(np.array([1, 2, 4]) / 4 + 0.02), rtol=1e-6)
    np.testing.assert_allclose(named["frequency"], np.log(np.array([2.5, 1.5, 0.5]) / 7 * 4 + 0.05))
    vote = named["vote 1, fading 0.0"]
    assert vote[1] > 0 > vote[0]  # 2 is expected now, 0 is not
    assert not named["weights known"].any()
    assert memory.mark.sum() == memory.mark_below.sum() == 0  # scratch is left clean


def test_a_prompt_leaves_the_memory_that_a_decode_of_it_leaves():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(8)[:2] for _ in range(30)])
    weights = rng.random((30, 2))
    lower = rng.integers(0, 8, (30, 5))
    one_by_one, at_once = RoutingHistory.empty(Scope(8, 2)), RoutingHistory.empty(Scope(8, 2))
    for row, shares, chosen in zip(rows, weights, lower, strict=True):
        remember(one_by_one, Event.of_rows(row[None], 0, shares[None], chosen[None]))
    remember(at_once, Event.of_rows(rows, 0, weights, lower))
    for decoded, prefilled in zip(one_by_one, at_once, strict=True):
        np.testing.assert_array_equal(decoded, prefilled)


def test_without_router_weights_their_features_are_masked():
    whole = trace.load(flashmoe.demo_routing_path()).select([0, 7])
    bare = Trace(whole.experts, whole.sequence, whole.n_experts)
    lru, with_weights, without = (
        simulate.replay(t, name, 0.4).hit_rate
        for t, name in ((bare, "lru"), (whole, "learned"), (bare, "learned"))
    )
    assert min(with_weights, without) > lru


def test_one_budget_for_all_layers_uses_the_same_statistics_a_layer():
    whole = trace.load(flashmoe.demo_routing_path()).select([1])
    small = Trace(whole.experts[:, :4], whole.sequence, whole.n_experts)
    shared = simulate.Conditions(shared=True)
    lru = simulate.replay(small, "lru", 0.4, shared)
    ours = simulate.replay(small, "learned", 0.4, shared)
    assert ours.hit_rate > lru.hit_rate + 0.02


def test_damaged_policy_files_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(FlashMoEError, match="cannot be read"):
        learned.load(path)
    policy_file.save(path, "paper", {"w1": np.zeros((1, 2), np.float32)}, {})
    with pytest.raises(FlashMoEError, match="of the kind 'learned'"):
        learned.load(path.rename(tmp_path / "q.safetensors"))
    network = dict(learned.load(learned.SHIPPED))
    policy_file.save(path, "learned", network | {"b1": network["b1"] * np.float32(np.nan)}, {})
    with pytest.raises(FlashMoEError, match="finite"):
        learned.load(path.rename(tmp_path / "r.safetensors"))
    policy_file.save(path, "learned", network | {"b1": network["b1"][:3]}, {})
    with pytest.raises(FlashMoEError, match="another version"):
        learned.load(path)
