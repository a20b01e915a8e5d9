"""llama.cpp on the CPU, through llama-cpp-python: the GGUF memory-mapped, as its users run it.

By default it rearranges 4-bit weights at load, into memory of its own, and multiplies faster for
it. Where the cap does not hold them all that gets it killed (OLMoE's 4.6 GB under 3.5), so there
it is told not to, as its users can tell it (`--no-repack`).
"""

from __future__ import annotations

import os
from typing import Any

from harness.runs import peers
from harness.runs.job import Job

FILES = peers.GGUF


def run(job: Job) -> dict[str, Any]:
    residency = "memory-mapped, in the page cache as the kernel likes (llama.cpp's default)"
    return peers.decode(job, _load, residency if _holds_all(job) else f"{residency}, not repacked")


def _holds_all(job: Job) -> bool:
    return job.cap_bytes is None or job.checkpoint.stat().st_size < job.cap_bytes


def _load(job: Job) -> peers.Forward:
    import llama_cpp
    import numpy as np

    if not _holds_all(job):
        _do_not_repack()
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


def _do_not_repack() -> None:
    """Llama() has no argument for it, so that the defaults that it begins with are changed."""
    from llama_cpp import llama_cpp as bindings

    defaults = bindings.llama_model_default_params

    def changed() -> object:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    bindings.llama_model_default_params = changed


if __name__ == "__main__":
    peers.program(run, "llama_cpp")
