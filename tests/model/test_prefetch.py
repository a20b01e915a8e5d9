"""Guesses: who reads when, and that nothing but the time changes by them."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.engines.transformers.experts.lookahead import RouterOutput
from flashmoe.engines.transformers.experts.token_memory import TokenMemory
from flashmoe.engines.transformers.experts.votes import in_order
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.events import Event
from flashmoe.policies.base import Scope
from flashmoe.residency import prefetch
from flashmoe.residency.guess_record import PROBE_EVERY
from flashmoe.store import manifest


def generate(model, ids: torch.Tensor, new: int = 20) -> tuple[list[list[int]], dict]:
    """Tokens, and the counts once no guess is on its way."""
    tokens = tiny.generate(model, ids, new)
    model.flashmoe.residency.prefetcher.clear()
    return tokens, model.flashmoe.stats()


# than top_k slots a layer; None: less, so shared; 6: all
@pytest.mark.parametrize("more", [None, 0, 3, 6])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_the_time_changes(stores, many_guesses, reading, family, more):
    store = stores(family)
    top_k, shared, all_fit = manifest.load(store).top_k, more is None, more == 6
    ids = torch.arange(3, 90).reshape(3, 29)
    outcomes = []
    for prefetching, spares in ((False, 0), (True, 2)):
        slots, extra = (top_k, -1) if shared else (top_k + more, spares)
        memory = tiny.budget(store, slots, extra)
        model = flashmoe.load(store, memory=memory, policy="lru", prefetch=prefetching)
        assert model.flashmoe.residency.pools.slots.shared == shared
        assert shared or model.flashmoe.residency.pools.slots.spares == (0 if all_fit else spares)
        has_spares = model.flashmoe.residency.prefetcher.spares is not None
        assert has_spares == (prefetching and not all_fit)
        outcomes.append([generate(model, part) for part in (ids, ids[:1, :1])])
        model.flashmoe.close()
    for (plain, without), (guessed, stats) in zip(*outcomes, strict=True):
        assert guessed == plain
        extent_bytes = manifest.load(store).layers[0].extent_bytes
        read = stats["misses"] * extent_bytes + stats["prefetch_wasted_bytes"]
        assert stats["bytes_read"] == read
        assert stats["resident_bytes"] <= stats["memory_bytes"]
        assert stats["prefetch_used"] + stats["prefetch_wasted"] > 0
        if not shared:  # the same slots for the policy: the very same hits
            assert (stats["requests"], stats["hits"]) == (without["requests"], without["hits"])


def test_a_guess_that_fails_matters_only_when_it_is_needed(own_store, many_guesses):
    """Every expert that the run does not use is damaged, and guessed all the time."""
    memory = tiny.budget(own_store, 3, 2)
    model = flashmoe.load(own_store, memory=memory, policy="lru", prefetch=False)
    ids = torch.tensor([[5]])
    recorded = record(model, [ids[0]], max_new_tokens=2)
    healthy = generate(model, ids, 2)[0]
    model.flashmoe.close()

    layers = manifest.load(own_store).layers
    bad = next(e for e in range(8) if e not in recorded.experts[:, 1])
    with open(own_store / manifest.load(own_store).experts_file, "r+b") as file:
        file.seek(layers[1].extent_offset(bad))
        file.write(b"damage")
    model = flashmoe.load(own_store, memory=memory, policy="lru")
    prefetcher = model.flashmoe.residency.prefetcher
    nothing = torch.empty(0)
    output = RouterOutput(nothing, nothing, torch.tensor([[bad]]))
    model.flashmoe.lookahead.route = lambda *_: output
    tokens, stats = generate(model, ids, 2)
    assert tokens == healthy
    assert stats["prefetch_wasted"] > 0

    pool = model.flashmoe.residency.pools.of(1)
    pool.cache.evict_all_but(np.empty(0, np.int64))
    prefetcher.guess(1, lambda: [bad], pool)
    arrived = prefetcher.claim(1, bad, pool.arena, 0)
    with pytest.raises(FlashMoEError, match=f"expert {bad} of .*not those that were packed"):
        arrived.result(10)
    model.flashmoe.close()


def test_the_first_layer_is_guessed_from_what_its_tokens_chose_before(own_store, many_guesses):
    memory = tiny.budget(own_store, 3, 2)
    model = flashmoe.load(own_store, memory=memory, policy="lru")
    ids = torch.tensor([[5, 9]])
    guessed = []
    model.flashmoe.residency.prefetcher.guess = lambda layer, likely, _: guessed.append(
        (layer, set(likely() or ()))
    )
    for _ in range(2):
        model.flashmoe.reset()
        model(ids)
    chosen = record(model, [ids[0]], max_new_tokens=1).experts[:2, 0]
    first = [experts for layer, experts in guessed if layer == 0]
    assert first[:2] == [set(), set(chosen.reshape(-1).tolist())]
    assert chosen.shape == (2, model.config.num_experts_per_tok)
    model.flashmoe.close()


def test_a_layer_is_read_ahead_into_its_own_empty_slots(stores, many_guesses):
    store = stores("olmoe")
    model = flashmoe.load(store, memory=tiny.budget(store, 5, 2), policy="lru")
    residency = model.flashmoe.residency
    rows, weights = np.arange(8).reshape(4, 2), np.ones((4, 2), np.float32)
    in_slots = []
    for layer in (0, 1, 2, 0):  # then layer 1 has no empty ones
        for _ in residency.serve(layer, rows, weights, lambda: range(8)):
            pass
        in_slots.append(residency.prefetcher.bytes_in_slots)
        assert len(residency.pools.of(layer).cache.resident) == 5
    extent_bytes = residency.manifest.layers[0].extent_bytes
    assert in_slots == [5 * extent_bytes, 5 * extent_bytes, 0, 0]
    model.flashmoe.close()


@pytest.mark.parametrize("n_tokens", [8, 64, 300])
def test_right_guesses_for_a_prompt_come_as_a_cache_serves_them(n_tokens):
    """More than 4,096 choices are served in ascending order."""
    rows = np.random.default_rng(n_tokens).random((n_tokens, 64)).argsort(axis=1)[:, :16]
    cache = ExpertCache(policies.get("lru")(Scope(64, 16, 1, 0, 1), 20))
    served = [key for wave in cache.waves(Event.of_rows(rows)) for key, _ in wave.loads]
    assert in_order(rows, n_tokens, 64) == served


def test_of_a_few_tokens_the_surest_guess_comes_first():
    choices = np.array([[1, 2], [2, 5], [-1, -1]])
    assert in_order(choices, 3, 8) == [2, 1, 5]
    assert in_order(choices[:1, ::-1], 1, 8) == [2, 1]


def test_a_token_that_was_not_seen_before_has_no_vote():
    memory = TokenMemory(vocabulary=10, n_experts=8, top_k=2)
    memory.expect(np.array([3, 4, 3]))
    memory.note(np.array([[1, 2], [2, 5], [1, 2]]))
    memory.expect(np.array([3, 7, 4]))
    assert memory.likely() == [2, 1, 5]
    memory.note(np.array([[6, 7]]))  # of another step: of fewer tokens
    memory.expect(np.array([3, 10]))  # no such token
    assert memory.likely() == []


def test_who_takes_longer_to_guess_than_to_read_is_rarely_asked(own_store, many_guesses):
    memory = tiny.budget(own_store, 3, 2)
    model = flashmoe.load(own_store, memory=memory, policy="lru")
    prefetcher = model.flashmoe.residency.prefetcher
    prefetcher.record.add_guess(1e6)
    asked = []
    for _ in range(2 * PROBE_EVERY):
        prefetcher.guess(1, lambda: asked.append(1), model.flashmoe.residency.pools.of(1))
        prefetcher.record.add_guess(1e6)
    assert len(asked) == 2
    model.flashmoe.close()


class Clock:
    """Stands in for the module `time`: every look at it takes so many seconds."""

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds, self.now = step_seconds, 0.0

    def perf_counter(self) -> float:
        self.now += self.step_seconds
        return self.now


@pytest.mark.parametrize(("step_seconds", "share_off"), [(0.0, 0), (1e3, 1 - 1 / PROBE_EVERY)])
def test_guesses_that_lose_time_are_left_out_and_counted(
    own_store, many_guesses, monkeypatch, step_seconds, share_off
):
    """A read takes a second here, and asking a router as long as the clock says."""
    memory, ids = tiny.budget(own_store, 3, 2), torch.tensor([[5, 9, 70]])
    outcomes = []
    for prefetching in (False, True):
        monkeypatch.setattr(prefetch, "time", Clock(step_seconds))
        model = flashmoe.load(own_store, memory=memory, policy="lru", prefetch=prefetching)
        outcomes.append(generate(model, ids, 40))
        model.flashmoe.close()
    (plain, without), (guessed, stats) = outcomes
    assert guessed == plain
    assert (stats["requests"], stats["hits"]) == (without["requests"], without["hits"])
    calls = stats["prefetch_layers"] * 40
    assert stats["prefetch_off"] == pytest.approx(share_off * calls, rel=0.1)
    assert without["prefetch_off"] == 0


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_is_guessed_an_event_gets_its_own_experts(data, read_ahead):
    """Layers in turn, each with an event of one or several waves, and any guesses of the next."""
    residency, expected = read_ahead
    residency.reset()
    top_k, n_layers = residency.manifest.top_k, len(residency.manifest.layers)
    token = st.permutations(range(8)).map(lambda experts: experts[:top_k])
    events = data.draw(
        st.lists(
            st.tuples(st.lists(token, min_size=1, max_size=6), st.permutations(range(8))),
            max_size=12,
        )
    )
    for number, (tokens, guesses) in enumerate(events):
        layer, rows = number % n_layers, np.array(tokens)
        weights = np.ones(rows.shape, np.float32)
        seen = set()
        for group in residency.serve(layer, rows, weights, lambda experts=guesses: experts):
            for expert, parameters in group:
                seen.add(expert)
                assert all(
                    torch.equal(tensor, expected[layer][expert][name])
                    for name, tensor in parameters.items()
                )
            assert residency.pools.resident_bytes <= residency.pools.memory_bytes
        assert seen == set(rows.reshape(-1).tolist())
    residency.prefetcher.clear()
    assert residency.pools.resident_bytes <= residency.pools.peak_resident_bytes
    assert residency.pools.peak_resident_bytes <= residency.pools.memory_bytes


@pytest.fixture(params=[None, 0, 3, 6])
def read_ahead(request, stores, many_guesses, reading):
    """What serves experts, with two spare slots, and each layer's experts as they are stored."""
    store, more = stores("olmoe"), request.param
    top_k = manifest.load(store).top_k
    slots, extra = (top_k, -1) if more is None else (top_k + more, 2)
    model = flashmoe.load(store, memory=tiny.budget(store, slots, extra), policy="lru")
    residency = model.flashmoe.residency
    weights, expected = np.ones((4, 2), np.float32), []
    for layer in range(len(residency.manifest.layers)):
        groups = residency.serve(layer, np.arange(8).reshape(4, 2), weights, lambda: [])
        expected.append(
            {
                expert: {name: tensor.clone() for name, tensor in parameters.items()}
                for group in groups
                for expert, parameters in group
            }
        )
    yield residency, expected
    model.flashmoe.close()


def test_the_demo_models_routers_know_a_layer_ahead():
    """What docs/speed.md says of the accuracy, from the shipped recording."""
    routing = trace.load(flashmoe.demo_routing_path())
    chosen = routing.experts[:, 1:, None, :] == routing.guesses[..., None]
    assert 0.8 < chosen.any(-1).mean() < 0.9
