"""An engine's counts as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from flashmoe.engines.base import Engine
from flashmoe.engines.stats import Stats
from flashmoe.monitor.tokens import tokens_served

# By name, without prefix and a counter's `_total`: an attribute of `Stats`, and what it is.
_COUNTERS = {
    "expert_hits": ("hits", "Experts that were resident when a step needed them"),
    "expert_misses": ("misses", "Experts that were not"),
    "read_bytes": ("bytes_read", "Bytes read from the drive, for misses and guesses"),
    "read_seconds": ("read_seconds", "Time with a read in flight"),
    "wait_seconds": ("wait_seconds", "Time in which the model stood still for a read"),
    "compute_seconds": ("compute_seconds", "Expert arithmetic, where the engine can tell"),
    "experts_seconds": ("experts_seconds", "All time inside the experts modules"),
    "policy_seconds": ("policy_seconds", "The cache's and its policy's part of that"),
    "prefetch_used": ("prefetch_used", "Misses that a guess had begun to read"),
    "prefetch_wasted": ("prefetch_wasted", "Guesses begun in vain"),
    "prefetch_wasted_bytes": ("prefetch_wasted_bytes", "Bytes read for those"),
    "prefetch_off": ("prefetch_off", "Times that a layer was not guessed, since it did not pay"),
}
_GAUGES = {
    "resident_bytes": ("resident_bytes", "Experts in memory now"),
    "peak_resident_bytes": ("peak_resident_bytes", "The most that was"),
    "budget_bytes": ("memory_bytes", "Memory that experts may take"),
    "slots": ("slots", "Experts that the caches hold at most"),
}


class _Collector:
    def __init__(self, engine: Engine | None, name: str) -> None:
        self._engine, self._name = engine, name

    def collect(self) -> Iterator[Any]:
        engine = self._engine
        loaded = engine is not None and bool(engine.residency.pools.all)
        yield GaugeMetricFamily("flashmoe_model_loaded", "1 once there is a model", int(loaded))
        if engine is None or not loaded:
            return
        stats: Stats = engine.snapshot()
        model = GaugeMetricFamily(
            "flashmoe_model_info", "What runs", labels=["model", "policy", "arithmetic"]
        )
        model.add_metric([self._name, stats.policy, stats.arithmetic], 1)
        yield model
        yield CounterMetricFamily(
            "flashmoe_tokens", "Tokens that the experts served, prompts included",
            tokens_served(engine),
        )  # fmt: skip
        for name, (attribute, help_text) in _COUNTERS.items():
            yield CounterMetricFamily(f"flashmoe_{name}", help_text, getattr(stats, attribute))
        for name, (attribute, help_text) in _GAUGES.items():
            yield GaugeMetricFamily(f"flashmoe_{name}", help_text, getattr(stats, attribute))
        if engine.waiting_requests:
            yield GaugeMetricFamily(
                "flashmoe_waiting_requests", "Requests that wait for their turn",
                engine.waiting_requests(),
            )  # fmt: skip


def exposition(engine: Engine | None, name: str, accept: str) -> tuple[bytes, str]:
    """All counts, and their content type: of those that `accept` names, as HTTP's header does.

    name: of the model.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(engine, name))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
