"""Asks one model the same at several budgets, in a process of its own: `llama_budgets.py JOB`.

JOB is a JSON object. model: a GGUF file; policy; prompts; budgets: of bytes, the first of which the
model is loaded with. llama.cpp is asked alone first. Prints a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_server


def measure(attachment: Any, server: Any, prompts: list[str]) -> dict[str, Any]:
    """Answers, and what the model takes of memory after them."""
    answers = [llama_server.ask(server.listening_address, prompt) for prompt in prompts]
    result: dict[str, Any] = {"answers": answers}
    if attachment:
        files = attachment.engine.experts.files
        result["stats"] = attachment.engine.stats()
        result["rss_bytes"] = sum(
            llama_server.resident_bytes(file.base, file.base + file.size_bytes) for file in files
        )
    return result


def main(job: dict[str, Any]) -> dict[str, Any]:
    from flashmoe.engines.llama.hosts import xllamacpp as host

    parameters = llama_server.PARAMETERS | {"n_parallel": 1}
    plain = measure(None, llama_server.serve_plain(job["model"], **parameters), job["prompts"])
    first, *others = job["budgets"]
    server, attachment = host.serve(
        Path(job["model"]), memory=first, policy=job["policy"], **parameters
    )
    rounds = [measure(attachment, server, job["prompts"])]
    for budget in others:
        attachment.engine.resize(budget)
        rounds.append(measure(attachment, server, job["prompts"]))
    manifest = attachment.engine.experts.manifest
    layers = [[layer.n_experts, layer.extent_bytes] for layer in manifest.layers]
    return {
        "plain": plain["answers"], "rounds": rounds, "layers": layers, "top_k": manifest.top_k,
        "dense_bytes": manifest.dense_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the servers' threads go on
