"""Guesses: who reads when, and that nothing but the time changes by them."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import flashmoe
from flashmoe import trace
from flashmoe.engines.transformers.experts.lookahead import RouterOutput
from flashmoe.engines.transformers.experts.token_memory import TokenMemory
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.residency.guess_record import PROBE_EVERY
from flashmoe.store import manifest


def generate(model, ids: torch.Tensor, new: int = 20) -> tuple[list[list[int]], dict]:
    """Tokens, and the counts once no guess is on its way."""
    tokens = tiny.generate(model, ids, new)
    model.flashmoe.residency.prefetcher.clear()
    return tokens, model.flashmoe.stats()


@pytest.mark.parametrize("more", [None, 0, 3])  # than top_k slots a layer; None: less, so shared
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_the_time_changes(stores, many_guesses, reading, family, more):
    store = stores(family)
    top_k, shared = manifest.load(store).top_k, more is None
    ids = torch.arange(3, 90).reshape(3, 29)
    outcomes = []
    for prefetching, spares in ((False, 0), (True, 2)):
        slots, extra = (top_k, -1) if shared else (top_k + more, spares)
        memory = tiny.budget(store, slots, extra)
        model = flashmoe.load(store, memory=memory, policy="lru", prefetch=prefetching)
        assert model.flashmoe.residency.pools.slots.shared == shared
        assert shared or model.flashmoe.residency.pools.slots.spares == spares
        assert (model.flashmoe.residency.prefetcher.spares is not None) == prefetching
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

    prefetcher.guess(1, lambda: [bad], np.full(8, -1))
    arrived = prefetcher.claim(1, bad, model.flashmoe.residency.pools.all[1].arena, 0)
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


def test_a_token_that_was_not_seen_before_has_no_vote():
    memory = TokenMemory(vocabulary=10, top_k=2)
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
        prefetcher.guess(1, lambda: asked.append(1), np.full(8, -1))
        prefetcher.record.add_guess(1e6)
    assert len(asked) == 2
    model.flashmoe.close()


def test_the_demo_models_routers_know_a_layer_ahead():
    """What docs/speed.md says of the accuracy, from the shipped recording."""
    routing = trace.load(flashmoe.demo_routing_path())
    chosen = routing.experts[:, 1:, None, :] == routing.guesses[..., None]
    assert 0.8 < chosen.any(-1).mean() < 0.9
