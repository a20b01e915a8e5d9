"""The commands on a GGUF file: generate, record and verify."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import gguf_models
import pytest
from command_line import refused, run

from flashmoe import trace
from flashmoe.engines.llama.files import writer
from flashmoe.residency import prefetch

needs_llama_cpp = pytest.mark.skipif(not find_spec("llama_cpp"), reason="needs llama-cpp-python")


def test_verify_says_what_is_right(capfd, gguf_files):
    for family, scheme in (("olmoe", "int4"), ("qwen3_moe", "int8"), ("olmoe", "none")):
        status, out, _ = run(capfd, "verify", gguf_files(family, scheme))
        assert (status, "12 of them experts', lie in the file" in out) == (0, True)


def test_verify_compares_every_byte_of_a_copy(capfd, gguf_files, parts, tmp_path):
    for path in (gguf_files(), parts[0]):
        folder = tmp_path / f"copy of {path.stem}"
        folder.mkdir()
        files = parts if path == parts[0] else [path]
        copies = [Path(shutil.copy(file, folder)) for file in files]
        for also in (copies[0], folder):
            status, out, _ = run(capfd, "verify", path, "--also", also)
            assert (status, "every byte is the same in 2 copies" in out) == (0, True)
        content = bytearray(copies[-1].read_bytes())
        content[-100] ^= 1
        copies[-1].write_bytes(content)
        said = refused(capfd, "verify", path, "--also", copies[0])
        assert f"{copies[-1]} is not the same file as {files[-1]}" in said


def damaged(content: bytes, *, what: str) -> bytes:
    changed = bytearray(content)
    if what == "cut":
        return content[:-100]
    if what == "an infinite scale":  # of a block of 32 weights: a float16, and 16 bytes
        changed[-18 * 7 : -18 * 7 + 2] = b"\x00\x7c"
    elif what == "the head":
        changed[24:32] = b"\xff" * 8
    elif what == "another file":
        changed[:4] = b"GGML"
    return bytes(changed)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut", "was cut short"), ("an infinite scale", "blk.3.ffn_down_exps.weight holds what"),
        ("the head", "is no GGUF file that"), ("another file", "is no GGUF file that"),
    ],
)  # fmt: skip
def test_verify_names_the_damage(capfd, gguf_files, tmp_path, what, said):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged(gguf_files().read_bytes(), what=what))
    assert said in refused(capfd, "verify", path)


@pytest.fixture
def parts(tmp_path):
    source = gguf_models.weights("olmoe", num_hidden_layers=2)
    return writer.write(source, tmp_path / "model.gguf", "q4_0", split_bytes=1 << 20)


def test_verify_checks_every_part_of_a_split_file(capfd, parts):
    status, out, _ = run(capfd, "verify", parts[0])
    assert (status, f"6 of them experts', lie in its {len(parts)} files" in out) == (0, True)
    whole = parts[-1].read_bytes()
    parts[-1].write_bytes(whole[:-100])
    assert f"{parts[-1]} was cut short" in refused(capfd, "verify", parts[0])
    parts[-1].write_bytes(b"GGML" + whole[4:])
    assert f"{parts[-1]} is no GGUF file" in refused(capfd, "verify", parts[0])
    parts[-1].write_bytes(parts[1].read_bytes())
    said = refused(capfd, "verify", parts[0])
    assert f"{parts[-1]} holds part 2 of {len(parts)}, not what its name says" in said
    parts[-1].unlink()
    assert f"{parts[-1]} is missing" in refused(capfd, "verify", parts[0])
    assert "name the first" in refused(capfd, "verify", parts[1])


def test_a_file_that_is_not_there_is_one_sentence(capfd, tmp_path):
    path = tmp_path / "none.gguf"
    (tmp_path / "p.txt").write_text("x")
    assert "no such file" in refused(capfd, "verify", path)
    assert "no such file" in refused(capfd, "generate", path, "--prompt", "x")
    record = ("record", path, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "t.npz")
    assert "no such file" in refused(capfd, *record)


def test_what_a_gguf_file_cannot_do_is_one_sentence(capfd, gguf_files):
    options = ("--prompt", "x", "--device", "cuda")
    assert "computed on the CPU" in refused(capfd, "generate", gguf_files(), *options)


@needs_llama_cpp
def test_generate_streams_and_begins_where_it_ended(capfd, gguf_files, tmp_path):
    size = gguf_files().stat().st_size
    command = (
        "generate", gguf_files(), "--prompt", "hello world", "--memory", size * 3 // 4,
        "--policy", "lru", "--max-new-tokens", 9, "--warm", tmp_path / "kept.npz",
    )  # fmt: skip
    status, out, _ = run(capfd, *command, "--json")
    cold = json.loads(out)
    assert (status, cold["new_tokens"]) == (0, 9)
    assert cold["token_ids"][:11] == list(b"hello world")
    assert len(cold["token_ids"]) == 20 and cold["text"].startswith("hello world")
    status, out, err = run(capfd, *command)
    assert (status, out.rstrip("\n"), "9 tokens" in err) == (0, cold["text"], True)
    warm = json.loads(run(capfd, *command, "--json")[1])
    assert warm["token_ids"] == cold["token_ids"]
    assert warm["stats"]["misses"] < cold["stats"]["misses"]


@needs_llama_cpp
def test_generate_guesses_no_experts_where_that_is_left_out(capfd, gguf_files, monkeypatch):
    monkeypatch.setattr(prefetch, "PREFETCH_FROM_BYTES", 1)
    command = (
        "generate", gguf_files(), "--prompt", "hello world", "--policy", "lru",
        "--memory", gguf_files().stat().st_size // 2, "--max-new-tokens", 9, "--json",
    )  # fmt: skip
    ahead, chosen = (json.loads(run(capfd, *command, *o)[1]) for o in ((), ("--no-prefetch",)))
    assert ahead["token_ids"] == chosen["token_ids"]
    guessed = [
        one["stats"]["prefetch_used"] + one["stats"]["prefetch_wasted"] for one in (ahead, chosen)
    ]
    assert guessed[0] > 0 == guessed[1]


@needs_llama_cpp
@pytest.mark.parametrize("new_tokens", [0, 5])
def test_record_then_simulate_gives_the_engines_hits(capfd, gguf_files, tmp_path, new_tokens):
    prompts, out = tmp_path / "p.txt", tmp_path / "t.npz"
    prompts.write_text("hello world\nhello there, all of you\n")
    memory = gguf_files().stat().st_size // 2
    record = (
        "record", gguf_files(), "--prompts", prompts, "--out", out, "--memory", memory,
        "--max-new-tokens", new_tokens, "--policy", "lru",
    )  # fmt: skip
    status, said, _ = run(capfd, *record)
    recorded = trace.load(out)
    assert (status, recorded.names()) == (0, ["0", "1"])
    more = max(0, new_tokens - 1)  # the last token is not computed
    lengths = [run.stop - run.start for _, run in recorded.sequences()]
    assert lengths == [11 + more, 23 + more]
    status, rows, _ = run(
        capfd, "simulate", out, "--policy", "lru", "--slots", recorded.info["slots"],
        "--as-recorded", "--warm", "--json",
    )  # fmt: skip
    (row,) = json.loads(rows)
    assert f"{row['hits']} hits of {row['requests']}" in said
    assert row["slots"] < 16 and row["hits"] > 0
    assert "leave out --probabilities" in refused(capfd, *record, "--probabilities")
