"""llama-bench as the clock: random tokens, so no output to compare and routing as it falls."""

from __future__ import annotations

import json
import sys
from typing import Any

from harness.runs.gguf_systems import BENCH, System, Work, capped_program
from harness.runs.gguf_systems.server_process import compile_ours


def _run(work: Work, *before: str) -> dict[str, Any]:
    command = [
        *before, str(work.programs / "llama-bench"), "-m", str(work.model), "-o", "json",
        "-p", str(len(work.prompt)), "-n", str(work.new_tokens), "-t", str(work.threads),
        "-r", "1", "--no-warmup", "-ngl", "0", "--repack", "0",
    ]  # fmt: skip
    outcome, done, peak = capped_program.run(command, work.cap_bytes)
    result: dict[str, Any] = {"outcome": outcome, "peak_memory_bytes": peak}
    if outcome != "ok":
        return result
    rates = {row["n_gen"] > 0: row["avg_ts"] for row in json.loads(done.stdout)}
    return result | {
        "tokens_per_second": rates[True],
        "prompt_seconds": len(work.prompt) / rates[False],
    }


def _run_ours(work: Work) -> dict[str, Any]:
    compile_ours()
    return _run(work, sys.executable, "-m", "flashmoe", "run", "--memory", "auto")


SYSTEMS = (
    System("llama-bench --repack 0", _run, clock=BENCH),
    System("flashmoe run llama-bench", _run_ours, clock=BENCH, is_ours=True),
)
