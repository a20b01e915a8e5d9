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


def main(job: dict[str, Any]) -> dict[str, Any]:
    from flashmoe.engines.llama.hosts import xllamacpp as host

    def answers(server: Any) -> list[dict[str, Any]]:
        return [llama_server.ask(server.listening_address, prompt) for prompt in job["prompts"]]

    parameters = llama_server.PARAMETERS | {"n_parallel": 1}
    plain = answers(llama_server.serve_plain(job["model"], **parameters))
    first, *others = job["budgets"]
    server, attachment = host.serve(
        Path(job["model"]), memory=first, policy=job["policy"], **parameters
    )
    rounds = [{"answers": answers(server), "stats": attachment.engine.stats()}]
    for budget in others:
        attachment.engine.resize(budget)
        rounds.append({"answers": answers(server), "stats": attachment.engine.stats()})
    manifest = attachment.engine.experts.manifest
    layers = [[layer.n_experts, layer.extent_bytes] for layer in manifest.layers]
    return {"plain": plain, "rounds": rounds, "layers": layers, "top_k": manifest.top_k}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the servers' threads go on
