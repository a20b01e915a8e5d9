"""The command line: what it prints, and that bad input is one sentence and a non-zero status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import tiny_tokenizer
import torch
import transformers

import flashmoe
from flashmoe import cli, policies, trace
from flashmoe.cache import simulate
from flashmoe.engines.transformers.checkpoints import named_models
from flashmoe.store import manifest

PROMPT = "And it came to pass"


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return status, out, err


def refused(capfd, *arguments: object) -> str:
    """The one sentence of a command that must fail."""
    status, out, err = run(capfd, *arguments)
    assert status == 1
    assert not out
    said = [line for line in err.splitlines() if line.startswith("flashmoe: ")]
    assert len(said) == 1, err
    assert "Traceback" not in err
    return said[0]


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
        capfd, "simulate", out, "--policy", "learned", "--capacity", 12 / 64, "--warm",
        "--as-recorded", "--json",
    )  # fmt: skip
    (row,) = json.loads(json_out)
    assert (status, row["slots"]) == (0, 12)
    assert f"{row['hits']} hits of {row['requests']}" in said


def test_simulate_prints_every_policy_and_capacity(capfd, tmp_path):
    path = tmp_path / "part.npz"
    trace.load(flashmoe.demo_routing_path()).first(600).save(path)
    arguments = ["simulate", path, "--capacity", 0.25, 0.5, "--policy"]
    names = [name for name in policies.available() if "bypass" not in name]
    status, out, _ = run(capfd, *arguments, *names, "--json")
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


def test_a_killed_replay_leaves_no_process_behind():
    command = [sys.executable, "-m", "flashmoe", "simulate", flashmoe.demo_routing_path()]
    main = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(workers := main.children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(workers) >= 2  # who forks, and whom it forked
    time.sleep(1)
    main.kill()
    main.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_policies_lists_the_registry(capfd):
    status, out, _ = run(capfd, "policies")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(policies.available())


def test_bad_input_is_one_sentence(capfd, checkpoints, own_store, tmp_path):
    prompt = ("--prompt", "x")
    tiny_tokenizer.give(own_store)  # it is loaded before the model
    assert "too small" in refused(capfd, "generate", own_store, *prompt, "--memory", "1KiB")
    assert "is not a size" in refused(capfd, "generate", own_store, *prompt, "--memory", "many")
    assert "no policy" in refused(capfd, "generate", own_store, *prompt, "--policy", "mru")
    assert "at least 1" in refused(capfd, "generate", own_store, *prompt, "--max-new-tokens", 0)
    assert "no such directory" in refused(capfd, "generate", tmp_path / "none", *prompt)
    assert "is not a store" in refused(capfd, "verify", tmp_path)
    assert "no config.json" in refused(capfd, "pack", tmp_path, tmp_path / "s")
    assert "--quant int8" in refused(capfd, "pack", checkpoints(), tmp_path / "s", "--quant=int4")
    assert "is a file" in refused(capfd, "pack", checkpoints(), own_store / "config.json")
    assert "no such file" in refused(capfd, "simulate", tmp_path / "t.npz")
    routing = flashmoe.demo_routing_path()
    assert "capacity" in refused(capfd, "simulate", routing, "--capacity", "7")
    assert "no model is called" in refused(capfd, "synth", "gpt-5", tmp_path / "s")
    assert "not empty" in refused(capfd, "synth", "olmoe-1b-7b", own_store)
    record = ("record", own_store, "--prompts")
    assert "cannot be read" in refused(capfd, *record, tmp_path / "p", "--out", tmp_path / "t.npz")
    (tmp_path / "p").write_text("\n\n")
    assert "at least one" in refused(capfd, *record, tmp_path / "p", "--out", tmp_path / "t.npz")
    assert "must end in .npz" in refused(capfd, *record, tmp_path / "p", "--out", tmp_path / "t")


def test_a_missing_shard_and_a_flipped_byte_are_one_sentence(
    capfd, checkpoints, own_store, tmp_path
):
    bad = tmp_path / "bad"
    shutil.copytree(checkpoints(), bad)
    sorted(bad.glob("*.safetensors"))[0].unlink()
    assert "is missing" in refused(capfd, "pack", bad, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    path = own_store / manifest.load(own_store).experts_file
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert "expert 0 of" in refused(capfd, "verify", own_store)


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


def test_a_synthetic_store_needs_no_checkpoint(capfd, tmp_path, monkeypatch):
    small = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    monkeypatch.setitem(named_models.MODELS, "tiny", named_models.MODELS["olmoe-1b-7b"] | small)
    status, _, _ = run(capfd, "synth", "tiny", tmp_path / "store", "--store")
    assert status == 0
    assert run(capfd, "verify", tmp_path / "store")[0] == 0
    model = flashmoe.load(tmp_path / "store", memory="1MiB")
    assert model(torch.arange(4)[None]).logits.isfinite().all()
    model.flashmoe.close()
    assert "not empty" in refused(capfd, "synth", "tiny", tmp_path / "store", "--store")
    assert named_models.total_bytes("tiny") == sum(p.numel() for p in model.parameters()) * 2


@pytest.mark.parametrize("name", sorted(named_models.MODELS))
def test_the_named_models_have_their_published_size(name):
    """Billions of parameters, as their cards say."""
    published = {
        "olmoe-1b-7b": 6.9, "deepseek-v2-lite": 15.7, "gpt-oss-20b": 20.9,
        "qwen3-30b-a3b": 30.5, "mixtral-8x7b": 46.7,
    }  # fmt: skip
    if name in published:
        assert named_models.total_bytes(name) / 2e9 == pytest.approx(published[name], rel=0.01)


def test_a_full_disk_while_synthesising_is_one_sentence(capfd, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "1.0 MiB free" in refused(capfd, "synth", "olmoe-1b-7b", tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_simulate_refuses_before_it_starts(capfd, monkeypatch):
    monkeypatch.setattr(simulate, "replay", lambda *_: pytest.fail("started"))
    routing = flashmoe.demo_routing_path()
    assert "no policy" in refused(capfd, "simulate", routing, "--policy", "lru", "mru")


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
    options = ("--prompt", PROMPT, "--max-new-tokens", 2, "--json")
    status, out, _ = run(capfd, "generate", demo_store, *options)
    assert (status, json.loads(out)["stats"]["slots_per_layer"]) == (0, 12)
    (tmp_path / "p.txt").write_text(PROMPT)
    monkeypatch.setattr("flashmoe.memory.free_memory.budget_bytes", lambda *_: 1 << 10)
    options = ("--prompts", tmp_path / "p.txt", "--out", tmp_path / "t.npz")
    assert "too small" in refused(capfd, "record", demo_store, *options)


def test_wrong_kinds_of_paths_are_one_sentence(capfd, checkpoints, own_store, tmp_path):
    tiny_tokenizer.give(own_store)
    file, folder, long = tmp_path / "file", tmp_path / "folder", tmp_path / ("x" * 300)
    file.write_bytes(b"\xff\x00junk")
    folder.mkdir()
    (tmp_path / "loop").symlink_to("loop")
    prompts = tmp_path / "p.txt"
    prompts.write_text("x")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    routing = flashmoe.demo_routing_path()
    for path in (file, folder, long, tmp_path / "loop", file / "below", "", "bad\udcffname"):
        refused(capfd, "generate", path, "--prompt", "x")
        refused(capfd, "record", path, "--prompts", prompts, "--out", tmp_path / "t.npz")
        refused(capfd, "record", own_store, "--prompts", path, "--out", tmp_path / "t.npz")
        refused(capfd, "verify", path)
        refused(capfd, "pack", path, tmp_path / "s")
        refused(capfd, "simulate", path)
        refused(capfd, "simulate", routing, "--policy", f"static:{path}")
        refused(capfd, "simulate", routing, "--policy", f"learned:{path}")
        refused(capfd, "train-policy", path, "--out", tmp_path / "p.safetensors")
    for path in (file, long, file / "below"):
        refused(capfd, "pack", checkpoints(), path)
        refused(capfd, "synth", "olmoe-quarter", path)
    for path in (long, file / "t", tmp_path / "none" / "t", tmp_path / "folder"):
        options = ("--prompts", prompts, "--out", f"{path}.npz")
        assert "cannot be written" in refused(capfd, "record", own_store, *options)
        options = ("--out", f"{path}.safetensors")
        assert "cannot be written" in refused(capfd, "train-policy", routing, *options)
    for path in (folder, long, file / "below", tmp_path / "none" / "kept"):
        options = ("--prompt", "x", "--warm", path)
        assert "cannot be written" in refused(capfd, "generate", own_store, *options)
    options = ("--prompt", "x", "--warm", file)
    assert "keeps a cache warm" in refused(capfd, "generate", own_store, *options)
    assert not any(path.suffix == ".partial" for path in tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '"abc"'), ("a.json", "5"), ("a.json", "[" * 99999), ("a.json", '{"a": 5}'),
        ("a.json", "[[]]"), ("a.json", '["\\ud800"]'), ("a.json", "{"), ("a.txt", "\n"),
    ],
)  # fmt: skip
def test_prompts_that_are_none_are_one_sentence(capfd, own_store, tmp_path, name, content):
    tiny_tokenizer.give(own_store)
    (tmp_path / name).write_text(content)
    options = ("--prompts", tmp_path / name, "--out", tmp_path / "t.npz")
    assert "prompt" in refused(capfd, "record", own_store, *options)


def test_numbers_that_are_none_are_refused(capfd, own_store, tmp_path):
    prompt = ("--prompt", "x")
    tiny_tokenizer.give(own_store)
    for size in ("9" * 400, "9" * 5000, "1e9", "-1", "nan", ""):
        assert "is not a size" in refused(capfd, "generate", own_store, *prompt, f"--memory={size}")
    options = ("--prompts", own_store / "config.json", "--out", tmp_path / "t.npz")
    assert "0 or more" in refused(capfd, "record", own_store, *options, "--max-new-tokens", "-1")
    for number in ("-1", str(1 << 63), "x"):
        with pytest.raises(SystemExit):
            cli.main(["synth", "olmoe-quarter", str(tmp_path / "s"), "--seed", number])
        assert "argument --seed: invalid seed value" in capfd.readouterr().err


def test_what_a_terminal_cannot_show_is_no_traceback(demo_store):
    command = [sys.executable, "-m", "flashmoe", "generate", demo_store, "--prompt", "\N{SNOWMAN}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "--max-new-tokens", "1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"\u2603")


def test_synthesising_removes_nothing_that_it_did_not_make(capfd, tmp_path, monkeypatch):
    small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    monkeypatch.setitem(named_models.MODELS, "tiny", named_models.MODELS["olmoe-1b-7b"] | small)
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "mine").touch()
    assert run(capfd, "synth", "tiny", tmp_path / "s")[0] == 0
    assert (tmp_path / "s.partial" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "s.partial"]
