"""The systems that go on with a prompt from a GGUF file, and what becomes of their figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import gguf_models
import llama_process
import pandas as pd
import pytest
import torch

from flashmoe import trace
from flashmoe.errors import FlashMoEError
from harness import check
from harness.report import report
from harness.runs import gguf_file, gguf_systems, upstream_server_tests
from harness.runs.disturbance import Repeater
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


def test_a_build_without_a_rivals_option_is_left_out(monkeypatch, tmp_path):
    rival = gguf_systems.available()["ik_llama.cpp llama-server --prefetch-experts"]
    program = tmp_path / "llama-server"
    monkeypatch.setenv(rival.program, str(program))
    for options, there in (("--no-mmap", False), ("--prefetch-experts", True)):
        program.write_text(f"#!/bin/sh\necho usage: {options}\n")
        program.chmod(0o755)
        assert rival.installed() is there


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


def test_runs_under_a_cap_below_the_file_are_recorded(gguf_files, tmp_path, monkeypatch):
    monkeypatch.setattr(server_table, "drop_all", lambda: None)
    monkeypatch.setattr(server_table, "_drive", lambda model, size: None)
    calm = Repeater(0, str, product=lambda: 1.0)
    works = []
    system = gguf_systems.System("s", lambda work: works.append(work) or {"outcome": "ok"})
    server_table.measure(gguf_files(), Path("p"), [system], (0.5, 1, 1.5), 2, tmp_path, calm)
    recorded = [work.trace is not None for work in works]
    assert recorded == [True, False, False, False] * 2
    assert len({work.trace for work in works}) == 3


def test_guessed_tokens_are_measured_only_where_they_are_asked_for():
    usual = [system.name for system in server_table._chosen([])]
    assert PLAIN in usual
    assert not any("guessed" in name for name in usual)
    (asked,) = server_table._chosen([f"{OURS}, 3 guessed"])
    assert asked.is_ours


def test_a_repeating_prompt_says_before_what_the_answer_will_be():
    prompt, new = server_table.REPEATING, server_table.NEW_TOKENS
    end = prompt[-16:]  # and here it stood before
    first = next(at for at in range(len(prompt)) if prompt[at : at + 16] == end)
    assert prompt[first + 16 : first + 16 + new] == tuple(range(end[-1] + 1, end[-1] + 1 + new))


def test_who_refuses_a_limit_has_that_for_its_outcome(gguf_files, tmp_path, monkeypatch):
    def refuse(work):
        raise FlashMoEError("too little memory")

    monkeypatch.setattr(server_table, "drop_all", lambda: None)
    calm = Repeater(0, str, product=lambda: 1.0)
    ours = gguf_systems.System("ours", refuse, is_ours=True)
    (run,) = server_table.measure(gguf_files(), Path("p"), [ours], (), 1, tmp_path, calm)
    assert run["outcome"] == "too little memory"
    with pytest.raises(FlashMoEError):  # llama.cpp itself must not fail
        llama = gguf_systems.System("llama.cpp", refuse)
        server_table.measure(gguf_files(), Path("p"), [llama], (), 1, tmp_path, calm)


def test_routers_are_solved_for_the_embeddings_that_the_file_holds(tmp_path):
    weights = gguf_models.weights("olmoe")
    gguf_file.write(weights, tmp_path / "m.gguf", "mxfp4_moe")
    name, embeddings = next(iter(weights.dense()))
    assert name == "model.embed_tokens.weight"
    (tensor,) = (
        tensor
        for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
        if tensor.name == "token_embd.weight"
    )
    held = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(held, gguf_file.embeddings_in_file(embeddings, "mxfp4_moe"))
    assert not torch.equal(held, embeddings.float())


@pytest.fixture(scope="module")
def recorded_run(gguf_files, tmp_path_factory):
    """What a system gives of a run that was recorded; the server is xllamacpp's."""
    model = gguf_files("qwen3_moe")
    path = tmp_path_factory.mktemp("recorded") / "run.npz"
    job = {
        "model": str(model), "memory": str(model.stat().st_size // 2), "policy": "learned",
        "record": str(path), "prompts": ["a", "hello world, a prompt. " * 3, "x1y2z3 " * 60],
    }  # fmt: skip
    stats = llama_process.run("llama_server.py", **job)["stats"]
    return {
        "system": OURS, "cap_share": 0.5, "cap_bytes": 1, "outcome": "ok", "trace": path,
        "tokens_per_second": 1.0, "bytes_per_token": 1.0, "drive_bytes_per_second": None,
        "hit_rate": stats["hit_rate"], "slots_per_layer": stats["slots_per_layer"],
    }  # fmt: skip


@pytest.fixture
def published(recorded_run, tmp_path, monkeypatch):
    """A folder of results with this run's table and trace; a later round hit other than it."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    folder = tmp_path / "here"
    later = recorded_run | {"hit_rate": 0.5, "trace": Path("later.npz")}
    free = recorded_run | {"cap_share": None, "trace": None}
    rows = server_table.rows_of([recorded_run, later, free], 1)
    folder.mkdir()
    report.write(folder, "servers-m", server_table.keep_traces(folder, "servers-m", rows))
    return folder


def test_the_check_replays_a_recorded_run(published):
    assert list(check._servers()) == []
    names = {path.name for path in published.iterdir()}
    assert names == {f"trace-servers-m-0.5.{kind}" for kind in ("npz", "json")} | {"servers-m.csv"}


def change_description(folder: Path, **info: object) -> None:
    path = folder / "trace-servers-m-0.5.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | info))


def change_row(folder: Path, column: str, by: float) -> None:
    table = pd.read_csv(folder / "servers-m.csv")
    table.loc[0, column] += by
    table.to_csv(folder / "servers-m.csv", index=False, float_format="%.6g")


def change_routing(folder: Path) -> None:
    path = folder / "trace-servers-m-0.5.npz"
    recorded = trace.load(path)
    replace(recorded, experts=recorded.experts[::-1].copy()).save(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change_routing, "replayed"),
        (lambda folder: change_description(folder, hits=1), "recorded 1 hits of "),
        (lambda folder: change_description(folder, requests=None), " of None, replayed "),
        (lambda folder: change_description(folder, policy="fifo"), "replayed"),
        (lambda folder: change_description(folder, policy="no such"), "no such"),
        (lambda folder: change_description(folder, slots="7"), "recorded with 7 slots"),
        (lambda folder: change_row(folder, "hit_rate", 1e-5), "its row hit "),
        (lambda folder: change_row(folder, "slots_per_layer", 1), "slots a layer, in the table"),
        (lambda folder: (folder / "trace-servers-m-0.5.npz").unlink(), "no such file"),
        (lambda folder: (folder / "servers-m.csv").unlink(), "no row of a table names it"),
    ],
)
def test_the_check_fails_on_what_is_not_the_recorded_run(published, damage, said):
    damage(published)
    (sentence,) = check._servers()
    assert sentence.startswith("here/trace-servers-m-0.5.npz: ")
    assert said in sentence


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
