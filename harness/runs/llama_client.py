"""Talks to a server of llama.cpp over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

TOKENS, ANSWER_SECONDS = 12, 120.0


def free_port() -> int:
    """A port that nobody listened at a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_up(process: subprocess.Popen[str], address: str, within_seconds: float) -> bool:
    """Wait until the server is ready; False where it ended first, or the time did."""
    until = time.monotonic() + within_seconds
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return True
        except OSError:  # HTTPError too
            time.sleep(0.02)
    return False


def request(address: str, path: str, body: dict[str, Any]) -> urllib.request.Request:
    """A JSON object for one of the server's paths."""
    content, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    return urllib.request.Request(address + path, content, kind)


def post(
    address: str, path: str, body: dict[str, Any], seconds: float = ANSWER_SECONDS
) -> dict[str, Any]:
    """The answer, or {"status": N} of a refusal; raises OSError where there is none."""
    try:
        with urllib.request.urlopen(request(address, path, body), timeout=seconds) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        return {"status": error.code}


def ask(
    address: str, prompt: str, *, seconds: float = ANSWER_SECONDS, **options: Any
) -> dict[str, Any]:
    """Greedy tokens with their likeliest rivals, or the status of the failure."""
    body = {
        "prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 3,
        "ignore_eos": True, "cache_prompt": False, "return_tokens": True,
    }  # fmt: skip
    answer = post(address, "/completion", body | options, seconds)
    if "status" in answer:
        return {"status": answer["status"]}
    rivals = [
        [(rival["id"], rival["logprob"]) for rival in token["top_logprobs"]]
        for token in answer.get("completion_probabilities", [])
    ]
    return {"tokens": answer["tokens"], "rivals": rivals}
