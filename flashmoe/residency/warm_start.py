"""Keeps which experts were resident, and what the policy had learnt, from one run to the next."""

from __future__ import annotations

import json
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.disk import plain_npz
from flashmoe.engines.transformers.engine import Engine
from flashmoe.errors import FlashMoEError
from flashmoe.policies.parts import saved_state

FORMAT, VERSION = "flashmoe-warm", 2


def save(engine: Engine, path: Path) -> None:
    """Write `path` (.npz), atomically: kilobytes, no weights. Not during generation."""
    description = {"format": FORMAT, "version": VERSION, **_identity(engine)}
    arrays = {"description": np.array(json.dumps(description))}
    for number, cache in enumerate(engine.caches):
        arrays[f"{number}/residents"] = np.array(cache.resident, np.int64)
        arrays[f"{number}/served"] = np.array([cache.n_slots, cache.tokens])
        for name, array in saved_state.arrays(cache.policy).items():
            arrays[f"{number}/state/{name}"] = array
    plain_npz.write(path, arrays)


def restore(engine: Engine, path: Path) -> int:
    """Read the experts that were resident, as many as there is room for; returns how many.

    The budget may be another one than then, but layers must share slots, or not, as they did.
    Raises FlashMoEError when the file is none of this model and policy, or a read fails; the
    engine is cold then. Not during generation.
    """
    try:
        held = plain_npz.read(path)
    except plain_npz.UnreadableError as error:
        raise _damaged(path, error) from None
    try:
        known = json.loads(str(held["description"]))
        same = {"format": FORMAT, "version": VERSION, **_identity(engine)} == known
        if not same:
            raise FlashMoEError(
                f"{path} was kept for another model, policy or division of the slots than this "
                "run's, or by another version: leave it out, or name another file"
            )
        caches = [_cache(engine, number, held) for number in range(len(engine.caches))]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise _damaged(path, error) from None
    _read(engine, caches)
    return sum(len(cache.resident) for cache in caches)


def _identity(engine: Engine) -> dict[str, Any]:
    layers = [[layer.module, layer.n_experts] for layer in engine.manifest.layers]
    return {"policy": engine.policy_name, "shared": engine.slots.shared, "layers": layers}


def _damaged(path: Path, error: BaseException) -> FlashMoEError:
    return FlashMoEError(f"{path} is not a file that keeps a cache warm, or damaged ({error})")


def _cache(engine: Engine, number: int, held: dict[str, np.ndarray]) -> ExpertCache:
    """As it was, then of the size that it has now."""
    now = engine.caches[number]
    slots, tokens = (int(n) for n in held[f"{number}/served"])
    keys = held[f"{number}/residents"].astype(np.int64).tolist()
    valid = all(0 <= key < now.policy.n_keys for key in keys) and len(set(keys)) == len(keys)
    if not valid or not len(keys) <= slots <= now.policy.n_keys:
        raise ValueError("residents that cannot be")
    prefix = f"{number}/state/"
    learnt = {n.removeprefix(prefix): a for n, a in held.items() if n.startswith(prefix)}
    then = ExpertCache(engine.new_policy(number, slots))
    if not saved_state.fits(then.policy, learnt):
        raise ValueError("another policy's state")
    saved_state.take(then.policy, learnt)
    then.place(keys)
    then.tokens = tokens
    cache, _ = then.resized(engine.new_policy(number, now.n_slots))
    return cache


def _read(engine: Engine, caches: list[ExpertCache]) -> None:
    with engine.lock:
        reads, shared = [], engine.slots.shared
        for number, (cache, arena) in enumerate(zip(caches, engine.arenas, strict=True)):
            for key in cache.resident:
                layer, expert = divmod(key, engine.manifest.layers[0].n_experts)
                place = layer if shared else number
                slot = arena.slots[int(cache.residency.slot_of[key])]
                reads += engine.reader.submit(place, [(expert if shared else key, slot)])
        wait(reads)
        for read in reads:
            if error := read.exception():
                engine.reset()
                raise error
        engine.use(caches)
        engine.reset_counts()
