"""The harness: its arithmetic on small real runs, its files, and that it cleans up."""

from __future__ import annotations

import ast
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import baselines
import flashmoe
from flashmoe import policies, trace
from flashmoe.engines.transformers.recorder import record
from flashmoe.errors import FlashMoEError
from flashmoe.store.pack import pack
from flashmoe.trace import Trace
from harness import check
from harness.__main__ import build_parser
from harness.report import digests, index, pages, plots, provenance, report
from harness.runs import isolated_run, ssd
from harness.runs.forced_routing import forced_routing
from harness.runs.job import Job
from harness.runs.memory_cap import ReadLimit, memory_cap
from harness.tables import data_splits, full_scale, hit_rates, speedups, text_table

ROOT = Path(__file__).parents[1]
needs_fio = pytest.mark.skipif(ssd.fio_path() is None, reason="fio is not installed")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("flashmoe", {"baselines", "harness"}), ("baselines", {"harness"})],
)
def test_imports_flow_one_way(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, path


@needs_fio
def test_a_stopped_measurement_leaves_no_fio_behind(tmp_path):
    (tmp_path / "blocks").write_bytes(bytes(1 << 20))
    script = (
        "import pathlib, signal, sys; from harness import __main__; from harness.runs import ssd;"
        "signal.signal(signal.SIGTERM, __main__._stop);"
        "path = pathlib.Path(sys.argv[1]);"
        "ssd.fio(path, 4096, 1, 'random', ssd.working_engine(path), 60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "blocks")]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

    def reading():
        found = psutil.process_iter(["cmdline"])
        return [
            p.pid for p in found if f"--filename={tmp_path}/blocks" in (p.info["cmdline"] or ())
        ]

    until = time.monotonic() + 60
    while not reading() and time.monotonic() < until:
        time.sleep(0.05)
    assert reading()
    time.sleep(1.5)  # by now it has started its jobs
    run.terminate()
    assert run.wait(30) != 0
    until = time.monotonic() + 5  # of the 60 seconds that it would run
    while reading() and time.monotonic() < until:
        time.sleep(0.05)
    assert not reading()


def test_a_folder_of_a_run_that_was_stopped_early_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "here-quick").mkdir()
    index.write()
    assert "here-quick" not in (tmp_path / "README.md").read_text()


@needs_fio
def test_fio_and_the_reader_measure_the_same_file_and_leave_nothing(tmp_path):
    with ssd.test_file(tmp_path, 32 << 20) as path:
        engine = ssd.working_engine(path)
        for pattern in ("random", "sequential"):
            row = ssd.fio(path, 128 << 10, 4, pattern, engine, 0.3)
            assert row["bytes_per_second"] > 1e6
            assert 0 < row["latency_p50_ms"] <= row["latency_p99_ms"]
        bench = ssd.ReaderBench(path, 48 << 10, 4)
        assert bench.bytes_per_second(0.2) > 1e6
        assert bench.reader.bytes_read > 0
        bench.close()
        with pytest.raises(FlashMoEError, match="fio failed"):
            ssd.fio(path.with_name("none") / "x", 4096, 1, "random", engine, 0.1)
    assert not list(tmp_path.iterdir())


def test_a_drive_too_full_for_the_test_file_is_one_sentence(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(FlashMoEError, match="free disk"), ssd.test_file(tmp_path):
        pass


def test_the_hit_rate_table_means_what_it_says(tmp_path):
    """On the first tokens of a few held-out documents."""
    whole = trace.load(flashmoe.demo_routing_path())
    positions = [i for i, name in enumerate(whole.names()) if name in ("bible-0", "python-1")]
    part = whole.select(positions)
    early = np.arange(len(part.experts)) % 256 < 48
    routing = Trace(
        part.experts[early][:, :3], part.sequence[early], part.n_experts, info=part.info
    )
    cases = [hit_rates.Case("demo", data_splits.SEEN_DOMAIN, routing, 1000)]
    done: list[int] = []
    found, layers = hit_rates.table(cases, done.append)
    rows = pd.DataFrame(found)
    assert sum(done) == hit_rates.total_events(cases)
    assert set(policies.available()) <= set(rows.policy)
    assert set(rows.start) == set(hit_rates.CONDITIONS)
    assert (rows.hits <= rows.requests).all()
    assert ((rows.low <= rows.hit_rate) & (rows.hit_rate <= rows.high)).all()
    np.testing.assert_allclose(rows.hit_rate, rows.hits / rows.requests, atol=1e-5)
    np.testing.assert_allclose(rows.bytes_per_token, rows.misses_per_token * 1000, atol=1)
    # where LRU is as good as Belady there is no gap to close
    assert (rows[rows.policy == "lru"].gap_closed.dropna() == 0).all()
    assert (rows[rows.policy == "belady"].gap_closed.dropna() == 1).all()
    assert (rows[rows.policy == "lfu"].over_lfu == 0).all()
    cold = rows[rows.start == "cold"].set_index(["policy", "capacity"])
    by_layer = pd.DataFrame(layers).groupby("capacity").lru.mean()
    np.testing.assert_allclose(by_layer, cold.loc["lru"].hit_rate, atol=1e-4)
    frame = report.write(tmp_path, "hit_rates", found)
    report.write(tmp_path, "gap_by_layer", layers)
    names = {f"{name}.{kind}" for name in ("hit_rates", "gap_by_layer") for kind in ("csv", "png")}
    for name in ("hit_rates", "gap_by_layer"):
        assert plots.draw(tmp_path, name, tmp_path)
    assert names == {path.name for path in tmp_path.iterdir()}
    assert " learned |" in digests.hit_rates(frame)


def test_the_split_keeps_kinds_and_subjects_whole():
    assert data_splits.part_of("kernel-docs-4") == data_splits.UNSEEN_DOMAIN
    assert data_splits.part_of("python-1") == data_splits.SEEN_DOMAIN
    assert data_splits.part_of("python-2") == data_splits.TRAINED
    subjects = {f"mmlu_dev/subject{n}/{m}" for n in range(40) for m in range(2)}
    assert len({(n.split("/")[1], data_splits.part_of(n)) for n in subjects}) == 40
    whole = dict(data_splits.shipped())["demo"]
    parts = [
        data_splits.take(whole, p)
        for p in (data_splits.TRAINED, data_splits.SEEN_DOMAIN, data_splits.UNSEEN_DOMAIN)
    ]
    assert sorted(name for part in parts for name in part.names()) == sorted(whole.names())


STREAMING = ("flashmoe", "flashmoe-lru", "flashmoe-lfu", "on-demand")


@pytest.fixture(scope="module")
def generation(tmp_path_factory):
    """Every system, once, each in a process of its own, on the demo model."""
    folder = tmp_path_factory.mktemp("generation")
    pack(flashmoe.demo_path(), folder / "store")
    prompt = text_table.PROMPTS["bible"]
    base = Job("flashmoe", flashmoe.demo_path(), folder / "store", 0, prompt, 6)
    base = replace(base, routing=flashmoe.demo_routing_path())
    jobs = speedups.jobs_for(base, [16], [16])
    given = {job.system for job in jobs}
    others = sorted(set(baselines.available()) - given)
    memory_bytes = speedups.budget_for(base.store, 16)
    jobs += [replace(base, system=name, memory_bytes=memory_bytes) for name in others]
    rows = speedups.table(jobs, 1, lambda: 1e9, lambda text: None, folder / "kept.jsonl")
    return folder, base, {row["system"]: row for row in rows}


def test_every_system_gives_the_same_tokens(generation):
    _, _, rows = generation
    assert rows.keys() == set(baselines.available())
    for name, row in rows.items():
        assert row["same_output"] == (True if baselines.get(name).exact else None)
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


def test_each_token_s_time_is_kept_in_order(generation):
    folder, _, rows = generation
    each = pd.DataFrame(speedups.tokens(folder / "kept.jsonl"))
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
    again = speedups.table([known, fresh], 1, None, lambda text: None, kept)
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
    first, second, *others = speedups.table(jobs, 1, lambda: next(speeds), lambda text: None)
    assert first["drive_bytes_per_second"] == second["drive_bytes_per_second"] == 3e9
    assert first["share_of_roofline"] == pytest.approx(1 / 3)
    assert not any("share_of_roofline" in row for row in others)
    assert list(speeds) == []


def test_a_token_s_reads_and_computations_are_drawn(generation, tmp_path):
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
    plots.timeline(both, tmp_path, "timeline-demo")
    assert (tmp_path / "timeline-demo.png").stat().st_size > 1000


@pytest.mark.parametrize("caps", [(0.4,), (0.25, 0.4)])
def test_speedups_are_drawn_for_one_cap_and_for_several(tmp_path, caps):
    rows = [
        {"model": "m", "system": system, "outcome": outcome, "cap_share": cap,
         "tokens_per_second": rate, "tokens_per_second_min": rate, "tokens_per_second_max": rate,
         "roofline_tokens_per_second": rate + 1 if system == "flashmoe" else np.nan}
        for cap in (*caps, None)
        for system, rate, outcome in (("flashmoe", 3.0, "ok"), ("daop", 1.0, "ok"),
                                      ("fiddler", np.nan, isolated_run.OUT_OF_MEMORY))
    ]  # fmt: skip
    plots.speedups(pd.DataFrame(rows), tmp_path, "speedups-m")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


def test_a_drive_can_be_made_slower(tmp_path):
    path = tmp_path / "blocks"
    path.write_bytes(bytes(24 << 20))
    read = """import mmap, os, sys
file, block = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
while os.readv(file, [block]):
    pass"""
    try:
        with memory_cap(None, ReadLimit(tmp_path, 12_000_000)) as cap:
            if cap is None:
                pytest.skip("no cgroup can be made here")
            os.sync()
            started = time.monotonic()
            done = subprocess.run([sys.executable, "-c", read, path], preexec_fn=cap.enter)
            seconds = time.monotonic() - started
    except FlashMoEError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip("this file system refuses direct reads")
    assert seconds > 1  # 24 MiB at 12 MB/s take two; the kernel's window lets some pass at once


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


def test_provenance_is_whole_and_names_no_path_of_this_machine(tmp_path):
    gathered = provenance.gather("python -m harness ssd", tmp_path, seed=1)
    for key in ("command", "date", "machine", "python", "versions"):
        assert gathered[key]
    text = json.dumps(gathered)
    assert str(Path.home()) not in text
    assert str(ROOT) not in text
    report.provenance(tmp_path, "a", gathered)
    report.provenance(tmp_path, "b", gathered)
    assert json.loads((tmp_path / "provenance.json").read_text()).keys() == {"a", "b"}


def test_a_table_shows_units_that_a_person_reads():
    frame = pd.DataFrame([{"read_bytes": 2_000_000, "bytes_per_second": 1.5e9, "text": "a|b\nc"}])
    text = pages.markdown(frame)
    assert "read_MB" in text
    assert "GB/s" in text
    assert "1.5 " in text
    assert "a\\|b⏎c" in text


def test_the_committed_results_carry_provenance():
    folders = [path for path in report.RESULTS.iterdir() if path.is_dir()]
    for folder in folders:
        if folder.name.startswith("."):
            continue
        records = json.loads((folder / "provenance.json").read_text())
        for entry in records.values():
            assert entry["commit"]
            assert entry["versions"]["torch"]


@pytest.mark.parametrize("policy", ["lru", "learned"])
def test_the_check_fails_when_a_policy_is_broken(tmp_path, monkeypatch, policy):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    system = {"lru": "flashmoe-lru", "learned": "flashmoe"}[policy]
    row = {"model": "olmoe-quarter", "routing": "shipped: python-1", "system": system,
           "slots": 16, "shared": False, "tokens": 11, "warm_up_tokens": 6}  # fmt: skip
    decoded = slice(full_scale.PROMPT_TOKENS + 6, full_scale.PROMPT_TOKENS + 6 + 11)
    rate = check._decode_hit_rate("olmoe-quarter", policy, 16, False, decoded)
    report.write(tmp_path / "here-quick", "speedups-olmoe-quarter", [row | {"hit_rate": rate}])
    assert list(check._full_scale()) == []
    known = policies.available() | {policy: policies.available()["fifo"]}
    monkeypatch.setattr(policies, "available", lambda: known)
    (said,) = check._full_scale()
    assert said.startswith("here-quick/speedups-olmoe-quarter.csv: " + system)


@pytest.mark.parametrize("given", ["--rounds 0", "--caps 0.4 -1", "--decode-seconds -2",
                                   "--slots 0", "--decode-seconds nan"])  # fmt: skip
def test_counts_and_amounts_are_above_zero(given, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["full-scale", *given.split()])
    assert f"{given.split()[-1]} is not above zero" in capsys.readouterr().err


def test_medians_are_of_the_rounds():
    runs = [
        {"system": "in-memory", "outcome": "ok", "slots": None, "shared": None, "cold": True,
         "memory_bytes": None, "tokens_per_second": rate, "cap_bytes": None, "tokens": 4,
         "read_limit_bytes_per_second": None, "peak_memory_bytes": 1, "warm_up_tokens": 2}
        for rate in (3.0, 1.0, 2.0)
    ]  # fmt: skip
    row = speedups._row(runs, 0.1)
    assert row["warm_up_tokens"] == 2
    assert speedups._row([*runs, runs[0] | {"tokens": 3}], 0.1)["warm_up_tokens"] is None
    assert row["tokens_per_second"] == statistics.median((1.0, 2.0, 3.0))
    assert (row["tokens_per_second_min"], row["tokens_per_second_max"]) == (1.0, 3.0)
    killed = runs[0] | {"outcome": isolated_run.OUT_OF_MEMORY}
    assert speedups._row([*runs, killed], 0.1)["outcome"] == isolated_run.OUT_OF_MEMORY


def test_a_system_with_a_few_very_slow_tokens_is_named(capsys):
    even = {"system": "flashmoe", "tokens_per_second": 2.0, "token_median_ms": 480.0}
    uneven = {"system": "os-paging", "tokens_per_second": 0.5, "token_median_ms": 800.0}
    killed = {"system": "daop", "outcome": "out of memory"}
    full_scale._tell_uneven([even, uneven, killed])
    (line,) = capsys.readouterr().err.splitlines()
    assert "os-paging" in line
    assert "--decode-seconds" in line
