"""A GPU computes all but decode's experts: unmodified llama-server, `-ngl 99 --cpu-moe`.

A long prompt's experts go there too, as copies that llama.cpp makes while it computes.

FLASHMOE_LLAMA_GPU_BIN is a folder with a build for Vulkan (`nox -s gpu`). Mesa's software device
will do: what matters is that choices and hidden states lie in a device's memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil

import gguf_models
import pytest

from flashmoe.engines.llama.files import writer
from harness.torture.llama_server import ALIKE, Server, under_flashmoe

PROMPTS = ["a", "hello world, this is a prompt. " * 3, "x1y2z3 " * 60]
# Mesa 22 does not survive flash attention; the level says which device has which tensors.
ON_GPU = ("--cpu-moe", "-c", "2048", "-np", "1", "-fa", "off", "-ngl", "99", "-lv", "4")


@pytest.fixture(scope="module")
def program():
    folder = os.environ.get("FLASHMOE_LLAMA_GPU_BIN")
    if not folder:
        pytest.skip("FLASHMOE_LLAMA_GPU_BIN does not name a folder with a build for a GPU")
    return shutil.which("llama-server", path=folder)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The software device counts; no kernel joins the nodes that FlashMoE looks between."""
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("GGML_VK_DISABLE_FUSION", "1")


@pytest.mark.parametrize(("family", "quantise"), [("qwen3_moe", "q8_0"), ("gpt_oss", "mxfp4_moe")])
def test_tokens_and_probabilities_are_its_own(program, tmp_path, family, quantise):
    (model,) = writer.write(gguf_models.weights(family), tmp_path / "model.gguf", quantise)
    answers = []
    for cached in (False, True):
        command = [program, "-m", model, *ALIKE]
        if cached:
            memory_bytes = model.stat().st_size // 2
            command = [*under_flashmoe(memory_bytes, "--stats", policy="learned"), *command]
        with Server(command, tmp_path / f"log-{cached}", arguments=ON_GPU) as server:
            answers.append([server.ask(prompt) for prompt in PROMPTS])
            assert re.search(r"Vulkan0 model buffer size = +[1-9]", server.words())
            assert server.stop() == 0
    assert answers[0] == answers[1]
    stats = json.loads(server.words().splitlines()[-1])
    assert stats["slots_per_layer"] < gguf_models.EXPERTS
    assert stats["requests"] > stats["hits"] > 0
