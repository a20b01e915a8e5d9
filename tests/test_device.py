"""Experts in an accelerator's memory: on a card where there is one, and the same code without.

What is not tested without a card is the order of its streams; the CPU has one only.
"""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe
from flashmoe.cache import simulate
from flashmoe.engines.transformers import engine, loading
from flashmoe.engines.transformers.checkpoints.backends.packed import PackedModel
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.memory.device_arena import DeviceArena
from flashmoe.reading.reader import ExtentReader
from flashmoe.reading.staging import STAGED_BYTES, Staging
from flashmoe.store import manifest

HAS_CARD = torch.cuda.is_available()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not HAS_CARD, reason="no CUDA device here"))])  # fmt: skip
def device(request, monkeypatch):
    """A device whose slots are tensors that are filled by way of staging buffers."""
    if request.param == "cpu":
        monkeypatch.setattr(
            engine, "arena_on", lambda device, layer, n_slots: DeviceArena(layer, n_slots, device)
        )
    return request.param


@pytest.fixture
def load(stores, device):
    models = []

    def get(family="olmoe", slots=None, dtype=torch.float32, extra=0, policy="lru", **options):
        store = stores(family, dtype)
        memory = tiny.budget(store, slots or manifest.load(store).top_k, extra)
        model = flashmoe.load(store, memory=memory, policy=policy, device=device, **options)
        pools = model.flashmoe.residency.pools.all
        assert all(isinstance(pool.arena, DeviceArena) for pool in pools)
        models.append(model)
        return model

    yield get
    for model in models:
        model.flashmoe.close()


def generate(model: transformers.PreTrainedModel, ids: torch.Tensor, new: int = 12) -> list:
    return tiny.generate(model, ids.to(model.device), new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_output_is_transformers_own(checkpoints, stores, load, device, family, batch, dtype):
    """With as many slots as a token needs, so that a prompt comes in waves, and with more."""
    ids = tiny.prompt(17, batch)
    resident = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoints(family, dtype), experts_implementation="eager"
    ).to(device)
    expected = generate(resident, ids)
    top_k = manifest.load(stores(family, dtype)).top_k
    for more in (0, 3):
        model = load(family, top_k + more, dtype)
        assert model.device.type == device
        assert generate(model, ids) == expected


def test_guesses_wait_on_the_device(load, many_guesses):
    ids = tiny.prompt(9)
    plain = generate(load(slots=4, prefetch=False), ids, 30)
    model = load(slots=4, extra=2)
    assert isinstance(model.flashmoe.residency.prefetcher.spares, DeviceArena)
    assert generate(model, ids, 30) == plain
    assert model.flashmoe.stats()["prefetch_used"] > 0


@pytest.mark.parametrize("prefetch", [False, True])
def test_what_is_not_kept_is_computed_on_the_device(load, many_guesses, whim, prefetch):
    ids = tiny.prompt(1)
    plain = generate(load(slots=4, prefetch=False), ids, 60)
    model = load(slots=4, policy=whim, prefetch=prefetch)
    assert isinstance(model.flashmoe.residency.pools.bypass, DeviceArena)
    assert generate(model, ids, 60) == plain


def test_the_simulator_serves_what_the_device_served(load):
    model = load(slots=4, prefetch=False)
    recorded = record(model, [tiny.prompt(9)[0]], max_new_tokens=20)
    stats = model.flashmoe.stats()
    conditions = simulate.Conditions(warm=True, as_recorded=True)
    outcome = simulate.replay(recorded, "lru", 1.0, conditions, slots=4)
    assert (outcome.requests, outcome.hits) == (stats["requests"], stats["hits"])


def test_another_budget_while_in_use(load):
    ids = tiny.prompt(9)
    model = load(slots=8)
    held = model.flashmoe.residency.pools.memory_bytes
    expected = generate(model, ids)
    for memory in (held // 2, held // 4, held):
        model.flashmoe.resize(memory)
        assert generate(model, ids) == expected
        assert model.flashmoe.stats()["resident_bytes"] <= memory


def test_a_damaged_expert_is_found_on_the_device(own_store, device):
    contents = manifest.load(own_store)
    with open(own_store / contents.experts_file, "r+b") as file:
        file.seek(contents.layers[1].extent_offset(2) + 77)
        file.write(b"damage")
    reader = ExtentReader(PackedModel(own_store))
    arena = DeviceArena(contents.layers[1], 2, torch.device(device))
    damaged = reader.submit(1, [(2, arena.slots[0])])[0]  # apart: a group shares one future
    sound = reader.submit(1, [(3, arena.slots[1])])[0]
    with pytest.raises(FlashMoEError, match=r"expert 2 of .*not those that were packed"):
        damaged.result(10)
    sound.result(10)
    reader.close()
    arena.close()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3 * STAGED_BYTES), st.integers(0, 5000))
def test_staging_carries_any_bytes_both_ways(size, start):
    whole = torch.arange(start + size, dtype=torch.int64).to(torch.uint8)

    class Whole:
        def read_copy(self, layer, expert, start, memory, copy) -> int:
            assert len(memory) <= STAGED_BYTES
            memory[:] = memoryview(whole.numpy())[start : start + len(memory)]
            return 0

    staging = Staging(Whole())  # type: ignore[arg-type]
    target = torch.zeros(size, dtype=torch.uint8, device="cuda" if HAS_CARD else "cpu")
    staging.read(0, 0, start, target)
    assert torch.equal(target.cpu(), whole[start:])
    assert staging.bytes_of(target) == whole[start:].numpy().data


def test_weights_without_a_kernel_there_are_refused(checkpoints, tmp_path):
    pack(checkpoints(), tmp_path / "store", quant="int8")
    backend = PackedModel(tmp_path / "store")
    with pytest.raises(FlashMoEError, match="int8 weights can be multiplied on cpu only"):
        loading._check_kernels(backend, torch.device("cuda"))
    backend.close()


@pytest.mark.skipif(HAS_CARD, reason="there is a card")
def test_a_card_that_is_not_there_is_missed_in_a_sentence(stores):
    with pytest.raises(FlashMoEError, match="sees no such device on this machine"):
        flashmoe.load(stores(), memory="1GiB", device="cuda")


@pytest.mark.skipif(not HAS_CARD, reason="no CUDA device here")
def test_the_cards_memory_is_given_back(load):
    model = load(slots=8)
    arenas, held = len(model.flashmoe.arenas), model.flashmoe.residency.pools.memory_bytes
    full = torch.cuda.memory_allocated()
    model.flashmoe.resize(held // 2)
    half = torch.cuda.memory_allocated()
    assert abs(full - half - held // 2) <= 512 * arenas  # what torch rounds to
    generate(model, tiny.prompt(9))
    model.flashmoe.close()
    assert torch.cuda.memory_allocated() <= half - held // 2 + 512 * arenas
