"""Runs one system once, alone in this process, and says what it did as one JSON object."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import baselines
from baselines.base import Setting
from flashmoe import trace
from flashmoe.store import manifest as manifests
from flashmoe.store.read_queue import Span
from harness.forced_routing import forced_routing
from harness.page_cache import cached_bytes
from harness.usage import Usage


@dataclass(frozen=True)
class Job:
    """What to run. `sequence` makes it a full-scale run: random prompt, recorded experts."""

    system: str
    checkpoint: Path
    store: Path
    memory_bytes: int
    prompt: str
    new_tokens: int
    routing: Path | None = None  # recorded on the model; systems that calibrate do so by it
    sequence: str = ""  # of `routing`: take the experts from it, and calibrate by the others
    prompt_tokens: int = 0  # with `sequence`, the prompt's length in place of its text
    warm_up_tokens: int = 0  # decoded before measuring, so that the cache is at its working state
    cap_bytes: int | None = None  # the kernel's limit on the process, page cache included
    read_bytes_per_second: int | None = None  # the kernel's limit on its reading
    timeline: bool = False  # say when, within the last token, what was read and computed
    decode_seconds: float | None = None  # stop after so many, though tokens are missing


class _Clock(BaseStreamer, StoppingCriteria):
    """Notes when each token came; calls back once, when the warm-up is over; stops in time.

    Warm-up lasts a number of tokens, or half of `seconds` where those are slower.
    """

    def __init__(
        self, warm_up_tokens: int, seconds: float | None, on_start: Callable[[], None]
    ) -> None:
        self.times: list[float] = []
        self.first_token = 0.0
        self.calls = 0
        self.warm_up_tokens = warm_up_tokens
        self.seconds = seconds
        self.on_start = on_start

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        self.calls += 1  # the first call is the prompt, the second the token that prefill gave
        if self.calls == 2:
            self.first_token = now
        late = self.seconds is not None and now - self.first_token > self.seconds / 2
        if not self.times and self.calls >= 2 and (late or self.calls == 2 + self.warm_up_tokens):
            self.on_start()
            self.times.append(time.perf_counter())
        elif self.times:
            self.times.append(now)

    def __call__(self, input_ids: torch.Tensor, scores: object, **others: object) -> torch.Tensor:
        enough = len(self.times) > 1 and self.seconds is not None
        stop = enough and self.times[-1] - self.times[0] > (self.seconds or 0)
        return torch.full((len(input_ids),), stop)

    def end(self) -> None:
        pass


def run(job: Job) -> dict[str, Any]:
    """Load, prefill, warm up, then decode `new_tokens` under the clock, greedily, batch 1."""
    system = baselines.get(job.system)()
    started = time.perf_counter()
    recorded = trace.load(job.routing) if job.routing else None
    profile = recorded and recorded.without(job.sequence)
    model = system.load(Setting(job.checkpoint, job.store, job.memory_bytes, profile))
    load_seconds = time.perf_counter() - started
    manifest = manifests.load(job.store)
    forced: AbstractContextManager[None]
    if job.sequence and recorded:
        forced = forced_routing(model, recorded.named(job.sequence), system.lookahead)
        ids = torch.arange(job.prompt_tokens)[None] + 1000
        tokenizer = None
    else:
        forced = nullcontext()
        tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
        ids = tokenizer(job.prompt, return_tensors="pt")["input_ids"]
    before = Usage()
    spans: list[Span] = []

    def start() -> None:
        nonlocal spans
        system.reset_counts()
        if job.timeline:
            spans = system.watch()
        before.take()

    clock = _Clock(job.warm_up_tokens, job.decode_seconds, start)
    prefill_started = time.perf_counter()
    with forced, torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1 + job.warm_up_tokens + job.new_tokens,
            min_new_tokens=1 + job.warm_up_tokens + job.new_tokens,
            do_sample=False,
            streamer=clock,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    used = before.since()
    tokens = len(clock.times) - 1
    seconds = clock.times[-1] - clock.times[0]
    stats = system.stats()
    system.close()
    per_token = sorted(b - a for a, b in zip(clock.times, clock.times[1:], strict=False))
    result: dict[str, Any] = {
        "system": job.system,
        "residency": system.residency,
        "memory_bytes": job.memory_bytes if system.uses_budget else None,
        "slots": stats.get("slots_per_layer"),
        "shared": stats.get("shared"),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "token_median_seconds": per_token[len(per_token) // 2],
        "token_p95_seconds": per_token[int(len(per_token) * 0.95)],
        "token_p99_seconds": per_token[int(len(per_token) * 0.99)],
        "load_seconds": load_seconds,
        "first_token_seconds": clock.first_token - prefill_started,
        "device_bytes_per_token": used.device_bytes / tokens,
        "cpu_seconds_per_token": used.cpu_seconds / tokens,
        "joules_per_token": None if used.joules is None else used.joules / tokens,
        "page_cache_bytes": cached_bytes(job.store / manifest.experts_file),
        "token_ids": output[0].tolist(),
        "text": tokenizer.decode(output[0]) if tokenizer else None,
        "prompt_tokens": ids.shape[1],
    }
    if job.timeline:
        first, last = clock.times[-2:]
        result["timeline"] = [
            (what, start - first, end - first)
            for what, start, end in spans
            if end > first and start < last
        ]
    if "requests" in stats:
        result["hit_rate"] = stats["hits"] / max(1, stats["requests"])
        result["prediction_accuracy"] = stats.get("prediction_accuracy")
    if "experts_seconds" in stats:
        experts = stats["experts_seconds"]
        inside = stats["wait_seconds"] + stats["compute_seconds"] + stats["policy_seconds"]
        result |= {
            "requests": stats["requests"],
            "hits": stats["hits"],
            "bytes_per_token": stats["bytes_read"] / tokens,
            "resident_bytes": stats["peak_resident_bytes"],
            "prefetch_used": stats["prefetch_used"],
            "prefetch_wasted": stats["prefetch_wasted"],
            "wasted_bytes_per_token": stats["prefetch_wasted_bytes"] / tokens,
            "drive_busy_share": stats["read_seconds"] / seconds,
            # where a token's time goes, in seconds a token; the parts add up to the whole
            "wait_seconds": stats["wait_seconds"] / tokens,
            "experts_seconds": stats["compute_seconds"] / tokens,
            "policy_seconds": stats["policy_seconds"] / tokens,
            "python_seconds": (experts - inside) / tokens,
            "rest_of_model_seconds": (seconds - experts) / tokens,
        }
    return result
