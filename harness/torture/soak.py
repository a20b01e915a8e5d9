"""Hours of use in one process: does memory or anything else grow?"""

from __future__ import annotations

import gc
import random
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from harness.progress import Say
from harness.runs.budget import budget_for

SETTLED_AFTER = 0.2  # share of the time; until then allocators and compiled code still grow
MOST_GROWTH_BYTES = 32 << 20
ROWS = 12
LEAST_ROUNDS = 4


def soak(seconds: float, say: Say, seed: int = 0) -> list[dict[str, Any]]:
    """Load, generate, resize, reset and close the demo model over and over; rows over the time.

    Raises FlashMoEError when resident memory, descriptors or threads grew once it had settled.
    """
    chance = random.Random(seed)
    samples: list[dict[str, Any]] = []
    with TemporaryDirectory() as work:
        store = Path(work) / "store"
        pack(flashmoe.demo_path(), store)
        started = time.monotonic()
        rounds = tokens = 0
        while (now := time.monotonic() - started) < seconds or len(samples) < LEAST_ROUNDS:
            tokens += _round(store, chance)
            rounds += 1
            gc.collect()
            process = psutil.Process()
            samples.append(
                {
                    "seconds": now,
                    "rounds": rounds,
                    "tokens": tokens,
                    "rss_bytes": process.memory_info().rss,
                    "descriptors": process.num_fds(),
                    "threads": threading.active_count(),
                }
            )
    settled = [row for row in samples if row["seconds"] >= SETTLED_AFTER * seconds] or samples
    check_growth(settled, MOST_GROWTH_BYTES, seconds)
    say(f"{rounds} rounds, {tokens} tokens, {settled[-1]['rss_bytes'] / 2**20:.0f} MiB resident")
    return samples[:: -max(1, len(samples) // ROWS)][::-1]


def check_growth(settled: list[dict[str, Any]], growth_bytes: int, seconds: float) -> None:
    """Raises FlashMoEError where the later half of the samples has more than the earlier one.

    growth_bytes: of resident memory, which is allowed.
    """
    half = len(settled) // 2
    for what, allowed in (("rss_bytes", growth_bytes), ("descriptors", 0), ("threads", 0)):
        early = max(row[what] for row in settled[: max(1, half)])
        late = max(row[what] for row in settled[half:])
        if late > early + allowed:
            raise FlashMoEError(f"soak: {what} grew from {early} to {late} in {seconds:.0f} s")


@torch.inference_mode()
def _round(store: Path, chance: random.Random) -> int:
    """One life of a model; the tokens that it generated."""
    top_k, n_experts = 8, 64
    policy = chance.choice(["lru", "learned"])
    model = flashmoe.load(store, memory=budget_for(store, chance.randint(8, 64)), policy=policy)
    tokens = 0
    for _ in range(3):
        ids = torch.tensor([[chance.randrange(3, 4000) for _ in range(chance.randint(1, 40))]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        tokens += output.shape[1] - ids.shape[1]
        model.flashmoe.resize(budget_for(store, chance.randint(top_k, n_experts)))
        if chance.random() < 0.3:
            model.flashmoe.reset()
    model.flashmoe.close()
    return tokens
