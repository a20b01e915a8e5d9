"""Bad input to any command is one sentence and a non-zero status."""

from __future__ import annotations

import shutil

import pytest
import tiny_tokenizer
from command_line import refused

import flashmoe
from flashmoe import cli
from flashmoe.store import manifest


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
