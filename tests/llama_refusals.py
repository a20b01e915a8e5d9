"""Serves models under the cache where it can, in a process of its own: `llama_refusals.py JOB`.

JOB is a JSON object. models: GGUF files; prompt. Prints a JSON object: the sentence by which each
was refused, or its answer and the one of llama.cpp alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_server

from flashmoe.engines.llama.hosts import xllamacpp as host
from flashmoe.errors import FlashMoEError


def main(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for model in job["models"]:
        try:
            server, _ = host.serve(
                Path(model), memory="64MiB", policy="lru", **llama_server.PARAMETERS
            )
        except FlashMoEError as error:
            found[model] = {"refused": str(error)}
            continue
        plain = llama_server.serve_plain(model, **llama_server.PARAMETERS)
        found[model] = {
            name: llama_server.ask(one.listening_address, job["prompt"])
            for name, one in (("answer", server), ("plain", plain))
        }
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the servers' threads go on
