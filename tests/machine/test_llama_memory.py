"""llama.cpp's server keeps a real limit, page cache included, and never maps its model's file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashmoe.errors import FlashMoEError
from harness import tiny_gguf
from harness.runs.memory_cap import memory_cap
from harness.runs.page_cache import cached_bytes
from harness.torture.llama_server import Server

MIB = 1 << 20
SLACK_BYTES = 24 * MIB  # what two runs of the same server differ by
PROMPTS = ["a", "x1y2z3 " * 60, "hello world, this is a prompt. " * 3]
LEAST, MOST = 32 * MIB, 92 * MIB  # of 96; a prompt may need all 24 MiB of a layer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return tiny_gguf.write(path, scheme="none", num_experts=32, intermediate_size=512)


def run(model: Path, memory_bytes: int, limit_bytes: int | None, log: Path):
    """Tokens, and the kernel's peak."""
    with memory_cap(limit_bytes) as cap:
        if cap is None:
            pytest.skip("no memory cgroup can be made here")
        command = [sys.executable, "-m", "harness.torture.llama_child", model, str(memory_bytes)]
        with Server(command, log, before=cap.enter) as server:
            tokens = [server.ask(prompt)["tokens"] for prompt in PROMPTS]
            assert str(model) not in Path(f"/proc/{server.process.pid}/maps").read_text()
            assert cached_bytes(model) < MIB  # llama.cpp itself reads the file's head
            return tokens, cap.peak_bytes()


def test_more_memory_is_used_only_as_given(model, tmp_path):
    log = tmp_path / "log"
    run(model, LEAST, None, log)  # fills the page cache with Python's own files
    expected, floor_bytes = run(model, LEAST, None, log)

    # exactly as much more as was given, and the kernel kills whoever takes more
    limit_bytes = floor_bytes + (MOST - LEAST) + SLACK_BYTES
    tokens, peak_bytes = run(model, MOST, limit_bytes, log)
    assert tokens == expected
    assert peak_bytes <= limit_bytes

    # and the limit is real: with half of the budget's room the server is killed
    with pytest.raises((FlashMoEError, OSError)):
        run(model, MOST, floor_bytes + (MOST - LEAST) // 2 - SLACK_BYTES, log)
