"""Replayed hit rates of pinned experts: both counts, beside what Fiddler itself counts."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import budget, generate, prompt

import baselines
from baselines.base import Setting
from baselines.pinning import room
from flashmoe.engines.transformers.recorder import record
from flashmoe.store import manifest
from flashmoe.trace import Trace
from harness.report import report
from harness.tables import tiers_table


def test_both_counts_of_a_sequence_written_by_hand():
    """Pinned, by the second sequence: expert 0 of the one layer."""
    first = [[0, 1], [0, 2], [0, 3], [2, 3]]  # a prompt of two, then two tokens
    second = [[0, 1], [0, 1], [0, 2], [0, 3]]
    experts = np.array([*first, *second], np.uint8)[:, None]
    routing = Trace(experts, np.repeat(np.arange(2, dtype=np.int32), 4), 4)
    rates = tiers_table.hit_rates(tiers_table.sequence_uses(routing, 2), 1, None)
    assert rates.per_token == pytest.approx((3 + 4) / (8 + 8))
    # prompts request 0, 1, 2 and 0, 1
    assert rates.per_event == pytest.approx((1 + 1 + 1 + 2) / (3 + 4 + 2 + 4))


@pytest.mark.parametrize("label", ["fiddler:0.5", "fiddler:0.5,random"])
def test_the_replay_of_a_run_counts_what_fiddler_counted(checkpoints, stores, label):
    """The runs' own routing is the profile; a token more is counted than came out."""
    store = stores()
    memory_bytes = budget(store, 4)
    ids = [prompt(12)[0], prompt(12).flip(1)[0]]
    plain = baselines.get("os-paging")()
    model = plain.load(Setting(checkpoints(), store, memory_bytes))
    traces = [record(model, [one], max_new_tokens=6) for one in ids]
    plain.close()
    whole = Trace(
        np.concatenate([trace.experts for trace in traces]),
        np.repeat(np.arange(2, dtype=np.int32), [len(trace.experts) for trace in traces]),
        traces[0].n_experts,
    )
    requests = hits = 0
    for own, other in ((0, 1), (1, 0)):
        system = baselines.get(label)()
        loaded = system.load(Setting(checkpoints(), store, memory_bytes, traces[other]))
        generate(loaded, ids[own][None], 6)
        requests, hits = requests + system.requests, hits + system.hits
        system.close()
    pinned = room(manifest.load(store), memory_bytes, 0.5)
    seed = 0 if "random" in label else None
    rates = tiers_table.hit_rates(tiers_table.sequence_uses(whole, 12), pinned, seed)
    assert 0 < rates.per_event < 1
    assert rates.per_event == pytest.approx(hits / requests)


def test_popularity_beats_chance_on_routing_that_varies_in_popularity():
    rng = np.random.default_rng(0)
    chances = np.arange(8, 0, -1) / np.arange(9).sum()
    rows = [rng.choice(8, 2, False, chances) for _ in range(400)]
    routing = Trace(np.array(rows, np.uint8)[:, None], np.arange(400, dtype=np.int32) // 100, 8)
    popular = tiers_table.replayed(routing, 4, tiers_table.POPULAR)
    chance = tiers_table.replayed(routing, 4, tiers_table.RANDOM)
    assert chance["hit_rate_per_token_max"] < popular["hit_rate_per_token"]
    assert chance["hit_rate_per_token"] == pytest.approx(0.5, abs=0.1)
    assert chance["hit_rate_per_token_min"] < chance["hit_rate_per_token"]
    assert (popular["pinned_share"], popular["seeds"], chance["seeds"]) == (0.5, 1, 20)


def test_the_table_has_replayed_and_measured_rows(tmp_path, monkeypatch, stores):
    """With two systems and one trace, and runs that are not made."""
    rows = np.array([[[0, 1]] * 3, [[1, 2]] * 3], np.uint8)
    routing = Trace(rows, np.arange(2, dtype=np.int32), 8)
    monkeypatch.setattr(tiers_table, "shipped", lambda: iter([("demo", routing)]))
    monkeypatch.setattr(tiers_table, "SHARES", (0.5,))

    def runs(jobs, rounds, drive, say, repeater):
        assert len({job.memory_bytes for job in jobs}) == 1
        speeds = dict.fromkeys(tiers_table._SPEEDS, 2.0)
        return [
            {"system": job.system, "hit_rate": 0.25, "prediction_accuracy": None} | speeds
            for job in jobs
        ]

    monkeypatch.setattr(tiers_table.speedups, "table", runs)
    monkeypatch.setattr(tiers_table, "SLOTS", 4)
    found = report.write(tmp_path, "tiers", tiers_table.table(stores(), print))
    measured = found[found.tokens_per_second.notna()]
    assert list(measured.system) == ["flashmoe", "fiddler", "fiddler", "daop"]
    assert list(measured.pins[1:]) == ["popular", "random", "popular"]
    assert (measured.decode_hit_rate == 0.25).all()
    assert measured.pinned[1:].eq(5).all()  # of 12 extents a half, one of them for copies
    replayed = found[found.tokens_per_second.isna()]
    assert list(replayed.pinned) == [5, 5, 12, 12]  # 56 and 125 of 256, of 24
    assert replayed.hit_rate_per_token.notna().all()
