"""An engine that speaks the referee's protocol (docs/engines.md): llama.cpp, by xllamacpp.

Copy it and put your own engine where llama.cpp is. It imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import xllamacpp


def load(asked: dict[str, Any]) -> xllamacpp.Server:
    """The file mapped, no warm-up: nothing is read ahead of the clock."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["file"]
    parameters.n_ctx = asked["context_tokens"]
    parameters.cpuparams.n_threads = asked["threads"]
    parameters.n_parallel, parameters.n_gpu_layers, parameters.verbosity = 1, 0, 0
    parameters.warmup = parameters.fit_params = False
    parameters.no_extra_bufts = True  # repacked weights would not fit a limit below the file
    return xllamacpp.Server(parameters)


def tokens(server: xllamacpp.Server, prompt: list[int], new_tokens: int) -> Iterator[int]:
    """Greedy, one request a token: so none is held back. Nothing is kept from an earlier prompt."""
    ids = list(prompt)
    for number in range(new_tokens):
        body = {
            "prompt": ids, "n_predict": 1, "temperature": 0, "ignore_eos": True,
            "return_tokens": True, "cache_prompt": number > 0,
        }  # fmt: skip
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            ids += json.load(answer)["tokens"]
        yield ids[-1]


def say(kind: str, **fields: Any) -> None:
    print(json.dumps({"say": kind} | fields), flush=True)


def main() -> None:
    server = None
    for line in sys.stdin:
        asked, started = json.loads(line), time.perf_counter()
        if asked["ask"] == "hello":
            version = xllamacpp.__version__
            say("hello", protocol=1, name="llama.cpp", version=version, formats=["gguf"])
        elif asked["ask"] == "load":
            server = load(asked)
            say("loaded", seconds=time.perf_counter() - started)
        elif asked["ask"] == "run":
            for token in tokens(server, asked["token_ids"], asked["new_tokens"]):
                say("token", token=token, seconds=time.perf_counter() - started)
            say("done")
        else:
            break
    os._exit(0)  # the server's threads go on


if __name__ == "__main__":
    main()
