"""Keeps which experts were resident, and what the policy had learnt, from one run to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.serving import TOKENS
from flashmoe.disk import plain_npz
from flashmoe.errors import FlashMoEError
from flashmoe.policies.parts import saved_state
from flashmoe.reading.base import Arriving
from flashmoe.residency.residency import Residency

FORMAT, VERSION = "flashmoe-warm", 3


def save(residency: Residency, path: Path) -> None:
    """Write `path` (.npz), atomically: kilobytes, no weights. Not during generation."""
    description = {"format": FORMAT, "version": VERSION, **_identity(residency)}
    arrays = {"description": np.array(json.dumps(description))}
    for number, pool in enumerate(residency.pools.all):
        cache = pool.cache
        arrays[f"{number}/residents"] = np.array(cache.resident, np.int64)
        arrays[f"{number}/served"] = np.array([cache.n_slots, cache.tokens])
        for name, array in saved_state.arrays(cache.policy).items():
            arrays[f"{number}/state/{name}"] = array
    plain_npz.write(path, arrays)


def restore(residency: Residency, path: Path) -> int:
    """Read the experts that were resident, as many as there is room for; returns how many.

    The budget may be another one than then, but layers must share slots, or not, as they did.
    Raises FlashMoEError when the file is none of this model and policy, or a read fails; all
    slots are empty then. Not during generation.
    """
    try:
        arrays = plain_npz.read(path)
    except plain_npz.UnreadableError as error:
        raise _damaged(path, error) from None
    try:
        description = json.loads(str(arrays["description"]))
        if description != {"format": FORMAT, "version": VERSION, **_identity(residency)}:
            raise FlashMoEError(
                f"{path} was kept for another model, policy or division of the slots than this "
                "run's, or by another version: leave it out, or name another file"
            )
        count = len(residency.pools.all)
        caches = [_cache(residency, number, arrays) for number in range(count)]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise _damaged(path, error) from None
    with residency.lock:
        residency.prefetcher.clear()
        _read(residency, caches)
        residency.pools.restart(caches)
        residency.reset_counts()
    return sum(len(cache.resident) for cache in caches)


def _identity(residency: Residency) -> dict[str, Any]:
    pools, layers = residency.pools, residency.manifest.layers
    return {
        "policy": pools.policy_name,
        "shared": pools.slots.shared,
        "layers": [[layer.module, layer.n_experts] for layer in layers],
    }


def _damaged(path: Path, error: BaseException) -> FlashMoEError:
    return FlashMoEError(f"{path} is not a file that keeps a cache warm, or damaged ({error})")


def _cache(residency: Residency, number: int, arrays: dict[str, np.ndarray]) -> ExpertCache:
    """As it was, then of the size that it has now."""
    pools = residency.pools
    policy_now = pools.all[number].cache.policy
    n_slots, tokens = (int(n) for n in arrays[f"{number}/served"])
    keys = arrays[f"{number}/residents"].astype(np.int64).tolist()
    valid = all(0 <= key < policy_now.n_keys for key in keys) and len(set(keys)) == len(keys)
    if not valid or not len(keys) <= n_slots <= policy_now.n_keys:
        raise ValueError("residents that cannot be")
    prefix = f"{number}/state/"
    state = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    then = ExpertCache(pools.new_policy(number, n_slots))
    if not saved_state.fits(then.policy, state):
        raise ValueError("another policy's state")
    saved_state.take(then.policy, state)
    then.fill_with(keys)
    then.residency.counts[TOKENS] = tokens
    cache, _ = then.resized(pools.new_policy(number, policy_now.n_slots))
    return cache


def _read(residency: Residency, caches: list[ExpertCache]) -> None:
    """Fill each pool's slots with the experts that its cache of `caches` says are there."""
    reads: list[Arriving] = []
    for pool, cache in zip(residency.pools.all, caches, strict=True):
        for key in cache.resident:
            layer, expert = pool.layer_and_expert(key)
            slot = int(cache.residency.slot_of[key])
            memory = pool.arena.memory_for(slot, layer, expert)
            reads += residency.reader.submit(layer, [(expert, memory)])
    errors = [error for read in reads if (error := read.exception())]  # waits for all
    if errors:
        residency.reset()
        raise errors[0]
