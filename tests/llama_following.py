"""Asks a server at memory="auto" while what is free changes: `llama_following.py JOB`.

JOB is a JSON object. model: a GGUF file. llama.cpp is asked alone first. Prints a JSON object:
rounds of questions, wrong: answers that were others; followed: the budget came where it should.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_server

from flashmoe.engines.llama.engine import LlamaEngine
from flashmoe.memory import following, free_memory

PROMPTS = ["a", "x1y2z3 " * 60]
WITHIN_SECONDS = 30.0


def main(job: dict[str, Any]) -> dict[str, Any]:
    from flashmoe.engines.llama.hosts import xllamacpp as host

    model = Path(job["model"])
    parameters = llama_server.PARAMETERS | {"n_parallel": 1}
    plain = llama_server.serve_plain(str(model), **parameters)
    expected = [llama_server.ask(plain.listening_address, prompt) for prompt in PROMPTS]

    size = model.stat().st_size
    attachments: list[Any] = []
    others = [0]

    def available_bytes() -> int:
        engine = attachments[0].engine if attachments else None
        return max(0, size * 2 - others[0] - (engine.present_bytes if engine else 0))

    free_memory.available_bytes = available_bytes
    following.CALM_SECONDS, following.STEP_SECONDS = 0.05, 0.005
    following.LATEST_SECONDS, following.SOONEST_SECONDS = 0.005, 0.002
    LlamaEngine.reserve_bytes = size // 8
    server, attachment = host.serve(model, memory="auto", policy="learned", **parameters)
    attachments.append(attachment)

    def ask() -> list[dict[str, Any]]:
        return [llama_server.ask(server.listening_address, prompt) for prompt in PROMPTS]

    rounds = [ask()]
    engine = attachment.engine
    followed, experts = True, engine.most_bytes
    with ThreadPoolExecutor(1) as thread:
        answer: Future[list[dict[str, Any]]] = thread.submit(ask)
        for share, least, most in ((1.4, 0, 0.7), (0, 0.9, 9), (1.6, 0, 0.6), (0, 0.9, 9)):
            others[0] = int(share * size)
            until = time.monotonic() + WITHIN_SECONDS
            asked = len(rounds)
            while (
                len(rounds) < asked + 2
                or not least * experts <= engine.memory_bytes <= most * experts
            ):
                if time.monotonic() > until:
                    followed = False
                    break
                if answer.done():
                    rounds.append(answer.result())
                    answer = thread.submit(ask)
                time.sleep(0.001)
        rounds.append(answer.result())
    engine.follower.stop()
    rounds.append(ask())
    files = engine.experts.files
    return {
        "rounds": len(rounds), "wrong": [one for one in rounds if one != expected],
        "followed": followed, "stats": engine.stats(),
        "beside_bytes": engine.experts.manifest.dense_bytes + engine.experts.edge_bytes,
        "rss_bytes": sum(llama_server.resident_bytes(f.base, f.base + f.size_bytes) for f in files),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the servers' threads go on
