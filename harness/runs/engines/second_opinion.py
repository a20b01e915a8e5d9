"""What llama.cpp itself says of an answer: at each token, which is likeliest, and is it near.

As a program: `FILE THREADS`, answers as JSON on stdin, opinions on stdout.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flashmoe.errors import FlashMoEError
from harness.runs.llama_client import post

NEAR_NATS = 0.1  # a token at least 90 % as likely as the likeliest: other kernels may choose it
_CONTEXT_STEP = 1024


class Given(NamedTuple):
    """An answer that somebody gave."""

    prompt: list[int]
    tokens: list[int]


class Opinion(NamedTuple):
    """Of one token: llama.cpp's own in its place, and whether it is that or nearly as likely."""

    likeliest: int
    is_near: bool


def opinions(file: Path, threads: int, answers: Sequence[Given]) -> list[list[Opinion]]:
    """Of every token, given the prompt and the answer's tokens before it.

    Raises FlashMoEError where xllamacpp is not installed, or does not take the file.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise FlashMoEError("xllamacpp has llama.cpp's tokens: pip install 'flashmoe-ssd[server]'")
    command = [sys.executable, "-m", __name__, str(file), str(threads)]
    done = subprocess.run(command, input=json.dumps(answers), capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise FlashMoEError(f"llama.cpp has no opinion of {file}: {words[-1]}")
    lines = json.loads(done.stdout.splitlines()[-1])
    return [[Opinion(*opinion) for opinion in answer] for answer in lines]


def _main(file: str, threads: int, answers: list[Given]) -> list[list[Opinion]]:
    from harness.runs.engines import reference_adapter

    longest = max(len(given.prompt) + len(given.tokens) for given in answers)
    context_tokens = -(-longest // _CONTEXT_STEP) * _CONTEXT_STEP
    server = reference_adapter.load(
        {"file": file, "threads": threads, "context_tokens": context_tokens}
    )
    return [_of_answer(server.listening_address, given) for given in answers]


def _of_answer(address: str, given: Given) -> list[Opinion]:
    found = []
    for number, token in enumerate(given.tokens):
        body = {
            "prompt": given.prompt + given.tokens[:number], "n_predict": 1, "temperature": 0,
            "ignore_eos": True, "return_tokens": True, "cache_prompt": number > 0,
        }  # fmt: skip
        (likeliest,) = post(address, "/completion", body)["tokens"]
        # not by its probabilities: of a part of a character the server tells none
        raised = body | {"logit_bias": [[token, NEAR_NATS]]}
        is_near = likeliest == token or post(address, "/completion", raised)["tokens"] == [token]
        found.append(Opinion(likeliest, is_near))
    return found


if __name__ == "__main__":
    import os

    given_answers = [Given(*answer) for answer in json.load(sys.stdin)]
    print(json.dumps(_main(sys.argv[1], int(sys.argv[2]), given_answers)), flush=True)
    os._exit(0)  # the server's threads go on
