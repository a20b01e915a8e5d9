"""The streamed model against transformers' own: same tokens, same logits, whatever the budget."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
import transformers
from tiny import FAMILIES, budget, eager, prompt, run

import flashmoe
from flashmoe import policies
from flashmoe.cache import simulate
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest

ONLINE = [name for name, policy in policies.available().items() if not policy.offline]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_transformers_own_at_every_budget(checkpoints, stores, loaded, family, batch):
    contents = manifest.load(stores(family))
    ids = prompt(17, batch)
    tokens, logits = run(eager(checkpoints(family)), ids)
    for slots in range(contents.top_k, contents.layers[0].n_experts + 1):
        model = loaded(family, slots)
        assert model.flashmoe.residency.pools.slots_per_layer == slots
        own_tokens, own_logits = run(model, ids)
        assert torch.equal(own_tokens, tokens)
        assert torch.equal(own_logits, logits)  # the same kernels ran: bit for bit


@pytest.mark.parametrize("policy", ONLINE)
def test_output_does_not_depend_on_the_policy(checkpoints, loaded, policy):
    ids = prompt(9)
    tokens, logits = run(eager(checkpoints()), ids, 40)
    own_tokens, own_logits = run(loaded(slots=3, policy=policy), ids, 40)
    assert torch.equal(own_tokens, tokens)
    assert torch.equal(own_logits, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_output_is_transformers_own_in_half_precision(checkpoints, loaded, dtype, batch):
    ids = prompt(11, batch)
    tokens, logits = run(eager(checkpoints("olmoe", dtype)), ids)
    own_tokens, own_logits = run(loaded(slots=3, dtype=dtype), ids)
    assert own_logits.dtype == logits.dtype
    assert torch.equal(own_tokens, tokens)
    assert torch.equal(own_logits, logits)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 333, 1000])
def test_prompts_longer_than_the_cache_run_in_waves(checkpoints, loaded, length, reading):
    ids = prompt(length)
    tokens, logits = run(eager(checkpoints()), ids, 3)
    model = loaded(slots=2)
    own_tokens, own_logits = run(model, ids, 3)
    assert torch.equal(own_tokens, tokens)
    torch.testing.assert_close(own_logits, logits, rtol=0, atol=1e-5)


def test_a_prefill_reads_each_expert_once(loaded):
    model = loaded(slots=2)
    with torch.inference_mode():
        model(prompt(300))
    stats, contents = model.flashmoe.stats(), model.flashmoe.manifest
    assert stats["misses"] == stats["requests"] <= sum(x.n_experts for x in contents.layers)
    assert stats["bytes_read"] == stats["misses"] * contents.layers[0].extent_bytes


def test_the_shipped_demo_streams_what_plain_transformers_gives():
    path = flashmoe.demo_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer("def main(argv=None):\n", return_tensors="pt")["input_ids"]
    tokens, logits = run(eager(path), ids, 24)
    model = flashmoe.load(path, memory="6MiB", policy="lru")
    try:
        own_tokens, own_logits = run(model, ids, 24)
    finally:
        model.flashmoe.close()
    assert torch.equal(own_tokens, tokens)
    assert torch.equal(own_logits, logits)


@pytest.mark.parametrize("policy", ONLINE)
@pytest.mark.parametrize("slots", [1, 3, 5, 8])  # 1: less than top_k, so all layers share them
def test_a_recorded_run_replayed_gives_the_engines_hits(loaded, policy, slots):
    """Prefill (waves included) and decode of three sequences, warm from one to the next."""
    model = loaded(slots=slots, policy=policy)
    trace = record(model, [prompt(n)[0] for n in (40, 1, 7)], max_new_tokens=30)
    stats = model.flashmoe.stats()
    shared = model.flashmoe.residency.pools.slots.shared
    assert shared == (slots == 1)
    bypass, slots = stats["bypass_slots"] > 0, stats["slots_per_layer"]
    how = dict(as_recorded=True, shared=shared, bypass=bypass)
    outcome = simulate.replay(trace, policy, 1.0, simulate.Conditions(True, **how), slots=slots)
    assert (outcome.requests, outcome.hits) == (stats["requests"], stats["hits"])
    assert stats["hits"] < stats["requests"]
    assert shared or stats["hits"]  # in 3 slots for three layers some policies never hit
    # and one sequence at a time, from cold
    for number, (_, tokens) in enumerate(trace.sequences()):
        model.flashmoe.reset()
        run(model, prompt((40, 1, 7)[number]), 30)
        cold = simulate.replay(trace, policy, 1.0, simulate.Conditions(**how), slots=slots)
        assert cold.per_stream[number].tolist() == [
            model.flashmoe.stats()["requests"],
            model.flashmoe.stats()["hits"],
        ]
        assert tokens.stop - tokens.start == (40, 1, 7)[number] + 29


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(
    ("policy", "slots", "shared"),
    [("whim", 2, True), ("whim", 3, False), ("learned", 2, True), ("learned", 4, False)],
)
def test_an_expert_that_is_not_kept_is_computed_all_the_same(
    checkpoints, stores, many_guesses, reading, whim, policy, slots, shared, prefetch
):
    """Read beside the slots, or moved out of its own; guessed or not; a cache a layer or one."""
    store = stores()
    model = flashmoe.load(store, memory=budget(store, slots), policy=policy, prefetch=prefetch)
    engine = model.flashmoe
    pools, extent_bytes = engine.residency.pools, engine.manifest.layers[0].extent_bytes
    prompts = [prompt(n)[0] for n in (12, 1, 3)]
    trace = record(model, prompts, max_new_tokens=40)
    engine.residency.prefetcher.clear()
    stats = engine.stats()
    assert (stats["shared"], stats["bypass_slots"]) == (shared, 2)
    assert shared or prefetch or pools.slots.n_slots == ((3, 2, 2) if slots == 3 else (4, 3, 3))
    how = dict(as_recorded=True, shared=shared)
    hits, hits_without = (
        simulate.replay(
            trace, policy, 1.0, simulate.Conditions(True, **how, bypass=bypass),
            slots=stats["slots_per_layer"],
        ).hits
        for bypass in (True, False)
    )  # fmt: skip
    assert stats["hits"] == hits != hits_without
    assert stats["bytes_read"] == stats["misses"] * extent_bytes + stats["prefetch_wasted_bytes"]
    assert not prefetch or stats["prefetch_used"] > 0
    arenas = [pool.arena for pool in pools.all] + [pools.bypass, engine.residency.prefetcher.spares]
    assert sum(a.n_slots * a.extent_bytes for a in arenas if a) <= pools.memory_bytes
    assert stats["resident_bytes"] <= stats["peak_resident_bytes"] <= stats["memory_bytes"]
    engine.reset()
    tokens, logits = run(eager(checkpoints()), prompts[0][None], 60)
    own_tokens, own_logits = run(model, prompts[0][None], 60)
    assert torch.equal(own_tokens, tokens)
    assert torch.equal(own_logits, logits)
    engine.close()


@pytest.mark.parametrize("prefetch", [False, True])
def test_reads_that_fail_leave_nothing_half_read_in_a_slot(
    stores, many_guesses, whim, monkeypatch, prefetch
):
    store = stores()
    model = flashmoe.load(store, memory=budget(store, 3), policy=whim, prefetch=prefetch)
    expected = run(model, prompt(1), 30)[0]
    contents = manifest.load(store)
    experts = (store / contents.experts_file).read_bytes()
    preadv, reads, failures = os.preadv, iter(range(10**9)), 0

    def broken(*arguments):
        if next(reads) % 9 == 8:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        for _ in range(25):
            try:
                run(model, prompt(1), 30)
            except FlashMoEError:
                failures += 1
            for pool in model.flashmoe.residency.pools.all:
                layer = contents.layers[pool.first_layer]
                for key in pool.cache.resident:
                    slot = pool.arena.slots[pool.cache.residency.slot_of[key]]
                    start = layer.extent_offset(key)
                    assert slot == experts[start : start + layer.extent_bytes]
    assert failures > 10
    assert torch.equal(run(model, prompt(1), 30)[0], expected)
    model.flashmoe.close()


def test_counts_add_up_and_the_budget_is_kept(loaded, stores, reading):
    model = loaded(slots=5)
    engine = model.flashmoe
    for length in (3, 50, 1):
        run(model, prompt(length), 10)
        stats = engine.stats()
        assert stats["hits"] + stats["misses"] == stats["requests"]
        assert stats["bytes_read"] == stats["misses"] * engine.manifest.layers[0].extent_bytes
        assert stats["resident_bytes"] <= stats["peak_resident_bytes"] <= stats["memory_bytes"]
        parts = stats["wait_seconds"] + stats["compute_seconds"] + stats["policy_seconds"]
        assert 0 < parts <= stats["experts_seconds"]
        assert stats["read_seconds"] > 0
    engine.reset_counts()
    assert engine.stats()["requests"] == engine.stats()["bytes_read"] == 0
    pools = engine.residency.pools
    arenas = [pool.arena for pool in pools.all]
    assert sum(a.n_slots * a.extent_bytes for a in arenas) <= pools.memory_bytes


def test_with_everything_resident_the_second_run_reads_nothing(loaded):
    model = loaded(slots=8)
    run(model, prompt(200), 20)
    model.flashmoe.reset_counts()
    run(model, prompt(200), 20)
    assert model.flashmoe.stats()["bytes_read"] == 0


def test_a_failed_read_names_the_expert_and_loses_nothing(checkpoints, own_store, reading):
    """A byte goes wrong on the drive, the run stops, the byte comes right, the run goes on."""
    contents = manifest.load(own_store)
    path, layer = own_store / contents.experts_file, contents.layers[1]
    ids = prompt(60)  # touches every expert
    tokens, logits = run(eager(checkpoints()), ids)
    model = flashmoe.load(own_store, memory=budget(own_store, 3), policy="lru")

    def flip() -> None:
        with open(path, "r+b") as file:
            file.seek(layer.extent_offset(2) + 5)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 64]))
            file.flush()
            os.fsync(file.fileno())

    try:
        flip()
        with pytest.raises(FlashMoEError, match=rf"expert 2 of {layer.module} \(MoE layer 1\)"):
            run(model, ids)
        flip()
        own_tokens, own_logits = run(model, ids)
        assert torch.equal(own_tokens, tokens)
        torch.testing.assert_close(own_logits, logits, rtol=0, atol=1e-5)
        os.truncate(path, layer.extent_offset(1))
        with pytest.raises(FlashMoEError, match="ends before it"):
            run(model, ids)
    finally:
        model.flashmoe.close()


def test_closing_frees_descriptors_and_threads(stores):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = (descriptors(), threading.active_count())
    model = flashmoe.load(stores(), memory=budget(stores(), 2), policy="lru")
    run(model, prompt(5))
    assert threading.active_count() > before[1]
    model.flashmoe.close()
    model.flashmoe.close()  # twice does no harm
    assert (descriptors(), threading.active_count()) == before
    with pytest.raises(FlashMoEError, match="was closed"):
        run(model, prompt(5))


def test_two_models_have_budgets_of_their_own(loaded):
    small, large = loaded(slots=2), loaded(slots=8)
    ids = prompt(30)
    assert torch.equal(run(small, ids)[0], run(large, ids)[0])
    for model, slots in ((small, 2), (large, 8)):
        engine = model.flashmoe
        assert engine.stats()["resident_bytes"] <= budget(engine.path, slots)
    stats = [model.flashmoe.stats() for model in (small, large)]
    assert stats[1]["resident_bytes"] > stats[0]["resident_bytes"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"memory": 1000}, "too small: a token uses 2 experts"),
        ({"memory": "lots"}, "is not a size"),
        ({"memory": 0}, "more than zero"),
        ({"memory": "1GiB", "policy": "belady"}, "needs the future"),
        ({"memory": "1GiB", "policy": "mru"}, "no policy is called"),
        ({"memory": "1GiB", "device": "abacus"}, "sees no such device"),
    ],
)
def test_arguments_that_cannot_work_are_refused_in_a_sentence(stores, arguments, complaint):
    with pytest.raises(FlashMoEError, match=complaint):
        flashmoe.load(stores(), **{"policy": "lru"} | arguments)


def test_a_store_of_another_model_is_refused(stores, own_store):
    """The config says another geometry than the extents have."""
    theirs = (stores("qwen3_moe") / "config.json").read_bytes()
    (own_store / "config.json").write_bytes(theirs)
    with pytest.raises(FlashMoEError, match="another model"):
        flashmoe.load(own_store, memory="1GiB", policy="lru")
    path = own_store / manifest.FILE_NAME  # even if somebody mends the digest
    digest = manifest.load(stores("qwen3_moe")).config_sha256
    path.write_text(path.read_text().replace(manifest.load(own_store).config_sha256, digest))
    with pytest.raises(FlashMoEError, match="another model"):
        flashmoe.load(own_store, memory="1GiB", policy="lru")


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(FlashMoEError, match="no such directory"):
        flashmoe.load(tmp_path / "nowhere", memory="1GiB", policy="lru")
    with pytest.raises(FlashMoEError, match=r"no config\.json"):
        flashmoe.load(tmp_path, memory="1GiB", policy="lru")
