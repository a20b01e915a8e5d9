"""AirLLM on the CPU: transformers' model, a decoder layer's weights loaded when it runs.

It comes with a transformers of its own time (4.57.6 for models with experts), hence in an
environment of its own.
"""

from __future__ import annotations

from typing import Any

from harness.runs import peers
from harness.runs.job import Job

FILES = peers.CHECKPOINT


def run(job: Job) -> dict[str, Any]:
    return peers.decode(
        job, _load, "a decoder layer at a time, loaded when it runs, the next one beside it"
    )


def _load(job: Job) -> peers.Forward:
    import airllm
    import torch

    model = airllm.AutoModel.from_pretrained(str(job.checkpoint), device="cpu")
    cache = None

    @torch.inference_mode()
    def forward(tokens: list[int]) -> int:
        nonlocal cache
        output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    return forward


if __name__ == "__main__":
    peers.program(run, "airllm")
