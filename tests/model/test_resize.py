"""What `resize` keeps, also where it fails; and counts that are right whoever asks, and when."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from tiny import budget, generate, prompt

import flashmoe
from flashmoe.engines.transformers import engine
from flashmoe.errors import FlashMoEError
from flashmoe.memory import host_arena as arenas
from flashmoe.memory.device_arena import DeviceArena

COUNTS = ("requests", "hits", "prefetch_used", "prefetch_wasted", "bytes_read", "policy_seconds")


def held() -> tuple[set[threading.Thread], int]:
    """Threads, and how many files are open."""
    return set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def limited(monkeypatch):
    """From now on so many arenas can be made, and no more."""

    allocate = arenas.aligned_memory

    def after(count: int) -> None:
        left = [count]

        def aligned_memory(size_bytes: int):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return allocate(size_bytes)

        monkeypatch.setattr(arenas, "aligned_memory", aligned_memory)

    return after


@pytest.mark.parametrize("made", range(4))  # of three layers, then the spare slots
def test_a_load_without_memory_leaves_nothing_behind(stores, many_guesses, limited, made):
    store = stores()
    before = held()
    limited(made)
    with pytest.raises(FlashMoEError, match="no memory for"):
        flashmoe.load(store, memory=budget(store, 3, 2), policy="lru")
    threads, files = held()
    assert not threads - before[0]  # those of others, that were there before, may have ended
    assert files == before[1]


@pytest.mark.parametrize(
    ("slots", "made"),  # 1: layers begin to share a cache
    [(1, 0), (1, 1), (7, 0), (7, 1), (7, 2), (7, 3)],
)
def test_a_resize_without_memory_leaves_all_as_it_was(stores, many_guesses, limited, slots, made):
    model = flashmoe.load(stores(), memory=budget(stores(), 4, 2), policy="lru")
    expected = generate(model, prompt(40), 6)
    model.flashmoe.residency.prefetcher.clear()
    stats = model.flashmoe.stats()
    residents = [cache.resident for cache in model.flashmoe.residency.pools.caches]
    limited(made)
    with pytest.raises(FlashMoEError, match="no memory for"):
        model.flashmoe.resize(budget(stores(), slots, 1))
    assert model.flashmoe.stats() == stats
    assert [cache.resident for cache in model.flashmoe.residency.pools.caches] == residents
    limited(10)
    assert generate(model, prompt(40), 6) == expected
    model.flashmoe.resize(budget(stores(), 6))
    assert generate(model, prompt(40), 6) == expected
    model.flashmoe.close()


@pytest.fixture
def device(monkeypatch):
    """An accelerator that has room for so many slots of a layer at once."""
    room = {"slots": 8}

    def arena_on(where, layer, n_slots):
        if n_slots > room["slots"]:
            raise FlashMoEError(f"no room for {n_slots}")
        return DeviceArena(layer, n_slots, where)

    monkeypatch.setattr(engine, "arena_on", arena_on)
    return room


def test_an_accelerator_without_room_goes_on_with_what_it_had(loaded, stores, device):
    model = loaded(slots=4)
    expected = generate(model, prompt(40), 6)
    stats = model.flashmoe.stats()
    device["slots"] = 5
    with pytest.raises(FlashMoEError, match="no room for 8"):
        model.flashmoe.resize(budget(stores(), 8))
    after = model.flashmoe.stats()
    assert after["slots"] == stats["slots"]
    assert after["memory_bytes"] == stats["memory_bytes"]
    assert after["requests"] == stats["requests"]
    assert generate(model, prompt(40), 6) == expected


def test_an_accelerator_that_lost_its_room_closes_the_model(loaded, stores, device):
    model = loaded(slots=4)
    before = held()[0]
    generate(model, prompt(5), 2)
    device["slots"] = 0
    with pytest.raises(FlashMoEError, match="no room for 4"):
        model.flashmoe.resize(budget(stores(), 8))
    assert not held()[0] - before  # those of others, that were there before, may have ended
    with pytest.raises(FlashMoEError, match="was closed"):
        generate(model, prompt(5), 2)


def test_counts_go_on_through_a_resize(stores, many_guesses):
    """To another size, to one cache for all layers and back, with spare slots and without."""
    model = flashmoe.load(stores(), memory=budget(stores(), 4, 2), policy="lru")
    generate(model, prompt(9), 12)
    for slots, spares in ((3, 1), (1, 2), (8, 0), (5, 2)):
        model.flashmoe.residency.prefetcher.clear()
        before = model.flashmoe.stats()
        model.flashmoe.resize(budget(stores(), slots, spares))
        after = model.flashmoe.stats()
        assert [after[name] for name in COUNTS] == [before[name] for name in COUNTS]
        generate(model, prompt(9), 12)
        assert model.flashmoe.stats()["requests"] > before["requests"]
    assert before["prefetch_used"] + before["prefetch_wasted"] > 0
    model.flashmoe.reset_counts()
    assert not any(model.flashmoe.stats()[name] for name in COUNTS)
    model.flashmoe.close()


def test_bypass_slots_come_and_go(stores, whim):
    """With the budget, also where other layers give back in the midst of a prompt's layer."""
    everything = budget(stores(), 8)
    model = flashmoe.load(stores(), memory=everything, policy=whim)
    pools, expected = model.flashmoe.residency.pools, generate(model, prompt(1), 40)
    for slots, bypass in ((3, 2), (8, 0), (4, 2), (5, 2), (1, 0), (2, 2), (3, 2), (8, 0)):
        model.flashmoe.resize(budget(stores(), slots))
        assert model.flashmoe.stats()["bypass_slots"] == bypass
        assert all(cache.policy.bypass_slots == bypass for cache in pools.caches)
        assert (pools.bypass.n_slots if pools.bypass else 0) == bypass
        assert generate(model, prompt(1), 40) == expected
    pools.shrink(budget(stores(), 4), but=pools.all[1])
    assert [cache.n_slots for cache in pools.caches] == [4, 8, 3]
    assert generate(model, prompt(1), 40) == expected
    model.flashmoe.resize(budget(stores(), 4))
    assert [cache.policy.bypass_slots for cache in pools.caches] == [2, 2, 2]
    assert generate(model, prompt(1), 40) == expected
    model.flashmoe.close()


def test_the_peak_is_the_most_there_was_though_nobody_asked(loaded, stores):
    model = loaded(slots=8)
    generate(model, prompt(200), 2)
    full = budget(stores(), 8)
    model.flashmoe.resize(budget(stores(), 2))
    stats = model.flashmoe.stats()
    assert stats["resident_bytes"] <= budget(stores(), 2)
    assert stats["peak_resident_bytes"] == full
    assert model.flashmoe.stats() == stats  # asking changes nothing
    model.flashmoe.reset_counts()
    assert model.flashmoe.stats()["peak_resident_bytes"] == stats["resident_bytes"]
    model.flashmoe.reset()
    assert model.flashmoe.stats()["peak_resident_bytes"] == 0


def test_the_peak_outlives_a_failed_read(loaded, monkeypatch):
    model = loaded(slots=3)
    generate(model, prompt(60), 2)
    full = model.flashmoe.residency.pools.resident_bytes

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        with pytest.raises(FlashMoEError, match="the read failed"):
            generate(model, prompt(61), 2)
    assert model.flashmoe.residency.pools.resident_bytes < full
    assert model.flashmoe.stats()["peak_resident_bytes"] == full


@torch.inference_mode()
def test_counts_add_up_at_any_moment(loaded):
    """Another thread asks, resets and generates while one generates."""
    model, wrong, ended = loaded(slots=3), [], threading.Event()

    def ask() -> None:
        while not ended.is_set():
            stats = model.flashmoe.stats()
            if stats["hits"] + stats["misses"] != stats["requests"]:
                wrong.append(stats)
            if stats["peak_resident_bytes"] < stats["resident_bytes"]:
                wrong.append(stats)
            model.flashmoe.reset_counts()

    asking = threading.Thread(target=ask)
    asking.start()
    expected = generate(loaded(slots=8), prompt(9), 30)
    given = generate(model, prompt(9), 30)
    ended.set()
    asking.join()
    assert given == expected
    assert not wrong


def test_a_closed_engine_says_so(loaded, stores):
    model = loaded(slots=4)
    model.flashmoe.close()
    for change in (model.flashmoe.reset, lambda: model.flashmoe.resize(budget(stores(), 8))):
        with pytest.raises(FlashMoEError, match="was closed: load the model again"):
            change()
    assert model.flashmoe.stats()["slots"] == 0
