"""Hours of requests to one of llama.cpp's servers under the cache, and many short lives of it."""

from __future__ import annotations

import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flashmoe.errors import FlashMoEError
from harness import tiny_gguf
from harness.progress import Say
from harness.torture.llama_faults import PROMPTS, order, serve
from harness.torture.soak import LEAST_ROUNDS, ROWS, check_growth

ROUNDS_A_LIFE = 50


def soak(seconds: float, say: Say, seed: int = 0) -> list[dict[str, Any]]:
    """Ask, resize and reset over and over, now and then in a new process; rows over the time.

    Raises FlashMoEError when tokens differ, or resident memory, descriptors or threads of a life
    grew once it had settled.
    """
    chance = random.Random(seed)
    samples: list[dict[str, Any]] = []
    with TemporaryDirectory() as work:
        model = tiny_gguf.write(Path(work) / "model.gguf")
        size = model.stat().st_size
        started = time.monotonic()
        right: dict[str, list[int]] = {}
        lives = rounds = tokens = 0
        while time.monotonic() - started < seconds or not samples:
            lives += 1
            life: list[dict[str, Any]] = []
            with serve(model, Path(work) / "log") as server:
                while len(life) < LEAST_ROUNDS or (
                    len(life) < ROUNDS_A_LIFE and time.monotonic() - started < seconds
                ):
                    for prompt in PROMPTS:
                        answer = server.ask(prompt)
                        if "tokens" not in answer or answer["tokens"] != right.setdefault(
                            prompt, answer["tokens"]
                        ):
                            raise FlashMoEError(f"soak: other tokens in round {rounds}: {answer}")
                        tokens += len(answer["tokens"])
                    usage = order(server, f"resize {int(size * chance.uniform(0.4, 1.2))}")
                    if chance.random() < 0.3:
                        usage = order(server, "reset")
                    rounds += 1
                    row = {
                        "seconds": time.monotonic() - started, "lives": lives, "rounds": rounds,
                        "tokens": tokens,
                    }  # fmt: skip
                    life.append(row | usage)
            settled = life[len(life) // 2 :]  # what a budget of all holds has been touched by then
            check_growth(settled, size, seconds)
            samples += life
    say(f"{lives} lives, {rounds} rounds, {tokens} tokens")
    return samples[:: -max(1, len(samples) // ROWS)][::-1]
