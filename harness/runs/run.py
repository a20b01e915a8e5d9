"""Runs one system once, alone in this process, and says what it did as one JSON object."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import baselines
from baselines.base import Setting
from flashmoe import trace
from flashmoe.reading.read_queue import Span
from flashmoe.store import manifest as manifests
from harness.runs.clock import Clock
from harness.runs.forced_routing import forced_routing
from harness.runs.job import Job, prompt_ids
from harness.runs.page_cache import cached_bytes


class _Ticks(BaseStreamer, StoppingCriteria):
    """Passes transformers' tokens on to a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.clock.token()
        self.prompt_seen = True

    def __call__(self, input_ids: torch.Tensor, scores: object, **others: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.clock.enough)

    def end(self) -> None:
        pass


def run(job: Job) -> dict[str, Any]:
    """Load, prefill, warm up, then decode `new_tokens` under the clock, greedily, batch 1."""
    system = baselines.get(job.system)()
    started = time.perf_counter()
    recorded = trace.load(job.routing) if job.routing else None
    profile = recorded and recorded.without(job.sequence)
    model = system.load(Setting(job.checkpoint, job.store, job.memory_bytes, profile, job.scratch))
    load_seconds = time.perf_counter() - started
    manifest = manifests.load(job.store)
    forced: AbstractContextManager[None]
    if job.sequence and recorded:
        named = recorded.named(job.sequence)
        forced = forced_routing(model, named, system.lookahead) if job.forced else nullcontext()
        ids = torch.tensor([prompt_ids(job.prompt_tokens)])
        tokenizer = None
    else:
        forced = nullcontext()
        tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
        ids = tokenizer(job.prompt, return_tensors="pt")["input_ids"]
    spans: list[Span] = []

    def start() -> None:
        nonlocal spans
        system.reset_counts()
        if job.timeline:
            spans = system.record_spans()

    clock = Clock(job, start)
    ticks = _Ticks(clock)
    clock.start()
    with forced, torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.tokens,
            min_new_tokens=job.tokens,
            do_sample=False,
            streamer=ticks,
            stopping_criteria=StoppingCriteriaList([ticks]),
        )
    figures = clock.figures()
    tokens, seconds = clock.measured, clock.seconds
    stats = system.stats()
    system.close()
    result: dict[str, Any] = {
        "system": job.system,
        "residency": system.residency,
        "memory_bytes": job.memory_bytes if system.uses_budget else None,
        "slots": stats.get("slots_per_layer"),
        "bypass_slots": stats.get("bypass_slots"),
        "shared": stats.get("shared"),
        "load_seconds": load_seconds,
        "page_cache_bytes": cached_bytes(job.store / manifest.experts_file),
        "token_ids": output[0].tolist(),
        "text": tokenizer.decode(output[0]) if tokenizer else None,
        "prompt_tokens": ids.shape[1],
    } | figures
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
