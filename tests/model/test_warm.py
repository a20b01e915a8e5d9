"""Budgets that change while a model is loaded, and caches that begin where another ended."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import budget, generate, prompt

import flashmoe
from flashmoe import policies
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.residency import warm_start

ONLINE = [name for name, policy in policies.available().items() if not policy.offline]


@pytest.mark.parametrize("policy", ONLINE)
def test_output_does_not_change_when_the_budget_does(loaded, stores, policy):
    expected = generate(loaded(slots=8), prompt(9), 12)
    model = loaded(slots=6, policy=policy)
    for slots in (6, 2, 8, 3, 5):
        size = budget(stores(), slots)
        model.flashmoe.resize(size)
        assert model.flashmoe.residency.pools.resident_bytes <= size
        assert generate(model, prompt(9), 12) == expected
        assert model.flashmoe.residency.pools.resident_bytes <= size


def test_what_fits_stays_resident(loaded, stores):
    model = loaded(slots=8)
    generate(model, prompt(40), 4)
    before = [set(cache.resident) for cache in model.flashmoe.residency.pools.caches]
    model.flashmoe.resize(budget(stores(), 4))
    after = [set(cache.resident) for cache in model.flashmoe.residency.pools.caches]
    assert all(len(kept) == 4 and kept < whole for kept, whole in zip(after, before, strict=True))
    model.flashmoe.reset_counts()
    model.flashmoe.resize(budget(stores(), 8))
    assert [set(cache.resident) for cache in model.flashmoe.residency.pools.caches] == after
    generate(model, prompt(40), 1)
    assert model.flashmoe.stats()["hits"] == sum(map(len, after))


def test_from_caches_of_layers_to_one_for_all_and_back(loaded, stores):
    expected = generate(loaded(slots=8), prompt(9), 12)
    model = loaded(slots=4, policy="learned")
    assert not model.flashmoe.residency.pools.slots.shared
    for slots, shared in ((2, True), (6, False)):
        model.flashmoe.resize(budget(stores(), slots))
        assert model.flashmoe.residency.pools.slots.shared == shared
        assert generate(model, prompt(9), 12) == expected


def test_a_budget_too_small_leaves_all_as_it_was(loaded):
    model = loaded(slots=4)
    expected = generate(model, prompt(9), 6)
    with pytest.raises(FlashMoEError, match="too small"):
        model.flashmoe.resize(1000)
    assert model.flashmoe.residency.pools.slots_per_layer == 4
    assert generate(model, prompt(9), 6) == expected


def test_memory_is_given_back_and_taken_again(large_store):
    model = flashmoe.load(large_store, memory="190MiB", policy="lru")
    held = lambda: psutil.Process().memory_info().rss >> 20  # noqa: E731
    for _ in range(2):
        generate(model, prompt(120), 2)
        full = held()
        model.flashmoe.resize("30MiB")
        assert full - held() > 120
        generate(model, prompt(120), 2)
        assert full - held() > 100
        model.flashmoe.resize("190MiB")
    model.flashmoe.close()


@pytest.mark.parametrize("policy", ONLINE)
def test_a_restored_cache_goes_on_as_if_it_had_never_stopped(loaded, tmp_path, policy):
    file = tmp_path / "kept.npz"
    one, other = loaded(slots=3, policy=policy), loaded(slots=3, policy=policy)
    generate(one, prompt(9), 12)
    warm_start.save(one.flashmoe.residency, file)
    restored = warm_start.restore(other.flashmoe.residency, file)
    assert restored == sum(len(cache.resident) for cache in one.flashmoe.residency.pools.caches)
    one.flashmoe.reset_counts()
    texts = [generate(model, prompt(11), 12) for model in (one, other)]
    assert texts[0] == texts[1]
    stats = [model.flashmoe.stats() for model in (one, other)]
    assert stats[0]["hits"] == stats[1]["hits"] > 0
    assert stats[0]["bytes_read"] == stats[1]["bytes_read"]


@pytest.mark.parametrize("slots", [2, 5, 8])
def test_a_warm_start_into_another_budget(loaded, tmp_path, slots):
    file = tmp_path / "kept.npz"
    one, other = loaded(slots=4), loaded(slots=slots)
    expected = generate(one, prompt(9), 12)
    warm_start.save(one.flashmoe.residency, file)
    warm_start.restore(other.flashmoe.residency, file)
    first = other.flashmoe.stats()
    assert first["requests"] == 0
    assert generate(other, prompt(9), 12) == expected
    assert other.flashmoe.stats()["hits"] > 0


def test_what_was_kept_of_another_policy_is_refused(loaded, tmp_path):
    file = tmp_path / "kept.npz"
    warm_start.save(loaded(slots=4, policy="lfu").flashmoe.residency, file)
    with pytest.raises(FlashMoEError, match="another model, policy"):
        warm_start.restore(loaded(slots=4, policy="lru").flashmoe.residency, file)
    with pytest.raises(FlashMoEError, match="keeps a cache warm"):
        warm_start.restore(loaded(slots=4, policy="lru").flashmoe.residency, tmp_path / "none.npz")


@pytest.fixture
def kept(loaded, tmp_path):
    model = loaded(slots=3, policy="arc")
    generate(model, prompt(9), 3)
    warm_start.save(model.flashmoe.residency, tmp_path / "kept.npz")
    return model, tmp_path / "kept.npz"


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_is_refused_in_a_sentence_or_harmless(kept, data):
    model, file = kept
    content = bytearray(file.read_bytes())
    damaged = file.with_name("damaged.npz")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged.write_bytes(content)
    try:
        warm_start.restore(model.flashmoe.residency, damaged)
    except FlashMoEError as error:
        assert str(damaged) in str(error)
    held = [cache.resident for cache in model.flashmoe.residency.pools.caches]
    assert all(len(set(keys)) == len(keys) <= 3 for keys in held)


def test_auto_is_what_is_free_less_a_reserve(stores, tmp_path):
    assert 0 < free_memory.available_bytes() <= psutil.virtual_memory().total
    dense = 1 << 20
    room = free_memory.available_bytes() - free_memory.budget_bytes(dense, "cpu")
    assert room >= free_memory.RESERVE_BYTES + dense - (64 << 20)  # others allocate meanwhile
    model = flashmoe.load(stores(), memory="auto", policy="lru")
    assert model.flashmoe.residency.pools.slots_per_layer == 8
    model.flashmoe.close()


@pytest.mark.parametrize("version", [1, 2])
def test_auto_sees_the_limits_of_cgroups_above(tmp_path, version):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    base = root if version == 2 else root / "memory"
    limit, usage, reclaimable = free_memory._FILES[version]
    for folder, size in ((base / "a" / "b", "max"), (base / "a", str(500 << 20))):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(size)
        (folder / usage).write_text(str(300 << 20))
        (folder / "memory.stat").write_text(f"anon 7\n{reclaimable} {100 << 20}\n")
    own.write_text("0::/a/b\n" if version == 2 else "9:cpu,memory:/a/b\n3:pids:/x\n")
    assert list(free_memory._cgroups(root, own)) == [300 << 20]
    if version == 2:  # above it the kernel slows programs down
        (base / "a" / "memory.high").write_text(str(450 << 20))
        assert list(free_memory._cgroups(root, own)) == [250 << 20]
    (base / "a" / limit).write_text(str((1 << 63) - 4096))
    (base / "a" / "memory.high").write_text("max")
    assert list(free_memory._cgroups(root, own)) == []


@torch.inference_mode()
def test_threads_that_generate_at_once_are_served(loaded):
    model = loaded(slots=2)
    prompts = [prompt(n) for n in (5, 9, 13, 17)]
    expected = [generate(model, ids, 12) for ids in prompts]
    given: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        given[number] = generate(model, prompts[number], 12)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [given[number] for number in range(len(prompts))] == expected


def test_the_file_is_small_and_holds_no_pickle(kept):
    _, file = kept
    assert Path(file).stat().st_size < 100_000
    with np.load(file, allow_pickle=False) as content:
        assert "description" in content.files
