"""What decides, for a loaded model, which experts are in which slots, and counts."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import transformers

from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.engines.transformers import moe_modules, streamed_experts, streamed_module
from flashmoe.engines.transformers.lookahead import Lookahead
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.memory.arena import Arena
from flashmoe.memory.device_arena import arena_on
from flashmoe.policies.base import Policy, Scope
from flashmoe.reading.backend import Backend
from flashmoe.reading.read_queue import Span
from flashmoe.reading.reader import ExtentReader
from flashmoe.residency import budget
from flashmoe.residency.prefetch import PAYS_FROM_BYTES, Guesses, Prefetcher
from flashmoe.util import forks
from flashmoe.util.sizes import parse_bytes


class Engine:
    """What `model.flashmoe` is: the caches of a loaded model, their counts and their end.

    Whoever runs a layer, or calls any method here, holds `lock` meanwhile: so threads may, at once.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        backend: Backend,
        memory_bytes: int,
        policy: str,
        prefetch: bool,
        check_reads: bool,
        device: torch.device,
    ) -> None:
        self.path = backend.path
        self.manifest = backend.manifest
        self.memory_bytes = memory_bytes
        self.device = device
        self.policy_name = policy
        self.policy = policies.get(policy, online=True)
        self.guesses = prefetch and self.manifest.layers[0].extent_bytes >= PAYS_FROM_BYTES
        self.modules = moe_modules.expert_modules(model)
        self.waiting_bytes = streamed_experts.most_waiting_bytes(model)
        self.slots = self._divide(memory_bytes)
        self.lock = threading.RLock()  # a layer at a time, whichever thread asks
        self.timings = streamed_experts.Timings()
        self.routing = streamed_experts.Routing(self.manifest.top_k, len(self.manifest.layers))
        self.guess_counts = Guesses()
        self.reader = ExtentReader(backend, check_all=check_reads)
        self.lookahead = Lookahead(model)
        self.caches = self._new_caches()
        self.arenas = self._new_arenas(self.caches)
        self.prefetcher = self._new_prefetcher()
        self.layers: list[streamed_experts.StreamedExperts] = []
        for number, module in enumerate(self.modules.values()):
            place = self._place(number)
            streamed = streamed_experts.StreamedExperts(
                number,
                self._first_key(number),
                self.arenas[place],
                self.caches[place],
                self.reader,
                self.timings,
                self.routing,
                self.prefetcher,
                self.lock,
            )
            streamed_module.install(module, streamed)
            if self.layers:
                self.layers[-1].above = streamed
            self.layers.append(streamed)
        self._peak_before_bytes = 0  # of caches that are no more
        self._end_reads = weakref.finalize(self, self.reader.close)  # also when it is dropped
        forks.look_after(self)

    def _divide(self, memory_bytes: int) -> budget.Slots:
        pools = self.policy.policy_class.pools
        return budget.divide(self.manifest, memory_bytes, pools=pools, guesses=self.guesses)

    def _place(self, number: int) -> int:
        """Which of the caches and arenas serves a layer."""
        return 0 if self.slots.shared else number

    def _first_key(self, number: int) -> int:
        """The key of a layer's expert 0 in the cache that serves the layer."""
        return number * self.manifest.layers[0].n_experts if self.slots.shared else 0

    def new_policy(self, number: int, n_slots: int) -> Policy:
        """A fresh policy for one of the caches."""
        layers, top_k, depth = self.manifest.layers, self.manifest.top_k, len(self.manifest.layers)
        if self.slots.shared:
            scope = Scope(layers[0].n_experts, top_k, depth, 0, depth)
        else:
            scope = Scope(layers[number].n_experts, top_k, 1, number, depth)
        return self.policy(scope, min(n_slots, scope.n_keys))

    def _new_caches(self) -> list[ExpertCache]:
        """One a layer, or one."""
        count = 1 if self.slots.shared else len(self.manifest.layers)
        return [ExpertCache(self.new_policy(n, self.slots.n_slots)) for n in range(count)]

    def _new_arenas(self, caches: list[ExpertCache]) -> list[Arena]:
        specs = self.manifest.layers[:1] if self.slots.shared else self.manifest.layers
        pairs = zip(specs, caches, strict=True)
        return [arena_on(self.device, spec, cache.n_slots) for spec, cache in pairs]

    def _new_prefetcher(self) -> Prefetcher | None:
        if not self.slots.spares:
            return None
        spares = arena_on(self.device, self.manifest.layers[0], self.slots.spares)
        return Prefetcher(self.lookahead, spares, self.reader, self.guess_counts)

    def use(self, caches: list[ExpertCache]) -> None:
        """Let `caches`, as many as there are and as large, decide from now on; slots are empty."""
        with self.lock:
            self.caches = caches
            for layer in self.layers:
                layer.cache = caches[self._place(layer.number)]

    @property
    def slots_per_layer(self) -> float:
        """Slots that a layer has, or its share of those of all layers."""
        most = max((cache.n_slots for cache in self.caches), default=0)
        return most / len(self.manifest.layers) if self.slots.shared else most

    @property
    def resident_bytes(self) -> int:
        """Bytes of experts in slots now, spare slots included. Never above the budget."""
        return self._slots_bytes(lambda cache: len(cache.resident))

    @property
    def peak_resident_bytes(self) -> int:
        """The most that `resident_bytes` was since load or the last reset."""
        with self.lock:
            present = self._slots_bytes(lambda cache: cache.most_resident)
            return max(self._peak_before_bytes, present)

    def _slots_bytes(self, count: Callable[[ExpertCache], int]) -> int:
        """Bytes of so many slots of each cache, and of the spare ones."""
        with self.lock:
            pairs = zip(self.caches, self.arenas, strict=True)
            held = sum(count(cache) * arena.extent_bytes for cache, arena in pairs)
            return held + self.slots.spares * self.manifest.layers[0].extent_bytes

    def resize(self, memory: int | str) -> None:
        """Give experts another budget from now on; output does not change. Not during generation.

        What fits stays resident, as the policy chooses, and memory is given back at once; on an
        accelerator, and where layers begin or cease to share one cache, it starts cold. "auto":
        what is free now, less a reserve. Raises FlashMoEError when the budget is too small or
        more than there is, and leaves all as it was (but for an accelerator's slots: empty).
        """
        with self.lock:
            self._check_open()
            memory_bytes = self._auto_bytes() if memory == "auto" else parse_bytes(memory)
            slots = self._divide(memory_bytes)
            if self.prefetcher:
                self.prefetcher.clear()
            self._peak_before_bytes = self.peak_resident_bytes
            before, self.slots = self.slots, slots
            try:
                if slots.shared == before.shared and self.arenas[0].resizable:
                    self._resize_arenas()
                else:
                    self._replace_arenas()
            except BaseException:
                self.slots = before
                if not self.arenas:  # given up to make room
                    self._replace_arenas()
                raise
            finally:
                if not self.arenas:
                    self.close()
            self.memory_bytes = memory_bytes

    def _check_open(self) -> None:
        if not self.arenas:
            raise FlashMoEError("this model's FlashMoE engine was closed: load the model again")

    def _auto_bytes(self) -> int:
        # a slot of DRAM takes memory once it was filled, one of an accelerator from the start
        held = self.resident_bytes if self.device.type == "cpu" else self.memory_bytes
        least = budget.least_bytes(self.manifest)
        return free_memory.budget_bytes(self.waiting_bytes, self.device, least, held)

    def _resize_arenas(self) -> None:
        """To `slots`, with what fits still in them; what can fail comes first."""
        policies = [self.new_policy(n, self.slots.n_slots) for n in range(len(self.caches))]
        new = [
            arena.new_slots(arena.lacks(policy.n_slots))
            for arena, policy in zip(self.arenas, policies, strict=True)
        ]
        prefetcher = self._new_prefetcher()
        pairs = [cache.resized(p) for cache, p in zip(self.caches, policies, strict=True)]
        for arena, (cache, kept), slots in zip(self.arenas, pairs, new, strict=True):
            arena.resize(kept, cache.n_slots, slots)
        if self.prefetcher:
            self.prefetcher.close()
        self._install([cache for cache, _ in pairs], self.arenas, prefetcher)

    def _replace_arenas(self) -> None:
        """By empty ones for `slots`; first if an accelerator has not the room for both."""
        if not all(arena.resizable for arena in self.arenas):
            self._close_arenas()
        caches = self._new_caches()
        arenas, prefetcher = self._new_arenas(caches), self._new_prefetcher()
        self._close_arenas()
        caches[0].count_on(self.caches)
        self._install(caches, arenas, prefetcher)

    def _install(
        self, caches: list[ExpertCache], arenas: list[Arena], prefetcher: Prefetcher | None
    ) -> None:
        self.arenas, self.prefetcher = arenas, prefetcher
        for layer in self.layers:
            layer.arena = arenas[self._place(layer.number)]
            layer.first_key = self._first_key(layer.number)
            layer.prefetcher = prefetcher
        self.use(caches)

    def _close_arenas(self) -> None:
        for arena in self.arenas:
            arena.close()
        self.arenas = []
        if self.prefetcher:
            self.prefetcher.close()
            self.prefetcher = None

    def stats(self) -> dict[str, Any]:
        """Counts since load or the last reset, in experts, bytes and seconds.

        `requests` counts distinct (forward step, layer, expert); `hits` those resident when
        the step reached the layer; `prefetch_used` those misses that a guess had begun to
        read, `prefetch_wasted` the guesses begun in vain. `read_seconds` is time with a read
        in flight, `wait_seconds` the part of it in which the model stood still. An accelerator
        is given its arithmetic and not waited for: there `compute_seconds` is only the giving.
        """
        with self.lock:
            caches, guesses = self.caches, self.guess_counts
            requests = sum(cache.requests for cache in caches)
            hits = sum(cache.hits for cache in caches)
            return {
                "policy": self.policy_name,
                "shared": self.slots.shared,
                "slots": sum(cache.n_slots for cache in caches),
                "slots_per_layer": self.slots_per_layer,
                "requests": requests,
                "hits": hits,
                "misses": requests - hits,
                "hit_rate": hits / requests if requests else 0.0,
                "prefetch_used": guesses.used,
                "prefetch_wasted": guesses.wasted,
                "prefetch_wasted_bytes": guesses.wasted_bytes,
                "bytes_read": self.reader.bytes_read,
                "read_seconds": self.reader.busy_seconds,
                "wait_seconds": self.timings.wait_seconds,
                "compute_seconds": self.timings.compute_seconds,
                "experts_seconds": self.timings.total_seconds,
                "policy_seconds": sum(cache.policy_seconds for cache in caches),
                "resident_bytes": self.resident_bytes,
                "peak_resident_bytes": self.peak_resident_bytes,
                "memory_bytes": self.memory_bytes,
                "direct_io": self.reader.backend.direct,
            }

    def watch(self) -> list[Span]:
        """A list that from now on gets every read and computation: (what, start, end) in seconds.

        demand and guess are pieces read, experts is arithmetic, layer an experts module's time.
        """
        spans: list[Span] = []
        with self.lock:
            self.timings.spans = spans
            self.reader.note_spans(spans)
        return spans

    def reset(self) -> None:
        """Start cold: empty slots, fresh policies, counts at zero. Not during generation."""
        with self.lock:
            self._check_open()
            if self.prefetcher:
                self.prefetcher.clear()
            self.use(self._new_caches())
            self.reset_counts()

    def reset_counts(self) -> None:
        """Counts at zero; residency and the policies' statistics stay as they are."""
        with self.lock:
            for cache in self.caches:
                cache.reset_counts()
            self.timings.total_seconds = self.timings.wait_seconds = 0.0
            self.timings.compute_seconds = 0.0
            self.reader.reset_counts()
            if self.prefetcher:
                self.prefetcher.collect()  # of before
            self.guess_counts.reset()
            self._peak_before_bytes = 0

    def stand_still(self) -> None:
        """Let the layer at hand end, and begin none until `go_on` (see `forks`)."""
        self.lock.acquire()
        self.reader.stand_still()

    def go_on(self, *, in_child: bool) -> None:
        if in_child:  # torch would wait for ever for OpenMP's threads, which only the parent has
            torch.set_num_threads(1)
        self.reader.go_on(in_child=in_child)
        self.lock.release()

    def close(self) -> None:
        """Free slots, threads and file descriptors. The model cannot run afterwards."""
        with self.lock:
            self._end_reads()
            for module in self.modules.values():
                streamed_module.uninstall(module)
            self.layers.clear()
            self.caches.clear()
            self._close_arenas()
