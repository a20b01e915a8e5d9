"""Divides a budget of bytes into slots: of every layer, or of all together, and spare ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import LayerSpec, Manifest
from flashmoe.util.sizes import format_bytes

# Slots for guesses: so many, and no larger a share of all (docs/speed.md#spare-slots).
SPARES, SPARE_SHARE = 8, 1 / 32
# Layers share one cache where each would have fewer slots than so many times top_k
# (docs/speed.md#one-cache-for-all-layers).
SHARE_BELOW = 1.5


class Slots(NamedTuple):
    """How a budget is used."""

    shared: bool  # one cache for all layers
    n_slots: tuple[int, ...]  # of each cache, where a layer has so many experts
    spares: int  # for guesses
    bypass: int = 0  # for experts of the event at hand that their cache does not keep


def divide(
    manifest: Manifest,
    memory_bytes: int,
    *,
    policy_can_share: bool,
    reserve_spares: bool,
    policy_bypasses: bool = False,
    whole_events: bool = False,
) -> Slots:
    """The slots that `memory_bytes` pays for.

    policy_can_share: the policy makes good use of one cache for all layers. A budget that cannot
        give each layer top_k slots is shared in any case.
    reserve_spares: keep spare slots for prefetching, from what whole slots for every layer leave;
        a slot a layer is given up for them only where nothing is left.
    policy_bypasses: keep top_k slots for a token's experts that have no other, where layers are
        laid out alike, not all experts fit, and each cache has slots for a token all the same. Then
        some layers have one slot more than others, so that nothing is left.
    whole_events: all experts of a prompt's event are in memory at once, those beyond the slots in
        the room of other layers' experts. Layers do not share a cache then.
    Raises FlashMoEError when the budget holds less than one token needs at one layer (or at
    all of them, where layers differ in size and cannot share).
    """
    if whole_events:
        return _divide_whole(manifest, memory_bytes, reserve_spares, policy_bypasses)
    layers = manifest.layers
    first, top_k = layers[0], manifest.top_k
    alike = _alike(manifest)
    one_each = sum(layer.extent_bytes for layer in layers)
    whole = memory_bytes // one_each
    shared = alike and (whole < top_k or (policy_can_share and whole < SHARE_BELOW * top_k))
    if memory_bytes < (least := least_bytes(manifest)):
        where = "at a layer" if alike else f"at each of {len(layers)} layers of different sizes"
        raise FlashMoEError(
            f"memory={format_bytes(memory_bytes)} is too small: a token uses {top_k} experts "
            f"{where}, which takes {format_bytes(least)} ({least} bytes) at least"
        )
    most = max(layer.n_experts for layer in layers)
    reserve_spares = reserve_spares and alike and whole < most
    extents = memory_bytes // first.extent_bytes
    spares = min(SPARES, int(extents * SPARE_SHARE), extents - top_k) if reserve_spares else 0
    bypass = top_k if policy_bypasses and alike and whole < most else 0
    least_slots = top_k if shared else top_k * len(layers)
    if bypass and extents - bypass >= least_slots:
        spares = min(spares, extents - bypass - least_slots)
        rest = extents - bypass - spares
        n_slots = (rest,) if shared else _spread(layers, rest * first.extent_bytes)
        return Slots(shared, n_slots, spares, bypass)
    if shared:
        return Slots(True, (extents - spares,), spares)
    left = (memory_bytes - whole * one_each) // first.extent_bytes
    if spares and not left and whole > top_k:
        whole, left = whole - 1, len(layers)
    return Slots(False, (min(whole, most),) * len(layers), min(spares, left))


def _spread(layers: Sequence[LayerSpec], memory_bytes: int) -> tuple[int, ...]:
    """As many slots for every layer as there is room for; the lowest get one more of the rest."""
    each, left = divmod(memory_bytes, sum(layer.extent_bytes for layer in layers))
    n_slots = []
    for layer in layers:
        left -= layer.extent_bytes
        n_slots.append(each + 1 if left >= 0 else each)
    return tuple(n_slots)


def _divide_whole(
    manifest: Manifest, memory_bytes: int, reserve_spares: bool, policy_bypasses: bool
) -> Slots:
    """As many slots a layer as there is room for; at least all experts of any one layer fit."""
    if memory_bytes < (least := least_bytes(manifest, whole_events=True)):
        raise FlashMoEError(
            f"memory={format_bytes(memory_bytes)} is too small: a prompt may need all experts of a "
            f"layer at once, which takes {format_bytes(least)} ({least} bytes) at least"
        )
    most = max(layer.n_experts for layer in manifest.layers)
    one_each = sum(layer.extent_bytes for layer in manifest.layers)
    largest = max(layer.extent_bytes for layer in manifest.layers)
    if memory_bytes >= most * one_each:
        return Slots(False, (most,) * len(manifest.layers), 0)
    extents, top_k = memory_bytes // largest, manifest.top_k
    spares = min(SPARES, int(extents * SPARE_SHARE)) if reserve_spares else 0
    rest = memory_bytes - (spares + top_k) * largest
    if policy_bypasses and rest >= top_k * one_each:
        return Slots(False, _spread(manifest.layers, rest), spares, top_k)
    each = max(1, (memory_bytes - spares * largest) // one_each)
    return Slots(False, (each,) * len(manifest.layers), spares)


def least_bytes(manifest: Manifest, *, whole_events: bool = False) -> int:
    """The smallest budget: one token's experts, of a layer or of each where layers differ.

    whole_events: all experts of one layer, or one of each.
    """
    if whole_events:
        one_each = sum(layer.extent_bytes for layer in manifest.layers)
        return max(one_each, *(layer.n_experts * layer.extent_bytes for layer in manifest.layers))
    layers = manifest.layers[:1] if _alike(manifest) else manifest.layers
    return manifest.top_k * sum(layer.extent_bytes for layer in layers)


def _alike(manifest: Manifest) -> bool:
    return all(layer.tensors == manifest.layers[0].tensors for layer in manifest.layers)
