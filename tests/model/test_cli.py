"""The command line on a model: what pack, verify, generate and record print."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_tokenizer
import torch
import transformers
from command_line import refused, run

import flashmoe
from flashmoe import cli, trace

PROMPT = "And it came to pass"


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory):
    store = tmp_path_factory.mktemp("demo") / "store"
    assert cli.main(["pack", str(flashmoe.demo_path()), str(store)]) == 0
    return store


def test_pack_and_verify(capfd, checkpoints, tmp_path):
    status, out, _ = run(capfd, "pack", checkpoints(), tmp_path / "s", "--quant", "none")
    assert (status, "3 MoE layers x 8 experts" in out) == (0, True)
    status, out, _ = run(capfd, "verify", tmp_path / "s")
    assert (status, "all 24 experts" in out) == (0, True)


def test_pack_and_verify_on_two_drives(capfd, checkpoints, tmp_path):
    store, other = tmp_path / "s", tmp_path / "o"
    said = {(): ", in 2 copies", ("--stripe",): ", each shared among 2 files"}
    for stripe, words in said.items():
        assert run(capfd, "pack", checkpoints(), store, "--also", other, *stripe)[0] == 0
        status, out, _ = run(capfd, "verify", store)
        assert (status, f"all 24 experts are as they were packed{words}" in out) == (0, True)
    assert "name another folder by --also" in refused(
        capfd, "pack", checkpoints(), tmp_path / "n", "--stripe"
    )
    assert not (tmp_path / "n").exists()


def test_generate_json_is_what_transformers_generates(capfd, demo_store):
    status, out, _ = run(
        capfd, "generate", demo_store, "--prompt", PROMPT, "--memory", "8MiB", "--policy", "lfu",
        "--max-new-tokens", 12, "--json",
    )  # fmt: skip
    assert status == 0
    result = json.loads(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(flashmoe.demo_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        flashmoe.demo_path(), experts_implementation="eager"
    )
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert result["token_ids"] == expected[0].tolist()
    assert result["text"] == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert result["new_tokens"] == expected.shape[1] - ids.shape[1]
    assert result["stats"]["peak_resident_bytes"] <= 8 << 20
    fixed = {"requests", "hits", "misses", "prefetch_used", "prefetch_wasted", "bytes_read",
             "read_seconds", "resident_bytes", "peak_resident_bytes", "policy_seconds"}  # fmt: skip
    assert fixed <= result["stats"].keys()


def test_generate_streams_text_as_a_person_would_run_it(demo_store):
    """The installed command, the default model found by itself."""
    command = [sys.executable, "-m", "flashmoe", "generate", "--prompt", PROMPT]
    environment = os.environ | {"XDG_CACHE_HOME": str(demo_store.parent / "cache")}
    done = subprocess.run(
        [*command, "--max-new-tokens", "8"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    assert "hit rate" in done.stderr


def test_record_then_simulate_gives_the_engines_hits(capfd, demo_store, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "t.npz"
    prompts.write_text("def main():\n\nAnd God said\n")
    status, said, _ = run(
        capfd, "record", demo_store, "--prompts", prompts, "--out", out, "--memory", "9MiB",
        "--max-new-tokens", 6, "--probabilities",
    )  # fmt: skip
    assert status == 0
    recorded = trace.load(out)
    assert (recorded.n_layers, recorded.n_experts, recorded.top_k) == (16, 64, 8)
    assert recorded.probabilities.shape == (len(recorded.experts), 16, 64)
    every = recorded.probabilities.astype(np.float32)
    np.testing.assert_allclose(every.sum(-1), 1, atol=1e-2)
    chosen = np.take_along_axis(every, recorded.experts.astype(int), -1)
    others = every.copy()
    np.put_along_axis(others, recorded.experts.astype(int), 0, -1)
    assert (chosen.min(-1) >= others.max(-1)).all()
    np.testing.assert_allclose(  # what the model weighs experts with comes from the same numbers
        chosen / chosen.sum(-1, keepdims=True),
        recorded.weights / recorded.weights.astype(np.float32).sum(-1, keepdims=True),
        rtol=0.02,
        atol=1e-3,
    )
    status, json_out, _ = run(
        capfd, "simulate", out, "--policy", "learned", "--slots", recorded.info["slots"], "--warm",
        "--as-recorded", "--json",
    )  # fmt: skip
    (row,) = json.loads(json_out)
    # 9 MiB are 12 slots a layer; half of one in each of 16 layers is for bypass
    assert (status, row["slots"], recorded.info["bypass_slots"]) == (0, 11.5, 8)
    assert (row["requests"], row["hits"]) == (recorded.info["requests"], recorded.info["hits"])
    assert f"{row['hits']} hits of {row['requests']}" in said


def test_generate_says_how_it_goes_and_begins_where_it_ended(capfd, demo_store, tmp_path):
    command = ["generate", demo_store, "--prompt", PROMPT, "--memory", "12MiB", "--stats", "--json",
               "--max-new-tokens", 40, "--warm", tmp_path / "kept.npz"]  # fmt: skip
    results = []
    for _ in range(2):
        status, out, err = run(capfd, *command)
        assert status == 0
        results.append(json.loads(out))
        seconds = results[-1]["each_second"]
        assert seconds[-1]["resident_bytes"] <= 12 << 20
        assert sum(second["tokens_per_second"] for second in seconds) > 0
        assert err.count("token/s") == len(seconds) - 1  # the last is no whole second
    cold, warm = results
    assert cold["token_ids"] == warm["token_ids"]
    assert warm["stats"]["hits"] > cold["stats"]["hits"]


def test_generate_takes_what_memory_is_free(capfd, demo_store):
    status, out, _ = run(
        capfd, "generate", demo_store, "--prompt", PROMPT, "--memory", "auto", "--json",
        "--max-new-tokens", 2,
    )  # fmt: skip
    assert status == 0
    assert json.loads(out)["stats"]["slots_per_layer"] == 64


@pytest.fixture
def instruct(own_store):
    """A store whose tokenizer has a chat template."""
    return tiny_tokenizer.give(own_store, chat_template=tiny_tokenizer.CHAT)


@pytest.mark.parametrize(
    ("options", "expected"), [((), "[hello]>"), (("--raw",), "hello")], ids=["chat", "raw"]
)
def test_an_instruct_model_is_prompted_through_its_template(
    capfd, instruct, tmp_path, options, expected
):
    ids = [1, *tiny_tokenizer.ids_of(expected)]
    command = ("generate", instruct, "--prompt", "hello", "--max-new-tokens", 3, *options)
    status, out, _ = run(capfd, *command, "--json")
    assert (status, json.loads(out)["token_ids"][: len(ids)]) == (0, ids)
    status, out, _ = run(capfd, *command)
    assert (status, "hello" in out) == (0, bool(options))  # of a chat only the answer is shown
    (tmp_path / "p.txt").write_text("hello\n")
    trace_path = tmp_path / "t.npz"
    status, _, _ = run(
        capfd, "record", instruct, "--prompts", tmp_path / "p.txt", "--out", trace_path,
        "--max-new-tokens", 0, *options,
    )  # fmt: skip
    assert (status, len(trace.load(trace_path).experts)) == (0, len(ids))


def test_the_tokenizer_is_loaded_before_the_model(capfd, own_store, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flashmoe.engines.transformers.loading.load", lambda *_, **__: pytest.fail("loaded")
    )
    assert "holds no tokenizer" in refused(capfd, "generate", own_store, "--prompt", "x")
    (tmp_path / "p.txt").write_text("x")
    record = ("record", own_store, "--prompts", tmp_path / "p.txt", "--out")
    assert "holds no tokenizer" in refused(capfd, *record, tmp_path / "t.npz")
    tiny_tokenizer.give(own_store)
    assert "prompt is empty" in refused(capfd, "generate", own_store, "--prompt", "")


def test_the_default_budget_is_what_memory_is_free(capfd, demo_store, tmp_path, monkeypatch):
    monkeypatch.setattr("flashmoe.memory.free_memory.budget_bytes", lambda *_: 9 << 20)
    monkeypatch.setattr("flashmoe.engines.follower.Follower.start", lambda _: None)
    options = ("--prompt", PROMPT, "--max-new-tokens", 2, "--json")
    status, out, _ = run(capfd, "generate", demo_store, *options)
    assert (status, json.loads(out)["stats"]["slots_per_layer"]) == (0, 11.5)
    (tmp_path / "p.txt").write_text(PROMPT)
    monkeypatch.setattr("flashmoe.memory.free_memory.budget_bytes", lambda *_: 1 << 10)
    options = ("--prompts", tmp_path / "p.txt", "--out", tmp_path / "t.npz")
    assert "too small" in refused(capfd, "record", demo_store, *options)


def test_what_a_terminal_cannot_show_is_no_traceback(demo_store):
    command = [sys.executable, "-m", "flashmoe", "generate", demo_store, "--prompt", "\N{SNOWMAN}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "--max-new-tokens", "1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"\u2603")
