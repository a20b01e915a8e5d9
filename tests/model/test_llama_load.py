"""`flashmoe.load` of a GGUF file: a llama_cpp.Llama, its own tokens, and every way to end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import flashmoe
from flashmoe import engines
from harness.tiny_gguf import EXPERTS

TESTS = Path(__file__).parents[1]
needs_llama_cpp = pytest.mark.skipif(not find_spec("llama_cpp"), reason="needs llama-cpp-python")


def run(case: str, model: Path) -> dict:
    """What `llama_loader.py` prints; it ends without a word."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "llama_loader.py"), case, str(model)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_llama_cpp
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_tokens_are_those_of_the_package_alone(gguf_files, family):
    result = run("tokens", gguf_files(family))
    assert all(made == result["plain"] for made in result["made"])
    few, more, everything = result["slots"]
    assert few < more < everything == EXPERTS


@needs_llama_cpp
def test_a_model_ends_in_any_order(gguf_files):
    result = run("endings", gguf_files())
    assert "engine was closed: load the model again" in result["engine closed"]
    assert result["closed"] == "this model was closed: load it again"
    assert result["second"].startswith("close ")
    assert result["same"]
    assert "pickled" in result["pickled"]


@needs_llama_cpp
def test_what_cannot_be_streamed_is_one_sentence(gguf_files):
    result = run("refusals", gguf_files())
    assert "use_mmap=False reads the whole model" in result["mapped"]
    assert "lora_path" in result["lora"]
    assert "Llama has no argument 'device'" in result["unknown"]
    assert "choose one of llama_cpp, ik_llama_cpp" in result["package"]
    assert "too small" in result["small"] and "too small" in result["smaller"]
    assert "Failed to create" in result["context"]
    assert "cut short" in result["cut"] or "no GGUF" in result["cut"]
    assert "no such file" in result["none"]
    assert len(result["after"]) == 12


@needs_llama_cpp
def test_an_automatic_budget_leaves_room_for_scores(gguf_files):
    made = run("automatic", gguf_files())
    (memory_bytes, _), (less_bytes, scores_bytes) = made["last"], made["all"]
    assert memory_bytes - less_bytes == scores_bytes == 1024 * 512 * 4


@needs_llama_cpp
def test_a_failed_read_is_a_sentence_and_the_model_goes_on(gguf_files):
    result = run("failure", gguf_files())
    assert "MoE layer" in result["said"] and "the read failed" in result["said"]
    assert result["made"] == result["plain"]


@pytest.mark.skipif(not find_spec("ik_llama_cpp"), reason="needs ik-llama-cpp-python")
def test_ik_llama_cpps_tokens_are_its_own(gguf_files):
    result = run("ik", gguf_files("qwen3_moe"))
    assert result["made"] == [result["plain"]] * 2
    assert "engine was closed" in result["engine closed"]


def test_a_missing_package_is_one_sentence(gguf_files, monkeypatch):
    from flashmoe.engines.llama.hosts import llama_cpp

    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(flashmoe.FlashMoEError, match=r"pip install 'flashmoe-ssd\[llama\]'"):
        engines.load(gguf_files(), memory="1GiB")
    with pytest.raises(flashmoe.FlashMoEError, match="pip install ik-llama-cpp-python"):
        engines.load(gguf_files(), memory="1GiB", package="ik_llama_cpp")
