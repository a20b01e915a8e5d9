"""The systems that go on with a prompt from a GGUF file, and what becomes of their figures."""

from __future__ import annotations

import json

import pytest

from harness.runs import gguf_systems, upstream_server_tests
from harness.runs.gguf_systems import big_moe_on_edge
from harness.runs.gguf_systems.llama_server import OURS, PLAIN
from harness.tables import server_table


def progress(text: str, milliseconds: float, mib: float) -> str:
    figures = {"wall_ms": milliseconds, "read_mb": mib, "cache_hit_pct": 40.0, "delta_text": text}
    return "BMOE_PROGRESS " + json.dumps(figures)


def test_a_rival_is_left_out_until_its_program_is_named(monkeypatch, tmp_path):
    rival = gguf_systems.available()["BigMoeOnEdge"]
    monkeypatch.delenv(rival.program, raising=False)
    assert not rival.installed()
    program = tmp_path / "bmoe-cli"
    program.touch()
    monkeypatch.setenv(rival.program, str(program))
    assert rival.installed()


def test_the_rivals_lines_become_figures():
    lines = ["noise", progress("<|1160|>", 100, 2), progress("<|1161|>", 300, 4), "=== perf ==="]
    figures = big_moe_on_edge.figures("\n".join(lines))
    assert figures["token_ids"] == [1160, 1161]
    assert figures["tokens_per_second"] == pytest.approx(5)
    assert figures["bytes_per_token"] == 3 << 20
    assert figures["hit_rate"] == pytest.approx(0.4)


def test_a_row_has_the_roofline_of_its_own_bytes():
    def run(system: str, share: float | None, speed: float, read: float) -> dict[str, object]:
        return {
            "system": system, "cap_share": share, "cap_bytes": share, "outcome": "ok",
            "tokens_per_second": speed, "bytes_per_token": read, "token_ids": [1],
            "drive_bytes_per_second": 1e9 if share else None,
        }  # fmt: skip

    rows = server_table.rows_of(
        [run(PLAIN, None, 20, 0), run(PLAIN, 0.5, 1, 8e8), run(OURS, 0.5, 8, 1e8)], 10**9
    )
    free, plain, ours = rows
    assert free["roofline_tokens_per_second"] is None  # no drive was asked
    assert plain["roofline_tokens_per_second"] == pytest.approx(1.25)
    assert ours["roofline_tokens_per_second"] == pytest.approx(10)
    assert ours["share_of_roofline"] == pytest.approx(0.8)
    assert plain["flashmoe_speedup"] == pytest.approx(8)


def test_outcomes_are_read_from_pytests_own_report(tmp_path):
    report = tmp_path / "results.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="unit.test_a" name="x"/>'
        '<testcase classname="unit.test_a" name="y"><failure message="no&#10;more"/></testcase>'
        '<testcase classname="unit.test_a" name="z"><skipped message="s"/></testcase>'
        "</testsuite></testsuites>"
    )
    outcomes = upstream_server_tests._outcomes(report)
    kinds = {name: outcome.outcome for name, outcome in outcomes.items()}
    assert kinds == {"test_a::x": "passed", "test_a::y": "failed", "test_a::z": "skipped"}
    assert outcomes["test_a::y"].words == "no"
