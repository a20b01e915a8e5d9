"""The commands that need no model: simulate and policies, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from command_line import refused, run

import flashmoe
from flashmoe import policies, trace
from flashmoe.cache import simulate


def test_simulate_prints_every_policy_and_capacity(capfd, tmp_path):
    path = tmp_path / "part.npz"
    trace.load(flashmoe.demo_routing_path()).first(600).save(path)
    arguments = ["simulate", path, "--capacity", 0.25, 0.5, "--policy"]
    names = [name for name in policies.available() if "bypass" not in name]
    status, out, _ = run(capfd, *arguments, *names, "--no-bypass", "--json")
    rows = json.loads(out)
    assert status == 0
    assert {(row["policy"], row["capacity"]) for row in rows} == {
        (name, capacity) for name in names for capacity in (0.25, 0.5)
    }
    for row in rows:
        assert row["slots"] == round(row["capacity"] * 64)
        assert row["hit_rate"] == row["hits"] / row["requests"]
    best = [row["hit_rate"] for row in rows if row["policy"] == "belady"]
    assert all(row["hit_rate"] <= best[row["capacity"] == 0.5] for row in rows)
    status, out, _ = run(capfd, *arguments[:4], "--policy", "fifo", "--warm", "--global")
    assert (status, out.count("fifo")) == (0, 1)


def test_slots_are_what_an_engine_counted(capfd, tmp_path):
    path = tmp_path / "part.npz"
    trace.load(flashmoe.demo_routing_path()).first(300).save(path)
    both = ("--policy", "lru", "--json")
    by_slots = run(capfd, "simulate", path, "--slots", 16, *both)[1]
    by_share = run(capfd, "simulate", path, "--capacity", 0.25, *both)[1]
    for row, other in zip(json.loads(by_slots), json.loads(by_share), strict=True):
        assert {**row, "policy_seconds": 0} == {**other, "policy_seconds": 0}
    for slots in (0, 65):
        assert "a layer has 1 to 64" in refused(capfd, "simulate", path, "--slots", slots)


def test_sequential_and_decode_only_are_flags(capfd, tmp_path):
    path = tmp_path / "part.npz"
    recorded = trace.load(flashmoe.demo_routing_path()).first(300)
    recorded.save(path)
    flags = ("--sequential", "--decode-only", "--prompt-tokens", 100)
    command = ("simulate", path, "--slots", 16, "--policy", "lru", "--json", *flags)
    (row,) = json.loads(run(capfd, *command)[1])
    conditions = simulate.Conditions(sequential=True, decode_only=True, prompt_tokens=100)
    outcome = simulate.replay(recorded, "lru", 0.25, conditions)
    assert (row["requests"], row["hits"]) == (outcome.requests, outcome.hits)
    assert row["requests"] == (256 - 100) * 16 * 8  # the second sequence is all prompt
    assert "give a number of prompt tokens" in refused(capfd, *command[:-2])


def test_what_is_read_is_kept_where_bypass_is_refused(capfd, tmp_path):
    path = tmp_path / "part.npz"
    trace.load(flashmoe.demo_routing_path()).first(100).save(path)
    arguments = ("simulate", path, "--slots", 12.5, "--policy", "lru", "learned", "--json")
    rows = [json.loads(run(capfd, *arguments, *more)[1]) for more in ((), ("--no-bypass",))]
    (lru, learned), (lru_without, learned_without) = rows
    assert lru["hits"] == lru_without["hits"]
    assert learned["hits"] != learned_without["hits"]
    assert lru["slots"] == 12.5


def test_policies_lists_the_registry(capfd):
    status, out, _ = run(capfd, "policies")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(policies.available())


def test_traces_that_make_no_sense_are_one_sentence(capfd, tmp_path):
    path = tmp_path / "t.npz"
    sequence = np.zeros(2, np.int32)
    np.savez(path, experts=np.array([{}, {}], dtype=object), sequence=sequence)
    assert "pickled" in refused(capfd, "simulate", path)
    np.savez(path, experts=np.array([[[1, 9]]] * 2, np.uint8), sequence=sequence)
    path.with_suffix(".json").write_text(json.dumps({"experts": 4}))
    assert "names expert 9" in refused(capfd, "simulate", path)


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m flashmoe policies | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_simulate_refuses_before_it_starts(capfd, monkeypatch):
    monkeypatch.setattr(simulate, "replay", lambda *_: pytest.fail("started"))
    routing = flashmoe.demo_routing_path()
    assert "no policy" in refused(capfd, "simulate", routing, "--policy", "lru", "mru")
