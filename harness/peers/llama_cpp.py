"""llama.cpp on the CPU, through llama-cpp-python: the GGUF memory-mapped, as its users run it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import peers
from harness.clock import Clock
from harness.job import FIRST_TOKEN, Job

if TYPE_CHECKING:
    from flashmoe.store.pack import Source


def write(source: Source, path: Path, scheme: str) -> None:
    """As `gguf_file.write`."""
    from harness import gguf_file

    gguf_file.write(source, path, scheme)


def run(job: Job) -> dict[str, Any]:
    """Load, prefill, warm up, then decode `new_tokens` under the clock, greedily, batch 1."""
    import llama_cpp
    import numpy as np

    started = time.perf_counter()
    model = llama_cpp.Llama(
        str(job.checkpoint),
        n_ctx=job.prompt_tokens + job.tokens,
        n_batch=job.prompt_tokens,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        verbose=False,
    )
    load_seconds = time.perf_counter() - started

    def likeliest() -> int:
        logits = llama_cpp.llama_get_logits(model.ctx)  # of the last token
        return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    tokens = list(range(FIRST_TOKEN, FIRST_TOKEN + job.prompt_tokens))
    clock = Clock(job)
    clock.start()
    model.eval(tokens)
    tokens.append(likeliest())
    clock.token()
    while clock.tokens < job.tokens and not clock.enough:
        model.eval(tokens[-1:])
        tokens.append(likeliest())
        clock.token()
    figures = clock.figures()
    model.close()
    return {
        "system": job.system,
        "residency": "memory-mapped, in the page cache as the kernel likes (llama.cpp's default)",
        "memory_bytes": None,
        "slots": None,
        "shared": None,
        "load_seconds": load_seconds,
        "token_ids": tokens,
        "prompt_tokens": job.prompt_tokens,
    } | figures


if __name__ == "__main__":
    peers.program(run, "llama_cpp")
