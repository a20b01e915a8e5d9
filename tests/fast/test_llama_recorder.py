"""What is recorded of llama.cpp's events, replayed, gives the hits of a cache that served them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import policies, trace
from flashmoe.cache import simulate
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.engines.llama.recorder import Recorder
from flashmoe.errors import FlashMoEError
from flashmoe.policies.base import Scope
from flashmoe.residency.routing import Routing
from flashmoe.store.manifest import LayerSpec, Manifest

LAYERS, TOP_K, EXPERTS = 7, 2, 9
MANIFEST = Manifest(
    "", "", TOP_K, "", "", 0, tuple(LayerSpec("", EXPERTS, 0, 4096, ()) for _ in range(LAYERS))
)
PASS = st.tuples(
    st.integers(1, 5),  # tokens
    st.integers(0, 5),  # of which the last layer computes at most so many
    st.sampled_from([LAYERS] * 5 + [1, 4]),  # layers that it came to
    st.integers(0, 3),  # 0: it begins a sequence
)


def serve(passes: list, policy: str, slots: int) -> tuple[Recorder, np.ndarray]:
    """A recorder of these passes with random routing, and each layer's requests and hits."""
    rng = np.random.default_rng(len(passes))
    recorder, routing = Recorder(MANIFEST), Routing(TOP_K, LAYERS)
    choice = policies.get(policy)
    caches = [
        ExpertCache(choice(Scope(EXPERTS, TOP_K, 1, layer, LAYERS, TOP_K), slots))
        for layer in range(LAYERS)
    ]
    for tokens, last, reached, begins in passes:
        if begins == 0:
            recorder.next_sequence()
        for layer in range(reached):
            count = min(tokens, last) if layer == LAYERS - 1 else tokens
            rows = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
            rows = rows[tokens - count :].astype(np.int64)
            if count:  # of none, the engine hears nothing
                recorder.note(layer, rows)
                event = routing.event(layer, rows, None, 0, EXPERTS)
                for _ in caches[layer].waves(event):
                    pass
    return recorder, np.array([[cache.requests, cache.hits] for cache in caches])


@pytest.mark.parametrize(("policy", "slots"), [("lru", 1), ("learned", 5), ("flashmoe-paper", 4)])
@settings(max_examples=40, deadline=None)
@given(passes=st.lists(PASS, min_size=1, max_size=12))
def test_a_replay_counts_what_the_cache_counted(tmp_path_factory, policy, slots, passes):
    recorder, counted = serve(passes, policy, slots)
    path = tmp_path_factory.getbasetemp() / "recorded.npz"
    recorder.trace({"model": "m"}).save(path)
    recorded = trace.load(path)
    conditions = simulate.Conditions(warm=True, as_recorded=True)
    outcome = simulate.replay(recorded, policy, 1.0, conditions, slots)
    np.testing.assert_array_equal(outcome.counted.sum(axis=1), counted)
    assert len(recorded.experts) == sum(tokens for tokens, *_ in passes)
    starts = [number for number, (*_, begins) in enumerate(passes) if begins == 0 and number]
    assert len(recorded.names()) == 1 + len(starts)


def test_a_whole_recording_has_no_other_array():
    recorder, _ = serve([(3, 3, LAYERS, 1), (1, 1, LAYERS, 1)], "lru", 3)
    recorded = recorder.trace({})
    assert recorded.computed is None
    assert recorded.step.tolist() == [0, 0, 0, 1]


def test_what_a_trace_cannot_hold_is_one_sentence():
    with pytest.raises(FlashMoEError, match="no token was computed"):
        Recorder(MANIFEST).trace({})
    recorder = Recorder(MANIFEST)
    recorder.note(0, np.arange(EXPERTS)[None])
    with pytest.raises(FlashMoEError, match="a layer chose 9 experts for a token where"):
        recorder.trace({})
