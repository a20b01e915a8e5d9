"""Asks models questions of llama.cpp alone, in a process of its own: `llama_plain.py JOB`.

JOB is a JSON object. models: GGUF files; prompts; or bodies: of chats. Prints a JSON object: the
answers by file.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import llama_server

from harness.runs import llama_client


def main(job: dict[str, Any]) -> dict[str, list[dict[str, object]]]:
    answers = {}
    for model in job["models"]:
        server = llama_server.serve_plain(model, **llama_server.PARAMETERS)
        address = server.listening_address
        answers[model] = [llama_server.ask(address, prompt) for prompt in job.get("prompts", ())]
        for body in job.get("bodies", ()):
            answers[model].append(llama_client.post(address, "/v1/chat/completions", body))
    return answers


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the servers' threads go on
