"""Tables: their arithmetic, their files and provenance, and that `check` sees a broken policy."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache.simulate import Conditions
from flashmoe.trace import Trace
from flashmoe.train import shipped_routing
from harness import check
from harness.__main__ import build_parser
from harness.datapoints import files
from harness.report import charts, digests, index, names, report
from harness.report.charts import theme
from harness.report.page import columns
from harness.runs import isolated_run
from harness.tables import data_splits, full_scale, hit_rates, speedups

ROOT = Path(__file__).parents[2]


def test_a_folder_of_a_run_that_was_stopped_early_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "here-quick").mkdir()
    index.write()
    assert "here-quick" not in (tmp_path / "README.md").read_text()


def test_the_hit_rate_table_means_what_it_says(tmp_path):
    """On the first tokens of a few held-out documents."""
    whole = trace.load(flashmoe.demo_routing_path())
    positions = [i for i, name in enumerate(whole.names()) if name in ("bible-0", "python-1")]
    part = whole.select(positions)
    early = np.arange(len(part.experts)) % 256 < 80
    routing = Trace(
        part.experts[early][:, :3], part.sequence[early], part.n_experts, info=part.info
    )
    cases = [hit_rates.Case("demo", data_splits.SEEN_DOMAIN, routing, 1000)]
    done: list[int] = []
    found, layers = hit_rates.table(cases, done.append)
    rows = pd.DataFrame(found)
    assert sum(done) == hit_rates.total_events(cases)
    assert set(policies.available()) - {hit_rates.PAPER} <= set(rows.policy)
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
    for name in ("hit_rates", "gap_by_layer"):
        assert all(theme.specification(chart) for chart in charts.of(tmp_path, name))
    assert "learned" in json.dumps(
        [theme.specification(c) for c in charts.of(tmp_path, "hit_rates")]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"hit_rates.csv", "gap_by_layer.csv"}
    assert "learned, %" in digests.rates_by_start(frame)


def test_the_split_keeps_kinds_and_subjects_whole():
    assert data_splits.part_of("kernel-docs-4") == data_splits.UNSEEN_DOMAIN
    assert data_splits.part_of("python-1") == data_splits.SEEN_DOMAIN
    assert data_splits.part_of("python-2") == data_splits.TRAINED
    subjects = {f"mmlu_dev/subject{n}/{m}" for n in range(40) for m in range(2)}
    assert len({(n.split("/")[1], data_splits.part_of(n)) for n in subjects}) == 40
    whole = dict(shipped_routing.shipped())["demo"]
    parts = [
        data_splits.take(whole, p)
        for p in (data_splits.TRAINED, data_splits.SEEN_DOMAIN, data_splits.UNSEEN_DOMAIN)
    ]
    assert sorted(name for part in parts for name in part.names()) == sorted(whole.names())


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
    report.write(tmp_path, "speedups-m", rows)
    drawn = json.dumps([theme.specification(c) for c in charts.of(tmp_path, "speedups-m")])
    assert all(names.system(row["system"]) in drawn for row in rows if row["outcome"] == "ok")


def test_a_table_shows_units_that_a_person_reads():
    frame = pd.DataFrame([{"read_bytes": 2_000_000, "bytes_per_second": 1.5e9, "text": "a|b\nc"}])
    table = columns.table(frame)
    assert table.headers == ["Read, MB", "Read, GB/s", "Text"]
    assert [cell.text for cell in table.rows[0]] == ["2", "1.5", "a|b\nc"]


def test_the_committed_results_carry_provenance():
    folders = [path for path in report.RESULTS.iterdir() if path.is_dir()]
    for folder in folders:
        if folder.name.startswith(".") or folder.name == files.FOLDER_NAME:
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
    for number, more in enumerate(({}, {"bypass_slots": 8 * (policy == "learned")})):
        how = Conditions(as_recorded=True, bypass=bool(more.get("bypass_slots")))
        made_by = check._EARLIER if policy == "learned" and not more else policy
        rate = check._decode_hit_rate("olmoe-quarter", made_by, 16, how, decoded)
        rows = [row | more | {"hit_rate": rate}]
        report.write(tmp_path / f"{number}-quick", "speedups-olmoe-quarter", rows)
    assert list(check._full_scale()) == []

    class Broken(policies.available()["fifo"]):
        @classmethod
        def options(cls, argument):  # an earlier network's file
            return {}

    known = policies.available() | {policy: Broken}
    monkeypatch.setattr(policies, "available", lambda: known)
    for number, said in enumerate(check._full_scale()):
        assert said.startswith(f"{number}-quick/speedups-olmoe-quarter.csv: " + system)
    assert number == 1


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
