"""llama.cpp on the CPU, through llama-cpp-python: the GGUF memory-mapped, as its users run it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import peers
from harness.job import Job

if TYPE_CHECKING:
    from flashmoe.store.pack import Source


def write(source: Source, path: Path, scheme: str) -> None:
    """As `gguf_file.write`."""
    from harness import gguf_file

    gguf_file.write(source, path, scheme)


def run(job: Job) -> dict[str, Any]:
    return peers.decode(
        job, _load, "memory-mapped, in the page cache as the kernel likes (llama.cpp's default)"
    )


def _load(job: Job) -> peers.Forward:
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        str(job.checkpoint),
        n_ctx=job.prompt_tokens + job.tokens,
        n_batch=job.prompt_tokens,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        verbose=False,
    )

    def forward(tokens: list[int]) -> int:
        model.eval(tokens)
        logits = llama_cpp.llama_get_logits(model.ctx)  # of the last token
        return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    return forward


if __name__ == "__main__":
    peers.program(run, "llama_cpp")
