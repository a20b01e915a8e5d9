"""How a budget becomes pools of slots, and what stays in them when the budget changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flashmoe import policies
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.memory.arena import Arena
from flashmoe.policies.base import Policy, Scope
from flashmoe.residency import budget
from flashmoe.residency.pool import Pool
from flashmoe.residency.prefetch import Prefetcher
from flashmoe.store.manifest import LayerSpec, Manifest

NewArena = Callable[[LayerSpec, int], Arena]  # slots for so many experts of such a layer


class Pools:
    """The slots of a loaded model: a pool for each layer or one for all, spare and bypass ones.

    The spare slots are the prefetcher's. The bypass slots are the event's at hand: its experts that
    their cache does not keep lie there until they were computed. Not thread-safe: see `Residency`.
    """

    def __init__(
        self,
        manifest: Manifest,
        policy: str,
        memory_bytes: int,
        prefetcher: Prefetcher,
        new_arena: NewArena,
        *,
        whole_events: bool = False,
    ) -> None:
        """Raises FlashMoEError for a budget that is too small, or memory that cannot be had."""
        self.manifest = manifest
        self.policy_name = policy
        self.policy = policies.get(policy, online=True)
        self.prefetcher = prefetcher
        self._new_arena = new_arena
        self._whole_events = whole_events
        self.memory_bytes = memory_bytes
        self.slots = self._divide(memory_bytes)
        self._peak_before_bytes = 0  # of pools that are no more, or with guesses
        self.all: list[Pool] = []
        self.bypass: Arena | None = None
        self._replace_all(caches_before=[])

    def _divide(self, memory_bytes: int) -> budget.Slots:
        return budget.divide(
            self.manifest,
            memory_bytes,
            policy_can_share=self.policy.policy_class.pools,
            reserve_spares=self.prefetcher.pays,
            policy_bypasses=self.policy.policy_class.bypasses,
            whole_events=self._whole_events,
        )

    @property
    def caches(self) -> list[ExpertCache]:
        return [pool.cache for pool in self.all]

    def of(self, layer: int) -> Pool:
        """The pool that serves a layer."""
        return self.all[0 if self.slots.shared else layer]

    def new_policy(
        self, number: int, n_slots: int | None = None, slots: budget.Slots | None = None
    ) -> Policy:
        """A fresh policy for one of the pools.

        n_slots: others than it would have. slots: how the budget is used; default: as it is now.
        """
        slots = slots or self.slots
        layers, top_k, depth = self.manifest.layers, self.manifest.top_k, len(self.manifest.layers)
        n_slots = slots.n_slots[number] if n_slots is None else n_slots
        if slots.shared:
            scope = Scope(layers[0].n_experts, top_k, depth, 0, depth, slots.bypass)
        else:
            scope = Scope(layers[number].n_experts, top_k, 1, number, depth, slots.bypass)
        return self.policy(scope, min(n_slots, scope.n_keys))

    def caches_at(self, memory_bytes: int, numbers: Iterable[int]) -> list[ExpertCache] | None:
        """Empty caches as these pools would have them at another budget.

        None where layers would begin or cease to share one. Raises FlashMoEError for a budget
        that is too small.
        """
        slots = self._divide(memory_bytes)
        if slots.shared != self.slots.shared:
            return None
        return [ExpertCache(self.new_policy(number, slots=slots)) for number in numbers]

    def _new_pool(self, number: int) -> Pool:
        layer = self.manifest.layers[number]
        cache = ExpertCache(self.new_policy(number))
        return Pool(cache, self._new_arena(layer, cache.n_slots), number, layer.n_experts)

    def _new_extra(self, n_slots: int, before: Arena | None = None) -> Arena | None:
        """Slots that no cache knows; those of `before` where there are to be as many."""
        if (before.n_slots if before else 0) == n_slots:
            return before
        return self._new_arena(self.manifest.layers[0], n_slots) if n_slots else None

    def _use_bypass(self, bypass: Arena | None) -> None:
        if self.bypass and self.bypass is not bypass:
            self.bypass.close()
        self.bypass = bypass

    @property
    def slots_per_layer(self) -> float:
        """Slots that a layer has, or its share of those of all layers; the mean where they differ.

        Where they differ, the lowest layers have one more than the others.
        """
        return sum(self.slots.n_slots) / len(self.manifest.layers) if self.all else 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of experts in slots now, all other slots included. Never above the budget."""
        residents = sum(pool.resident_bytes for pool in self.all)
        return self._extra_bytes + self.prefetcher.bytes_in_slots + residents

    def note_guesses(self) -> None:
        """Of guesses in caches' own slots no cache can tell how many there were at most."""
        if self.prefetcher.bytes_in_slots:
            self._peak_before_bytes = max(self._peak_before_bytes, self.resident_bytes)

    @property
    def peak_resident_bytes(self) -> int:
        """The most that `resident_bytes` was since load or the last reset."""
        present = self._extra_bytes + sum(pool.most_resident_bytes for pool in self.all)
        return max(self._peak_before_bytes, present)

    @property
    def _extra_bytes(self) -> int:
        """Of slots that no cache knows."""
        extra = filter(None, (self.prefetcher.spares, self.bypass))
        return sum(arena.n_slots * arena.extent_bytes for arena in extra)

    def resize(self, memory_bytes: int) -> None:
        """Another budget from now on; what fits stays resident, as the policy chooses.

        On an accelerator, and where layers begin or cease to share a pool, it starts cold. Raises
        FlashMoEError when the budget is too small, or the memory cannot be had, and leaves all as
        it was (but for an accelerator's slots: empty, or given up where even those cannot be had).
        """
        slots = self._divide(memory_bytes)
        self.prefetcher.clear()
        self._peak_before_bytes = self.peak_resident_bytes
        before, self.slots, caches = self.slots, slots, self.caches
        try:
            if slots.shared == before.shared and self.all[0].arena.resizable:
                self._resize_all()
            else:
                self._replace_all(caches)
        except BaseException:
            self.slots = before
            if not self.all:  # given up to make room
                self._replace_all(caches)
            raise
        self.memory_bytes = memory_bytes

    def _resize_all(self) -> None:
        """To `slots`, with what fits still in them; what can fail comes first."""
        changes = []
        for number, pool in enumerate(self.all):
            policy, now = self.new_policy(number), pool.cache.policy
            if (policy.n_slots, policy.bypass_slots) != (now.n_slots, now.bypass_slots):
                new = pool.arena.new_slots(pool.arena.lacks(policy.n_slots))
                changes.append((pool, policy, new))
        spares = self._new_extra(self.slots.spares, self.prefetcher.spares)
        bypass = self._new_extra(self.slots.bypass, self.bypass)
        for pool, policy, new in changes:
            pool.resize(policy, new)
        self.prefetcher.use(spares)
        self._use_bypass(bypass)

    def shrink(self, memory_bytes: int, but: Pool) -> None:
        """Give back now what a `resize` to so few bytes would, but of one pool that is in use.

        Nothing where that would start cold. A `resize` is to follow.
        """
        slots = self._divide(memory_bytes)
        if slots.shared or self.slots.shared:
            return
        self._peak_before_bytes = self.peak_resident_bytes
        self.prefetcher.clear()  # slots get other numbers
        for number, pool in enumerate(self.all):
            policy = self.new_policy(number, slots.n_slots[number])
            if pool is not but and policy.n_slots < pool.cache.n_slots:
                pool.resize(policy, [])

    def _replace_all(self, caches_before: list[ExpertCache]) -> None:
        """By empty ones for `slots`; first if an accelerator has not the room for both."""
        if not all(pool.arena.resizable for pool in self.all):
            self._free()
        count = 1 if self.slots.shared else len(self.manifest.layers)
        pools = [self._new_pool(number) for number in range(count)]
        spares, bypass = self._new_extra(self.slots.spares), self._new_extra(self.slots.bypass)
        self._free()
        pools[0].cache.count_on(caches_before)
        self.all = pools
        self.prefetcher.use(spares)
        self._use_bypass(bypass)

    def restart(self, caches: list[ExpertCache] | None = None) -> None:
        """Go on with these caches, one a pool and of its size; default: empty ones."""
        for number, pool in enumerate(self.all):
            pool.cache = (
                caches[number]
                if caches
                else ExpertCache(self.new_policy(number, pool.cache.n_slots))
            )

    def reset_counts(self) -> None:
        for pool in self.all:
            pool.cache.reset_counts()
        self._peak_before_bytes = 0

    def close(self) -> None:
        """Give the memory back; nothing can be served afterwards."""
        self._free()

    def _free(self) -> None:
        for pool in self.all:
            pool.arena.close()
        self.all = []
        self.prefetcher.use(None)
        self._use_bypass(None)
