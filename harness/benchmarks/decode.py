"""Decoding with streamed experts against the same model resident, on the demo model."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import flashmoe
from flashmoe.store.pack import pack
from harness.speedups import budget_for

TOKENS = 16
ROUNDS = 5


class Decode:
    """16 tokens after a prompt of 8, a quarter and all of the experts resident."""

    params = (16, 64)
    param_names = ("slots",)
    timeout = 300

    def setup(self, slots: int) -> None:
        self.folder = TemporaryDirectory(prefix="flashmoe-benchmark-")
        store = Path(self.folder.name) / "store"
        pack(flashmoe.demo_path(), store)
        self.streamed = flashmoe.load(store, memory=budget_for(store, slots), policy="lru")
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
        ratios = []
        for _ in range(ROUNDS):
            seconds = []
            for model in (self.streamed, self.resident):
                started = time.perf_counter()
                self._generate(model)
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
        return sorted(ratios)[ROUNDS // 2]
