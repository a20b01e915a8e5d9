"""A budget divided: no byte too many, none left idle beside bypass, and nothing else changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.errors import FlashMoEError
from flashmoe.residency import budget
from flashmoe.residency.budget import SPARE_SHARE, SPARES, Slots
from flashmoe.store.manifest import LayerSpec, Manifest, TensorSpec

TOP_K = 3


def model(sizes: list[int], n_experts: int) -> Manifest:
    layers = tuple(LayerSpec(str(i), n_experts, 0, size, ()) for i, size in enumerate(sizes))
    return Manifest("", "", TOP_K, "", "", 0, layers)


@given(
    size=st.integers(1, 1000), n_layers=st.integers(1, 12), n_experts=st.integers(TOP_K, 64),
    share=st.floats(0, 1.2), can_share=st.booleans(), guesses=st.booleans(),
)  # fmt: skip
def test_layers_alike(size, n_layers, n_experts, share, can_share, guesses):
    manifest = model([size] * n_layers, n_experts)
    memory_bytes = int(share * size * n_layers * n_experts)
    options = dict(policy_can_share=can_share, reserve_spares=guesses)
    if memory_bytes < budget.least_bytes(manifest):
        with pytest.raises(FlashMoEError, match="too small"):
            budget.divide(manifest, memory_bytes, policy_bypasses=True, **options)
        return
    plain = budget.divide(manifest, memory_bytes, **options)
    slots = budget.divide(manifest, memory_bytes, policy_bypasses=True, **options)
    extents = memory_bytes // size
    for one in (plain, slots):
        assert sum(one.n_slots) + one.spares + one.bypass <= extents
        assert one.shared == plain.shared
        assert one.spares <= min(SPARES, int(extents * SPARE_SHARE) if guesses else 0)
    least_slots = TOP_K if slots.shared else TOP_K * n_layers
    if not slots.bypass:
        assert slots == plain
        assert extents >= n_layers * n_experts or extents - TOP_K < least_slots
        return
    assert slots.bypass == TOP_K
    assert sum(slots.n_slots) + slots.spares + slots.bypass == extents
    assert max(slots.n_slots) - min(slots.n_slots) <= 1
    assert list(slots.n_slots) == sorted(slots.n_slots, reverse=True)
    assert sum(slots.n_slots) >= least_slots
    assert slots.shared or min(slots.n_slots) >= TOP_K
    assert slots.shared or max(slots.n_slots) <= n_experts


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=8), n_experts=st.integers(TOP_K, 64),
    share=st.floats(0, 1.2), guesses=st.booleans(),
)  # fmt: skip
def test_whole_events_and_layers_of_any_size(sizes, n_experts, share, guesses):
    """Beside the residents there is room for a token's experts of any layer, and for guesses."""
    manifest = model(sizes, n_experts)
    memory_bytes = max(
        int(share * n_experts * sum(sizes)), budget.least_bytes(manifest, whole_events=True)
    )
    options = dict(policy_can_share=True, reserve_spares=guesses, whole_events=True)
    plain = budget.divide(manifest, memory_bytes, **options)
    slots = budget.divide(manifest, memory_bytes, policy_bypasses=True, **options)
    held = sum(n * size for n, size in zip(slots.n_slots, sizes, strict=True))
    left = memory_bytes - held - (slots.spares + slots.bypass) * max(sizes)
    assert left >= 0
    assert max(slots.n_slots) - min(slots.n_slots) <= 1
    if slots.bypass:
        assert slots.bypass == TOP_K <= min(slots.n_slots)
        lowest = slots.n_slots.index(min(slots.n_slots))
        assert left < sizes[lowest]  # which layer would be next
    else:
        assert slots == plain
        room = memory_bytes - (slots.spares + TOP_K) * max(sizes)
        assert plain.n_slots[0] == n_experts or room < TOP_K * sum(sizes)


def test_layers_that_differ_in_a_store_cannot_exchange_slots():
    layers = tuple(
        LayerSpec(str(size), 8, 0, size, (TensorSpec("w", "uint8", (size,), 0),)) for size in (7, 9)
    )
    manifest = Manifest("", "", TOP_K, "", "", 0, layers)
    options = dict(policy_can_share=True, reserve_spares=False, policy_bypasses=True)
    assert budget.divide(manifest, 16 * 5, **options) == Slots(False, (5, 5), 0)
