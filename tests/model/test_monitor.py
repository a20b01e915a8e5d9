"""The live page's figures and `/metrics`: what the engine counted, and what `simulate` replays."""

from __future__ import annotations

import base64
import json
import threading
import urllib.error
import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tiny import budget, prompt

import flashmoe
from flashmoe.cache import simulate
from flashmoe.engines.transformers.recorder import Recorder
from flashmoe.errors import FlashMoEError
from flashmoe.monitor import Monitor, shadows
from flashmoe.monitor.passes import Passes
from flashmoe.monitor.sampler import ARRIVED, LEFT, RESIDENT, USES, Sampler
from flashmoe.residency import choice_log

POLICIES = ["lru", "learned"]


@pytest.fixture
def monitor():
    with Monitor("127.0.0.1", 0, None) as running:
        yield running


@pytest.fixture
def sampler(loaded, monkeypatch):
    """Of a model that was looked at once."""
    monkeypatch.setattr("flashmoe.monitor.sampler.INTERVAL_SECONDS", 0.0)
    made = Sampler(loaded(slots=3).flashmoe, "tiny")
    made.join()
    made.frame()
    yield made
    made.leave()


def generate(model, tokens: int = 5, length: int = 9) -> None:
    model.generate(prompt(length), max_new_tokens=tokens, do_sample=False, eos_token_id=None)


def fetch(url: str, **headers: str):
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)


def events(answer):
    """Each server-sent event's name and data."""
    name = ""
    for line in answer:
        kind, _, value = line.decode().strip().partition(": ")
        if kind == "event":
            name = value
        elif kind == "data":
            yield name, json.loads(value)


def samples(body: str) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 3])  # of the first, all layers share one cache
def test_shadow_caches_hit_as_simulate_and_as_the_engine_do(stores, policy, slots):
    memory = budget(stores(), slots) if slots > 1 else budget(stores(), 3) // 2
    model = flashmoe.load(stores(), memory=memory, policy=policy)
    engine = model.flashmoe
    assert engine.residency.pools.slots.shared == (slots == 1)
    engine.watch_choices(True)
    replayed, recorder = shadows.Shadows(engine), Recorder(model)
    recorder.next_sequence()
    with recorder.recording():
        for length in (9, 2, 5):
            generate(model, 20, length)
    passes, counted = Passes(engine.manifest.top_k), engine.snapshot()
    replayed.add(passes.add(engine.take_choices()))
    model(prompt(1))  # a pass has ended where another begins
    replayed.add(passes.add(engine.take_choices()))
    replayed.replay()
    layers = len(engine.manifest.layers)
    for shadow in replayed.all:
        at = sum(cache.n_slots for cache in shadow.caches) / layers
        bypass = any(cache.policy.bypass_slots for cache in shadow.caches)
        how = dict(shared=slots == 1, as_recorded=True, bypass=bypass)
        conditions = simulate.Conditions(warm=True, **how)
        told = simulate.replay(recorder.trace({}), policy, 0.5, conditions, slots=at)
        assert shadow.count() == (told.requests, told.hits)
    own = next(one for one in replayed.all if one.memory_bytes == counted.memory_bytes)
    assert own.count() == (counted.requests, counted.hits)
    engine.close()


def test_larger_shadow_caches_hit_more_and_begin_with_what_is_resident(loaded):
    model = loaded(slots=3)
    generate(model, 30)
    replayed = shadows.Shadows(model.flashmoe)
    residents = [set(pool.cache.resident) for pool in model.flashmoe.residency.pools.all]
    for shadow in replayed.all:
        for cache, resident in zip(shadow.caches, residents, strict=True):
            assert set(cache.resident) <= resident
            assert len(cache.resident) == min(cache.n_slots, len(resident))
    model.flashmoe.watch_choices(True)
    generate(model, 60)
    replayed.add(Passes(model.flashmoe.manifest.top_k).add(model.flashmoe.take_choices()))
    replayed.replay()
    rates = [one["hit_rate"] for one in replayed.as_dict()["budgets"]]
    assert len(rates) > 2
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_a_turn_that_has_no_time_leaves_out_what_waits(loaded):
    model = loaded(slots=3)
    replayed = shadows.Shadows(model.flashmoe)
    model.flashmoe.watch_choices(True)
    generate(model, 20)
    replayed.add(Passes(model.flashmoe.manifest.top_k).add(model.flashmoe.take_choices()))
    replayed.replay(lambda: False)
    assert replayed.as_dict()["share"] == 0
    assert all(one["hit_rate"] is None for one in replayed.as_dict()["budgets"])


def test_the_map_shows_what_was_used_and_came_and_went(sampler, loaded):
    engine = sampler.engine
    first, module = engine.manifest.layers[0], next(iter(engine.modules.values()))
    slot_of = engine.residency.pools.of(0).slot_of(0)
    frames = []
    for seed in range(4):
        torch.manual_seed(seed)
        before = slot_of >= 0
        index = torch.randperm(first.n_experts)[None, : engine.manifest.top_k]
        module(torch.randn(1, 32), index, torch.full(index.shape, 0.5))
        frames.append(base64.b64decode(sampler.frame()["map"]))
        for expert, cell in enumerate(frames[-1][: first.n_experts]):
            now = bool(slot_of[expert] >= 0)
            assert bool(cell & RESIDENT) == now
            assert bool(cell & ARRIVED) == (now and not before[expert])
            assert bool(cell & LEFT) == (before[expert] and not now)
            assert cell >> USES == (expert in index[0].tolist())
    assert any(cell & LEFT for cells in frames for cell in cells)


def test_nothing_is_kept_while_nobody_looks(loaded):
    model = loaded(slots=3)
    made = Sampler(model.flashmoe, "tiny")
    log = model.flashmoe.residency.routing.log
    generate(model)
    assert not log.wanted
    assert model.flashmoe.take_choices() == []
    made.join()
    made.join()
    made.leave()
    generate(model)
    assert log.wanted
    assert model.flashmoe.take_choices()
    made.leave()
    generate(model)
    assert model.flashmoe.take_choices() == []


def test_what_is_kept_is_bounded(loaded, monkeypatch):
    monkeypatch.setattr(choice_log, "_MOST_ROWS", 40)
    engine = (model := loaded(slots=3)).flashmoe
    engine.watch_choices(True)
    generate(model, 40)
    assert sum(len(choice.rows) for choice in engine.take_choices()) <= 40
    assert engine.residency.routing.log.lost


def test_metrics_are_the_engines_counts(monitor, loaded):
    assert samples(fetch(monitor.url + "metrics").read().decode()) == {"flashmoe_model_loaded": 0}
    model = loaded(slots=3)
    monitor.watch(model.flashmoe)
    model.flashmoe.waiting_requests = lambda: 7
    generate(model, tokens=5, length=9)
    told, stats = samples(fetch(monitor.url + "metrics").read().decode()), model.flashmoe.snapshot()
    assert told["flashmoe_tokens_total"] == 9 + 4
    assert told["flashmoe_expert_hits_total"] == stats.hits > 0
    assert told["flashmoe_expert_misses_total"] == stats.misses > 0
    assert told["flashmoe_read_bytes_total"] == stats.bytes_read > 0
    assert told["flashmoe_wait_seconds_total"] == stats.wait_seconds > 0
    assert told["flashmoe_resident_bytes"] == stats.resident_bytes > 0
    assert told["flashmoe_budget_bytes"] == stats.memory_bytes
    assert told["flashmoe_waiting_requests"] == 7
    model.flashmoe.close()
    assert samples(fetch(monitor.url + "metrics").read().decode())["flashmoe_model_loaded"] == 0


def test_tokens_are_counted_once_where_layers_share_a_cache(monitor, stores):
    model = flashmoe.load(stores(), memory=budget(stores(), 3) // 2, policy="lru")
    monitor.watch(model.flashmoe)
    generate(model, tokens=5, length=9)
    assert model.flashmoe.snapshot().shared
    told = samples(fetch(monitor.url + "metrics").read().decode())
    assert told["flashmoe_tokens_total"] == 9 + 4
    model.flashmoe.close()


def test_the_stream_waits_for_a_model_then_follows_it(monitor, loaded):
    model = loaded(slots=3)
    with fetch(monitor.url + "events") as answer:
        told = events(answer)
        assert next(told) == ("waiting", {})
        monitor.watch(model.flashmoe, "a name")
        name, about = next(one for one in told if one[0] != "waiting")
        assert (name, about["model"]) == ("model", "a name")
        assert about["layers"] == [layer.n_experts for layer in model.flashmoe.manifest.layers]
        assert next(told)[1]["figures"]["total_hit_rate"] is None
        generate(model, tokens=20, length=40)
        seen = []
        for _, data in told:
            seen.append(data["figures"])
            if seen[-1]["total_hit_rate"] == model.flashmoe.snapshot().hit_rate:
                break
        assert max(figures["tokens_per_second"] or 0 for figures in seen) > 0
        assert max(figures["prompt_tokens_per_second"] or 0 for figures in seen) > 0
        model.flashmoe.close()
        assert any(data.get("closed") for _, data in told)


def test_a_viewer_that_goes_away_is_not_waited_for(monitor, loaded):
    engine = loaded(slots=3).flashmoe
    monitor.watch(engine)
    answers = [fetch(monitor.url + "events") for _ in range(3)]
    for answer in answers:
        assert next(events(answer))[0] == "model"
    assert engine.residency.routing.log.wanted
    for answer in answers:
        answer.close()
    gone = threading.Event()
    for _ in range(200):
        if not engine.residency.routing.log.wanted:
            break
        gone.wait(0.05)
    assert not engine.residency.routing.log.wanted


@pytest.mark.parametrize("path", ["metrics", "events"])
def test_with_a_key_counts_are_shown_to_those_who_have_it(path):
    with Monitor("127.0.0.1", 0, "secret ü") as monitor:
        assert fetch(monitor.url).status == 200  # the page itself holds nothing
        assert fetch(monitor.url + path + "?key=secret%20%C3%BC").status == 200
        for wrong in (path, f"{path}?key=secret", f"{path}?key="):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                fetch(monitor.url + wrong)
    with Monitor("127.0.0.1", 0, "secret") as monitor:
        assert fetch(monitor.url + path, Authorization="Bearer secret").status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(monitor.url + path + "?key=secret", Authorization="Bearer no")


def test_a_port_that_is_taken_is_said(monitor):
    port = int(monitor.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(FlashMoEError, match=f"cannot have 127.0.0.1:{port}"):
        Monitor("127.0.0.1", port, None).__enter__()


def test_it_ends_while_somebody_looks(loaded):
    threads = set(threading.enumerate())
    with Monitor("127.0.0.1", 0, None) as monitor:
        monitor.watch(loaded(slots=3).flashmoe)
        answer = fetch(monitor.url + "events")
        next(events(answer))
    left = [one.name for one in set(threading.enumerate()) - threads if "monitor" in one.name]
    assert left == []
    answer.close()
