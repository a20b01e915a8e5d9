"""memory="auto" follows what is free while tokens are computed, and no token changes."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import llama_process
import pytest
import torch
from tiny import budget, generate, prompt

import flashmoe
from flashmoe.errors import FlashMoEError
from flashmoe.memory import following, free_memory
from flashmoe.residency.residency import Residency

WITHIN_SECONDS = 10.0


class Machine:
    """A machine whose free memory is what `others` and the experts of one engine leave."""

    def __init__(self, all_bytes: int) -> None:
        self.all_bytes, self.others, self.engine = all_bytes, 0, None

    def available_bytes(self) -> int:
        present = self.engine.present_bytes if self.engine else 0
        return max(0, self.all_bytes - self.others - present)


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "flashmoe-memory"]


def wait_until(true) -> bool:
    until = time.monotonic() + WITHIN_SECONDS
    while not true() and time.monotonic() < until:
        time.sleep(0.002)
    return bool(true())


@pytest.fixture
def followed(stores, monkeypatch):
    """Loads a model that may take all of a machine but a tenth; closed afterwards."""
    monkeypatch.setattr(following, "CALM_SECONDS", 0.05)
    monkeypatch.setattr(following, "STEP_SECONDS", 0.005)
    monkeypatch.setattr(following, "LATEST_SECONDS", 0.005)
    monkeypatch.setattr(following, "SOONEST_SECONDS", 0.002)
    models = []

    def get(slots: float = 10.0, family="olmoe", **options):
        store = stores(family)
        machine = Machine(int(slots * budget(store, 1)))
        monkeypatch.setattr(free_memory, "available_bytes", machine.available_bytes)
        model = flashmoe.load(store, memory=budget(store, 8), **({"policy": "lru"} | options))
        models.append(model)
        machine.engine = model.flashmoe
        machine.engine.reserve_bytes = budget(store, 1)
        machine.engine.beside_bytes = 0
        model.flashmoe.resize("auto")
        return model, machine

    yield get
    for model in models:
        model.flashmoe.close()


@pytest.mark.parametrize(
    ("family", "policy"), [("olmoe", "learned"), ("gpt_oss", "lru"), ("deepseek_v2", "lru")]
)
def test_a_budget_follows_while_tokens_are_computed(followed, stores, family, policy):
    model, machine = followed(family=family, policy=policy)
    engine, one = model.flashmoe, budget(stores(family), 1)
    expected = [generate(model, prompt(n), 12) for n in (5, 60)]
    wrong, ended = [], threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            if [generate(model, prompt(n), 12) for n in (5, 60)] != expected:
                wrong.append(engine.memory_bytes)

    generating = threading.Thread(target=go_on)
    generating.start()
    try:
        for others, most, least in ((4, 5, 3), (7, 2, 1), (0, 9, 7), (6, 3, 1)):
            machine.others = int(others * one)
            assert wait_until(lambda: least * one <= engine.memory_bytes <= most * one), others  # noqa: B023
            assert wait_until(lambda: engine.present_bytes <= engine.memory_bytes)
    finally:
        ended.set()
        generating.join()
    assert not wrong
    stats = engine.stats()
    assert stats["shrank"] >= 2
    assert stats["grew"] >= 2
    assert stats["memory_bytes"] == engine.memory_bytes
    engine.reset_counts()
    assert engine.stats()["shrank"] == 0


def test_what_a_policy_would_keep_stays_and_nothing_is_read_again(followed, stores):
    model, machine = followed()
    engine = model.flashmoe
    generate(model, prompt(60), 20)
    before = [cache.resident for cache in engine.residency.pools.caches]
    machine.others = 5 * budget(stores(), 1)
    assert wait_until(lambda: engine.stats()["shrank"])
    engine.follower.stop()
    after = [cache.resident for cache in engine.residency.pools.caches]
    assert all(set(few) < set(many) for few, many in zip(after, before, strict=True))
    bytes_read = engine.stats()["bytes_read"]
    machine.others = 0
    engine.follow()
    assert wait_until(lambda: engine.stats()["grew"] > 2)
    engine.follower.stop()
    grown = [cache.resident for cache in engine.residency.pools.caches]
    assert [set(keys) for keys in grown] == [set(keys) for keys in after]
    assert engine.stats()["bytes_read"] == bytes_read


def test_a_size_ends_following_and_auto_begins_it_again(followed, stores):
    model, machine = followed()
    engine, one = model.flashmoe, budget(stores(), 1)
    engine.resize(6 * one)
    assert wait_until(lambda: not threads())
    machine.others = 9 * one
    assert engine.memory_bytes == 6 * one
    engine.adjust(2 * one)  # that was decided before
    assert engine.memory_bytes == 6 * one
    machine.others = 0
    engine.resize("auto")
    machine.others = 6 * one
    assert wait_until(lambda: engine.memory_bytes <= 3 * one)
    engine.close()
    assert wait_until(lambda: not threads())


def test_a_size_is_not_followed(loaded):
    model = loaded(slots=4)
    assert not model.flashmoe.follower.follows
    assert not threads()


def test_load_with_auto_follows(stores):
    model = flashmoe.load(stores(), memory="auto", policy="lru")
    assert model.flashmoe.follower.follows
    assert len(threads()) == 1
    model.flashmoe.close()
    assert wait_until(lambda: not threads())


def test_a_model_that_is_dropped_is_followed_no_more(stores):
    model = flashmoe.load(stores(), memory="auto", policy="lru")
    assert threads()
    del model
    gc.collect()
    assert wait_until(lambda: not threads())


def test_a_forked_child_follows_too(followed, stores):
    model, machine = followed()
    expected = generate(model, prompt(9), 6)
    one = budget(stores(), 1)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            machine.others = 7 * one
            right = wait_until(lambda: model.flashmoe.memory_bytes <= 2 * one)
            right &= generate(model, prompt(9), 6) == expected
            os.write(write, b"1" if right else b"0")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.waitpid(child, 0)
    os.close(read)
    assert model.flashmoe.memory_bytes > 7 * one
    assert generate(model, prompt(9), 6) == expected


def test_memory_that_cannot_be_had_or_told_leaves_the_budget(followed, stores, monkeypatch):
    model, machine = followed()
    engine, one = model.flashmoe, budget(stores(), 1)
    machine.others = 7 * one
    assert wait_until(lambda: engine.memory_bytes <= 2 * one)
    asked = []

    def untold() -> int:
        asked.append(1)
        raise FlashMoEError("not told")

    monkeypatch.setattr(free_memory, "available_bytes", untold)
    assert wait_until(lambda: len(asked) > 3)
    assert engine.memory_bytes <= 2 * one
    machine.others = 0
    monkeypatch.setattr(free_memory, "available_bytes", machine.available_bytes)
    assert wait_until(lambda: engine.memory_bytes >= 7 * one)


@torch.inference_mode()
def test_a_prompts_layer_gives_back_before_it_ends(loaded, stores, monkeypatch):
    """Other layers' slots, in the midst of a layer; its own when it has ended."""
    model = loaded(slots=8)
    engine, one = model.flashmoe, budget(stores(), 1)
    expected = generate(model, prompt(60), 6)
    engine.follower.start = lambda: None
    engine.follower._ended.clear()
    seen, given = [], Residency._give_back

    def give_back(residency, but):
        if residency.asked_bytes is None and not seen:
            residency.asked_bytes = 3 * one
            given(residency, but)
            seen.extend(pool.cache.n_slots for pool in residency.pools.all)
        else:
            given(residency, but)

    monkeypatch.setattr(Residency, "_give_back", give_back)
    assert generate(model, prompt(60), 6) == expected
    assert sorted(seen) == [3, 3, 8]
    engine.adjust(3 * one)
    assert [cache.n_slots for cache in engine.residency.pools.caches] == [3, 3, 3]
    assert engine.stats()["peak_resident_bytes"] == 8 * one
    assert generate(model, prompt(60), 6) == expected


def test_llama_cpps_server_follows_too(gguf_files):
    model: Path = gguf_files()
    result = llama_process.run("llama_following.py", model=str(model))
    assert result["followed"]
    assert result["wrong"] == []
    assert result["rounds"] > 3
    stats = result["stats"]
    assert stats["shrank"] >= 2
    assert stats["grew"] >= 2
    assert result["rss_bytes"] <= result["beside_bytes"] + stats["memory_bytes"]
