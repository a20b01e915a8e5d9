"""Asks models questions of llama.cpp alone, in a process of its own: `llama_plain.py JOB`.

JOB is a JSON object. models: GGUF files; prompts. Prints a JSON object: the answers by file.
"""

from __future__ import annotations

import json
import os
import sys

import llama_server


def main(job: dict[str, list[str]]) -> dict[str, list[dict[str, object]]]:
    answers = {}
    for model in job["models"]:
        server = llama_server.serve_plain(model, **llama_server.PARAMETERS)
        address = server.listening_address
        answers[model] = [llama_server.ask(address, prompt) for prompt in job["prompts"]]
    return answers


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the servers' threads go on
