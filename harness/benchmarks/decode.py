"""Decoding with streamed experts against the same model resident, on the demo model."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from harness.runs.budget import budget_for
from harness.tables import speedups

TOKENS = 16
ROUNDS = 5
FIO_SECONDS = 0.3


class Decode:
    """16 tokens after a prompt of 8, a quarter and all of the experts resident."""

    params = (16, 64)
    param_names = ("slots",)
    timeout = 300

    def setup(self, slots: int) -> None:
        self.folder = TemporaryDirectory(prefix="flashmoe-benchmark-")
        self.store = Path(self.folder.name) / "store"
        pack(flashmoe.demo_path(), self.store)
        memory_bytes = budget_for(self.store, slots)
        self.streamed = flashmoe.load(self.store, memory=memory_bytes, policy="lru")
        self.resident = AutoModelForCausalLM.from_pretrained(flashmoe.demo_path())
        self.ids = torch.arange(8)[None] + 100

    def teardown(self, slots: int) -> None:
        self.streamed.flashmoe.close()
        self.folder.cleanup()

    def _generate(self, model: Any) -> None:
        mask = torch.ones_like(self.ids)
        model.generate(
            self.ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )

    def time_streamed(self, slots: int) -> None:
        self._generate(self.streamed)

    def track_times_as_long_as_resident(self, slots: int) -> float:
        """Median of pairs, run in turn."""
        pairs = [self._seconds(self.streamed) / self._seconds(self.resident) for _ in range(ROUNDS)]
        return statistics.median(pairs)

    def track_share_of_roofline(self, slots: int) -> float:
        """Of what the drive (by fio) and the resident arithmetic allow; median of rounds."""
        drive, engine = speedups.drive_of(self.store, FIO_SECONDS), self.streamed.flashmoe
        shares = []
        for _ in range(ROUNDS):
            speed = drive() if drive else math.inf
            engine.reset_counts()
            seconds = self._seconds(self.streamed)
            reading = engine.stats()["bytes_read"] / speed
            shares.append(max(reading, self._seconds(self.resident)) / seconds)
        return statistics.median(shares)

    def _seconds(self, model: Any) -> float:
        started = time.perf_counter()
        self._generate(model)
        return time.perf_counter() - started
