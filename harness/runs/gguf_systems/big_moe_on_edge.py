"""BigMoeOnEdge's bmoe-cli: a cache of experts on llama.cpp's public interface, in C++."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from harness.runs.gguf_systems import System, Work, capped_program

PROGRAM = "FLASHMOE_BMOE_CLI"
_MIB = 1 << 20
# What it gets beside dense part and cache: for itself, its KV cache and its buffers; more where the
# limit kills it.
_BESIDE_BYTES = (320 * _MIB, 640 * _MIB, 1280 * _MIB)
_PROGRESS = "BMOE_PROGRESS "


def _run(work: Work) -> dict[str, Any]:
    for beside_bytes in _BESIDE_BYTES:
        result = _run_with(work, beside_bytes)
        if result["outcome"] != "out of memory":
            break
    return result


def _run_with(work: Work, beside_bytes: int) -> dict[str, Any]:
    size = work.model.stat().st_size
    # its own `auto` looks at the machine, not at the limit
    room = (work.cap_bytes - work.dense_bytes - beside_bytes) if work.cap_bytes else size
    command = [
        os.environ[PROGRAM], "-m", str(work.model), "-n", str(work.new_tokens),
        "-p", "".join(f"<|{token}|>" for token in work.prompt),  # as the file's vocabulary has it
        "-t", str(work.threads), "-c", str(work.context_tokens), "--ubatch", "512", "--moe-stream",
        "--cache-mb", str(max(room // _MIB, 1)), "--force-cache", "--progress",
    ]  # fmt: skip
    outcome, done, peak = capped_program.run(command, work.cap_bytes)
    result: dict[str, Any] = {"outcome": outcome, "peak_memory_bytes": peak}
    return result | figures(done.stdout) if outcome == "ok" else result


def figures(output: str) -> dict[str, Any]:
    """Of what `--progress` prints, a line a token.

    It prints text only: tokens that a byte stands for are not among `token_ids`.
    """
    tokens = [
        json.loads(line.removeprefix(_PROGRESS))
        for line in output.splitlines()
        if line.startswith(_PROGRESS)
    ]
    seconds = sum(token["wall_ms"] for token in tokens) / 1e3
    text = "".join(token["delta_text"] for token in tokens)
    return {
        "tokens_per_second": len(tokens) / seconds,
        "bytes_per_token": sum(token["read_mb"] for token in tokens) * _MIB / len(tokens),
        "hit_rate": tokens[-1]["cache_hit_pct"] / 100,
        "token_ids": [int(number) for number in re.findall(r"<\|(\d+)\|>", text)],
    }


SYSTEMS = (System("BigMoeOnEdge", _run, program=PROGRAM),)
