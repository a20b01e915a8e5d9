"""memory="auto" under one cgroup limit with a program that takes nearly all, again and again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from harness import tiny_gguf
from harness.progress import Say
from harness.runs.memory_cap import Cap, memory_cap
from harness.torture.llama_faults import PROMPTS, order
from harness.torture.llama_server import Server
from harness.torture.neighbour import Neighbour
from harness.torture.soak import ROWS

MIB = 1 << 20
# What the neighbour leaves beside the model's process with its smallest budget: its code must fit,
# and it is less than the experts take, so that a model that gave back nothing would be killed.
SPARE_BYTES = 256 * MIB
WARM_UP = 6  # answers until most experts are resident
Ask = Callable[[], dict[str, Any]]


def soak(seconds: float, say: Say, seed: int = 0) -> list[dict[str, Any]]:
    """Both engines, half of the time each; rows over the time.

    Raises FlashMoEError where no cgroup can be made, a program was killed, or tokens differ.
    """
    samples: list[dict[str, Any]] = []
    with TemporaryDirectory() as work:
        for engine, (write, serve, limit_bytes) in _ENGINES.items():
            model = write(Path(work) / engine)
            with memory_cap(limit_bytes) as cap:
                if cap is None:
                    raise FlashMoEError("soak: no memory cgroup can be made here")
                with serve(model, cap) as ask, Neighbour(cap.enter) as neighbour:
                    rounds = _rounds(ask, neighbour, limit_bytes, random.Random(seed))
                    life: list[dict[str, Any]] = []
                    started = time.monotonic()
                    while (now := time.monotonic() - started) < seconds / 2 or not life:
                        life.append({"engine": engine, "seconds": now} | next(rounds))
            last = life[-1]
            say(f"{engine}: {len(life)} rounds, shrank {last['shrank']}, grew {last['grew']}")
            samples += life[:: -max(1, len(life) // ROWS)][::-1]
    return samples


def _rounds(
    ask: Ask, neighbour: Neighbour, limit_bytes: int, chance: random.Random
) -> Iterator[dict[str, Any]]:
    """In each the neighbour takes or gives back, while the model answers."""
    first = [ask() for _ in range(WARM_UP)][-1]
    most = limit_bytes - (first["anonymous_bytes"] - first["resident_bytes"]) - SPARE_BYTES
    rounds = answers = 0
    while True:
        wanted = int(most * chance.choice([0, chance.random(), 1]))
        speed = 10 ** chance.uniform(8, 9.2)
        neighbour.hold(wanted, speed)
        budgets: list[int] = []
        has_it = False
        while not has_it:
            answer, has_it = ask(), neighbour.has_it()
            if answer["tokens"] != first["tokens"]:
                raise FlashMoEError(f"soak: other tokens in round {rounds}")
            budgets.append(answer["memory_bytes"])
            answers += 1
        rounds += 1
        yield {
            "rounds": rounds, "answers": answers, "neighbour_bytes": wanted,
            "neighbour_bytes_per_second": speed, "least_budget_bytes": min(budgets),
            "most_budget_bytes": max(budgets), "resident_bytes": answer["resident_bytes"],
            "grew": answer["grew"], "shrank": answer["shrank"],
        }  # fmt: skip


def _write_store(path: Path) -> Path:
    """384 MiB of experts."""
    config = transformers.AutoConfig.for_model(
        "olmoe", vocab_size=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, num_experts=32, num_experts_per_tok=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path / "checkpoint")
    pack(path / "checkpoint", path / "store")
    return path / "store"


@contextmanager
def transformers_model(store: Path, cap: Cap, calm_seconds: float = 5.0) -> Iterator[Ask]:
    """What asks a model in a process of its own within the cap."""
    program = "harness.torture.followed_child"
    command = [sys.executable, "-m", program, str(store), str(calm_seconds)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=cap.enter
    )

    def ask() -> dict[str, Any]:
        assert child.stdin and child.stdout
        child.stdin.write("\n")
        child.stdin.flush()
        if not (line := child.stdout.readline()):
            raise FlashMoEError(f"the model's process ended with {child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    with child:
        try:
            yield ask
        finally:
            child.kill()


def _write_gguf(path: Path) -> Path:
    """384 MiB of experts."""
    path.mkdir()
    return tiny_gguf.write(
        path / "model.gguf", scheme="none", num_experts=32, intermediate_size=2048
    )


@contextmanager
def llama_model(model: Path, cap: Cap) -> Iterator[Ask]:
    """As `transformers_model`, of llama.cpp's server."""
    command = [sys.executable, "-m", "harness.torture.llama_child", str(model), "auto"]
    with Server(command, model.parent / "log", before=cap.enter) as server:

        def ask() -> dict[str, Any]:
            try:
                tokens = [server.ask(prompt)["tokens"] for prompt in PROMPTS]
                return {"tokens": tokens} | order(server, "look")
            except (OSError, ValueError) as error:
                ended = server.process.poll()
                raise FlashMoEError(f"the server ended with {ended} ({error})") from None

        yield ask


_ENGINES: dict[str, tuple[Any, Any, int]] = {
    "transformers": (_write_store, transformers_model, 2048 * MIB),
    "llama": (_write_gguf, llama_model, 1280 * MIB),
}
