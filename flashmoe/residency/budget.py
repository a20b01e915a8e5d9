"""Divides a budget of bytes into slots: of every layer, or of all together, and spare ones."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe.errors import FlashMoEError
from flashmoe.store.manifest import Manifest
from flashmoe.util.sizes import format_bytes

# For guesses: twice what OLMoE's drive reads while a layer computes. Of 256 slots 3 %, worth half
# a point of hit rate; of fewer they take no larger a share.
SPARES, SPARE_SHARE = 8, 1 / 32
# With fewer slots a layer than this times top_k, a cache a layer holds little beside the experts
# of the present token, and all policies tie. One cache for all layers keeps those of one layer
# only: at 8 slots a layer `learned` hits 38.5 in place of 32.6 % (demo, top-8), 48.1 of 44.0
# (gpt-oss-20b, top-4). From twice top_k it gains 1 point, at twice the policy's cost.
POOL_BELOW = 1.5


class Slots(NamedTuple):
    """How a budget is used."""

    shared: bool  # one cache for all layers
    n_slots: int  # of each cache, where a layer has so many experts
    spares: int


def divide(manifest: Manifest, memory_bytes: int, *, pools: bool, guesses: bool) -> Slots:
    """The slots that `memory_bytes` pays for.

    pools: the policy makes good use of one cache for all layers. A budget that cannot give
        each layer top_k slots is pooled in any case.
    guesses: keep spare slots for prefetching, from what whole slots for every layer leave; a
        slot a layer is given up for them only where nothing is left.
    Raises FlashMoEError when the budget holds less than one token needs at one layer (or at
    all of them, where layers differ in size and cannot share).
    """
    layers = manifest.layers
    first, top_k = layers[0], manifest.top_k
    alike = _alike(manifest)
    one_each = sum(layer.extent_bytes for layer in layers)
    whole = memory_bytes // one_each
    pool = alike and (whole < top_k or (pools and whole < POOL_BELOW * top_k))
    if memory_bytes < (least := least_bytes(manifest)):
        where = "at a layer" if alike else f"at each of {len(layers)} layers of different sizes"
        raise FlashMoEError(
            f"memory={format_bytes(memory_bytes)} is too small: a token uses {top_k} experts "
            f"{where}, which takes {format_bytes(least)} ({least} bytes) at least"
        )
    most = max(layer.n_experts for layer in layers)
    guesses = guesses and alike and whole < most
    extents = memory_bytes // first.extent_bytes
    spares = min(SPARES, int(extents * SPARE_SHARE), extents - top_k) if guesses else 0
    if pool:
        return Slots(True, extents - spares, spares)
    left = (memory_bytes - whole * one_each) // first.extent_bytes
    if spares and not left and whole > top_k:
        whole, left = whole - 1, len(layers)
    return Slots(False, min(whole, most), min(spares, left))


def least_bytes(manifest: Manifest) -> int:
    """The smallest budget: one token's experts, of a layer or of each where layers differ."""
    layers = manifest.layers[:1] if _alike(manifest) else manifest.layers
    return manifest.top_k * sum(layer.extent_bytes for layer in layers)


def _alike(manifest: Manifest) -> bool:
    return all(layer.tensors == manifest.layers[0].tensors for layer in manifest.layers)
