"""Runs of every system: the same tokens, times that add up, and a row for each that is killed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import baselines
import flashmoe
from flashmoe import trace
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace
from harness.report.charts import theme, tokens
from harness.runs import isolated_run
from harness.runs.disturbance import Repeater
from harness.runs.forced_routing import forced_routing
from harness.runs.job import Job
from harness.runs.memory_cap import memory_cap
from harness.tables import speedups, text_table

STREAMING = ("flashmoe", "flashmoe-lru", "flashmoe-lfu", "on-demand")


def calm() -> Repeater:
    """One that never finds a reason to measure again."""
    return Repeater(0, str, product=lambda: 1.0)


@pytest.fixture(scope="module")
def generation(tmp_path_factory):
    """Every system, once, each in a process of its own, on the demo model."""
    folder = tmp_path_factory.mktemp("generation")
    pack(flashmoe.demo_path(), folder / "store")
    prompt = text_table.PROMPTS["bible"]
    base = Job("flashmoe", flashmoe.demo_path(), folder / "store", 0, prompt, 6)
    base = replace(base, routing=flashmoe.demo_routing_path())
    rows = speedups.table(jobs_of(base), 1, lambda: 1e9, str, calm(), folder / "kept.jsonl")
    return folder, base, {row["system"]: row for row in rows}


def jobs_of(base: Job) -> list[Job]:
    jobs = speedups.jobs_for(base, [16], [16])
    given = {job.system for job in jobs}
    others = sorted(set(baselines.available()) - given)
    memory_bytes = speedups.budget_for(base.store, 16)
    return jobs + [replace(base, system=name, memory_bytes=memory_bytes) for name in others]


def test_every_system_gives_the_same_tokens(generation):
    _, _, rows = generation
    assert rows.keys() == set(baselines.available())
    for name, row in rows.items():
        assert row["same_output"] == (True if baselines.available()[name].exact else None)
        assert row["outcome"] == "ok"
        assert 0 <= row["tokens_differing"] <= 1
    assert 0 < rows["daop"]["prediction_accuracy"] <= 1


def test_the_parts_of_a_token_add_up(generation):
    _, _, rows = generation
    for name in STREAMING:
        row = rows[name]
        parts = [row[f"{p}_ms"] for p in ("wait", "experts", "policy", "python", "rest_of_model")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(1e3 / row["tokens_per_second"], rel=1e-6)
        assert row["page_cache_bytes"] == 0
        if row["memory_bytes"] is not None:
            assert 0 < row["resident_bytes"] <= row["memory_bytes"]
    assert rows["on-demand"]["hit_rate"] == 0
    assert rows["on-demand"]["bytes_per_token"] == 16 * 8 * (48 << 10)
    assert rows["flashmoe-lru"]["bytes_per_token"] < rows["on-demand"]["bytes_per_token"]


def test_the_time_of_each_token_is_kept_in_order(generation):
    folder, base, rows = generation
    each = pd.DataFrame(speedups.tokens(folder / "kept.jsonl", jobs_of(base), 1))
    assert set(each.system) == set(rows)
    for system, its in each.groupby("system"):
        row = rows[system]
        assert its.token.tolist() == list(range(1, row["tokens"] + 1))
        assert its.milliseconds.mean() == pytest.approx(1e3 / row["tokens_per_second"])
        assert sorted(its.milliseconds)[len(its) // 2] == pytest.approx(row["token_median_ms"])


def test_the_roofline_is_the_slower_of_drive_and_arithmetic(generation):
    _, _, rows = generation
    arithmetic = [1 / rows["in-memory"]["tokens_per_second"]]
    for row in rows.values():
        if "experts_ms" in row:
            arithmetic.append((row["experts_ms"] + row["rest_of_model_ms"]) / 1e3)
    compute = min(arithmetic)
    for name in STREAMING:
        row = rows[name]
        floor = max(row["bytes_per_token"] / 1e9, compute)
        assert row["roofline_tokens_per_second"] == pytest.approx(1 / floor)
        assert row["share_of_roofline"] == pytest.approx(row["tokens_per_second"] * floor)


def test_a_run_that_fails_says_so(generation):
    _, base, _ = generation
    with pytest.raises(FlashMoEError, match=r"flashmoe failed: .*too small"):
        isolated_run.run_alone(replace(base, memory_bytes=1))
    with memory_cap(1 << 30) as cap:
        if cap is None:
            pytest.skip("no memory cgroup can be made here")
    killed = isolated_run.run_alone(replace(base, memory_bytes=8 << 20, cap_bytes=64 << 20))
    assert killed["outcome"] == isolated_run.OUT_OF_MEMORY


def test_a_killed_run_leaves_nothing_on_the_drive(generation, monkeypatch):
    _, base, _ = generation
    before = sorted(base.store.iterdir())
    program = (
        "import json, os, sys\n"
        "path = os.path.join(json.loads(sys.argv[1])['scratch'], 'weights')\n"
        "open(path, 'wb').write(b'1')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setattr(isolated_run, "_program", lambda job: [sys.executable, "-c", program])
    killed = isolated_run.run_alone(replace(base, cap_bytes=1 << 30))
    assert killed["outcome"] == isolated_run.OUT_OF_MEMORY
    assert sorted(base.store.iterdir()) == before


def test_a_killed_run_is_a_row_and_an_interrupted_table_goes_on(generation, monkeypatch):
    folder, base, rows = generation
    kept = folder / "kept.jsonl"
    noted = len(kept.read_text().splitlines())
    assert noted == len(rows)
    monkeypatch.setattr(speedups, "run_alone", lambda job: {
        "system": job.system, "outcome": isolated_run.OUT_OF_MEMORY, "cap_bytes": 1,
        "read_limit_bytes_per_second": None, "peak_memory_bytes": 1,
    })  # fmt: skip
    memory_bytes = speedups.budget_for(base.store, 16)
    known = replace(base, memory_bytes=memory_bytes, routing=flashmoe.demo_routing_path())
    fresh = replace(known, cap_bytes=1)
    again = speedups.table([known, fresh], 1, None, str, calm(), kept)
    assert again[0]["tokens_per_second"] == rows["flashmoe"]["tokens_per_second"]
    assert again[1]["outcome"] == isolated_run.OUT_OF_MEMORY
    assert len(kept.read_text().splitlines()) == noted + 1


def test_the_drive_is_asked_before_and_after_what_streams(generation, monkeypatch):
    _, base, _ = generation
    streams = {"bytes_per_token": 1e9, "wasted_bytes_per_token": 0, "experts_seconds": 0.1,
               "rest_of_model_seconds": 0.1, "resident_bytes": 1, "page_cache_bytes": 0,
               "slots": 1, "shared": False}  # fmt: skip
    runs = {"flashmoe": streams, "fiddler": {"slots": None, "shared": None}, "in-memory": {}}
    monkeypatch.setattr(speedups, "run_alone", lambda job: {
        "system": job.system, "outcome": "ok", "cap_bytes": None, "memory_bytes": None,
        "read_limit_bytes_per_second": None, "peak_memory_bytes": 1, "slots": None, "shared": None,
        "tokens_per_second": 1.0, "tokens": 1, "token_ids": [1, 2], "prompt_tokens": 1,
    } | runs[job.system])  # fmt: skip
    speeds = iter([1e9, 3e9, 2e9, 9e9])  # around the first, after the second, before fiddler
    jobs = [replace(base, system=name) for name in ("flashmoe", "flashmoe", "in-memory", "fiddler")]
    first, second, *others = speedups.table(jobs, 1, lambda: next(speeds), str, calm())
    assert first["drive_bytes_per_second"] == second["drive_bytes_per_second"] == 3e9
    assert first["share_of_roofline"] == pytest.approx(1 / 3)
    assert not any("share_of_roofline" in row for row in others)
    assert list(speeds) == []


def test_the_reads_and_computations_of_a_token_are_drawn(generation):
    _, base, _ = generation
    job = replace(base, memory_bytes=speedups.budget_for(base.store, 16), timeline=True)
    run = isolated_run.run_alone(job)
    kinds = {what for what, _, _ in run["timeline"]}
    assert {"experts", "layer", "demand"} <= kinds
    layers = [(start, end) for what, start, end in run["timeline"] if what == "layer"]
    assert len(layers) == 16
    assert all(start < end for start, end in layers)
    frame = pd.DataFrame(
        {"system": "flashmoe", "what": what, "start_ms": 1e3 * start, "end_ms": 1e3 * end}
        for what, start, end in run["timeline"]
    )
    both = pd.concat([frame, frame.assign(system="flashmoe-no-prefetch")])
    drawn = [theme.specification(chart) for chart in tokens.timelines(both)]
    assert len(drawn) == 2
    assert all("needed reads" in json.dumps(chart) for chart in drawn)


def test_forced_routing_is_the_recorded_one(generation):
    folder, _, _ = generation
    recorded = trace.load(flashmoe.demo_routing_path())
    model = flashmoe.load(folder / "store", memory="8MiB", policy="lru")
    try:
        with forced_routing(model, recorded):
            again = record(model, [torch.arange(20) + 50], max_new_tokens=10)
        np.testing.assert_array_equal(again.experts, recorded.experts[: len(again.experts)])
        np.testing.assert_array_equal(again.weights, recorded.weights[: len(again.experts)])
        few = Trace(recorded.experts[:5], recorded.sequence[:5], recorded.n_experts)
        with forced_routing(model, few), pytest.raises(FlashMoEError, match="used up"):
            model(torch.arange(20)[None])
        other = Trace(recorded.experts[:, :3], recorded.sequence, recorded.n_experts)
        with pytest.raises(FlashMoEError, match="3 layers"), forced_routing(model, other):
            pass
    finally:
        model.flashmoe.close()
