"""What `model.flashmoe` is, whichever engine runs the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flashmoe.engines.follower import Follower
from flashmoe.engines.stats import Stats
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.reading.base import Reader
from flashmoe.reading.read_queue import Span
from flashmoe.residency import budget
from flashmoe.residency.choice_log import Choice
from flashmoe.residency.pools import NewArena
from flashmoe.residency.residency import Residency
from flashmoe.util import forks
from flashmoe.util.sizes import parse_bytes


class Engine:
    """A loaded model's experts, as its user sees them: counts, budget, end.

    Any thread may call any method; each takes the lock of `Residency`.
    """

    arithmetic: str  # see `Stats`, and the next one
    kernels: Mapping[str, str] = MappingProxyType({})
    beside_bytes = 0  # what a prompt takes besides, which memory="auto" leaves free
    reserve_bytes = free_memory.RESERVE_BYTES  # what it leaves free at all times
    prefetch_layers = 0  # layers whose experts can be guessed
    waiting_requests: Callable[[], int] | None = None  # of a server before it that has a queue

    def __init__(
        self,
        reader: Reader,
        memory_bytes: int,
        policy: str,
        new_arena: NewArena,
        *,
        device: str,
        prefetch: bool,
        whole_events: bool = False,
    ) -> None:
        """Raises FlashMoEError when the budget is too small, or the memory cannot be had."""
        self.path = reader.backend.path
        self.manifest = reader.manifest
        self.device = device
        self.residency = Residency(
            reader,
            memory_bytes,
            policy,
            new_arena,
            prefetch=prefetch,
            whole_events=whole_events,
        )
        self.lock = self.residency.lock
        self.policy = policy
        self.least_bytes = budget.least_bytes(self.manifest, whole_events=whole_events)
        self.most_bytes = sum(one.n_experts * one.extent_bytes for one in self.manifest.layers)
        self.follower = Follower(self)
        self._end_reads = weakref.finalize(self, reader.close)  # if it is dropped
        forks.look_after(self)

    def resize(self, memory: int | str) -> None:
        """Give experts another budget from now on; output does not change.

        While another thread generates, it waits for the end of a layer, or of llama.cpp's graph.
        What fits stays resident, as the policy chooses, and memory is given back at once; on an
        accelerator, and where layers begin or cease to share one cache, it starts cold. "auto":
        what is free now, less a reserve, and as `follow` from then on; a size stays what it is.
        Raises FlashMoEError when the budget is too small or more than there is, and leaves all as
        it was (but for an accelerator's slots: empty).
        """
        with self.lock:
            self._check_open()
            self._change_budget(self._budget_bytes(memory))
            if memory == "auto":
                self.follow()
            else:
                self.follower.stop()

    def follow(self) -> None:
        """Let the budget shrink and grow with what is free from now on, until a `resize`.

        An accelerator's stays what it is.
        """
        if self.device == "cpu":
            self.follower.start()

    def adjust(self, memory_bytes: int) -> None:
        """As `resize`, for whoever follows free memory; it does not wait for a graph's end.

        Raises FlashMoEError where the memory cannot be had.
        """
        if memory_bytes < self.memory_bytes:
            self.residency.asked_bytes = memory_bytes
        with self.lock:
            self.residency.asked_bytes = None
            if self.residency.pools.all:
                self._change_budget(memory_bytes if self.follower.follows else self.memory_bytes)

    def _change_budget(self, memory_bytes: int) -> None:
        """With the lock held."""
        try:
            self.residency.pools.resize(memory_bytes)
        finally:
            if not self.residency.pools.all:  # an accelerator lost the room that it had
                self.close()

    @property
    def memory_bytes(self) -> int:
        """The budget."""
        return self.residency.pools.memory_bytes

    @property
    def present_bytes(self) -> int:
        """What experts take, which they may use again."""
        # a slot of DRAM takes memory once it was filled, one of an accelerator from the start
        pools = self.residency.pools
        return pools.resident_bytes if self.device == "cpu" else pools.memory_bytes

    def _check_open(self) -> None:
        if not self.residency.pools.all:
            raise FlashMoEError("this model's FlashMoE engine was closed: load the model again")

    def _budget_bytes(self, memory: int | str) -> int:
        """For experts, of the `memory` that the user gives. Raises FlashMoEError without it."""
        if memory != "auto":
            return parse_bytes(memory)
        return free_memory.budget_bytes(
            self.beside_bytes, self.device, self.least_bytes, self.present_bytes, self.reserve_bytes
        )

    def snapshot(self) -> Stats:
        """Counts since load or the last reset."""
        residency, pools = self.residency, self.residency.pools
        with self.lock:
            caches = pools.caches
            return Stats(
                policy=pools.policy_name,
                shared=pools.slots.shared,
                slots=sum(cache.n_slots for cache in caches),
                slots_per_layer=pools.slots_per_layer,
                bypass_slots=pools.slots.bypass,
                requests=sum(cache.requests for cache in caches),
                hits=sum(cache.hits for cache in caches),
                prefetch_layers=self.prefetch_layers if residency.prefetcher.pays else 0,
                prefetch_used=residency.prefetcher.record.used,
                prefetch_wasted=residency.prefetcher.record.wasted,
                prefetch_wasted_bytes=residency.prefetcher.record.wasted_bytes,
                prefetch_off=residency.prefetcher.record.off,
                bytes_read=residency.reader.bytes_read,
                bytes_by_drive=residency.reader.bytes_by_drive,
                read_seconds=residency.reader.busy_seconds,
                wait_seconds=residency.timings.wait_seconds,
                compute_seconds=residency.timings.compute_seconds,
                experts_seconds=residency.timings.total_seconds,
                policy_seconds=sum(cache.policy_seconds for cache in caches),
                resident_bytes=pools.resident_bytes,
                peak_resident_bytes=pools.peak_resident_bytes,
                memory_bytes=pools.memory_bytes,
                grew=self.follower.grew,
                shrank=self.follower.shrank,
                direct_io=residency.reader.backend.direct,
                arithmetic=self.arithmetic,
                kernels=dict(self.kernels),
            )

    def stats(self) -> dict[str, Any]:
        """`snapshot` as a dict, for JSON; `Stats` says what each entry means."""
        return self.snapshot().as_dict()

    def watch_choices(self, wanted: bool) -> None:
        """Keep what layers choose for `take_choices` from now on, or nothing more."""
        with self.lock:
            self.residency.routing.log.want(wanted)

    def take_choices(self) -> list[Choice]:
        """What layers chose since the last call, in order."""
        with self.lock:
            return self.residency.routing.log.take()

    def record_spans(self) -> list[Span]:
        """A list that from now on gets every read and computation: (what, start, end) in seconds.

        demand and guess are pieces read, experts is arithmetic, layer an experts module's time.
        """
        return self.residency.record_spans()

    def reset(self) -> None:
        """Start cold: empty slots, fresh policies, counts at zero. Not during generation."""
        with self.lock:
            self._check_open()
            self.residency.reset()

    def reset_counts(self) -> None:
        """Counts at zero; residency and the policies' statistics stay as they are."""
        self.residency.reset_counts()
        self.follower.reset_counts()

    def stand_still(self) -> None:
        """Let the layer at hand end, and begin none until `go_on` (see `util.forks`)."""
        self.residency.stand_still()

    def go_on(self, *, in_child: bool) -> None:
        self.residency.go_on(in_child=in_child)
        if in_child and self.follower.follows:
            self.follower.start()

    def close(self) -> None:
        """Free slots, threads and file descriptors. The model cannot run afterwards."""
        self.follower.stop()
        with self.lock:
            self._end_reads()
            self.residency.pools.close()
