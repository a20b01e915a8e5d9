"""The caches of conversations, so that the next turn of one computes only what is new."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from flashmoe.engines.transformers.serving.cache_memory import CacheMemory, size_bytes

# Layers of which tokens can be cut off. Others have states that cannot go back, and a class made
# from one of these may have too.
_CAN_BE_CUT = (DynamicLayer, DynamicIndexedLayer, DynamicSlidingWindowLayer, DummyLayer)
# Tokens that a chat template may have written after the last message, to ask for the answer.
_ASKING_TOKENS = 4


@dataclass
class Kept:
    """The tokens of one conversation, and what the model has computed of them.

    prompt_tokens: those that came as a prompt. least_tokens: what a cut must leave, because
    before that sliding windows are no longer whole.
    """

    token_ids: list[int]
    cache: Cache
    prompt_tokens: int
    least_tokens: int = 0
    memory_bytes: int = 0

    def shared_tokens(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be computed. The last one always is."""
        most = min(len(self.token_ids), len(prompt) - 1)
        same = next((i for i in range(most) if self.token_ids[i] != prompt[i]), most)
        if same < len(self.token_ids) and not self.can_cut(same):
            return 0
        return same

    def can_cut(self, tokens: int) -> bool:
        """Can the cache be cut to its first `tokens`?"""
        can = all(type(layer) in _CAN_BE_CUT for layer in self.cache.layers)
        return can and tokens >= self.least_tokens

    def cut(self, tokens: int) -> None:
        """Leave the first `tokens`, also where a broken-off pass has filled some layers only."""
        for layer in self.cache.layers:
            if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > tokens:
                layer.crop(tokens - layer.get_seq_length())
                if layer.is_sliding:
                    self.least_tokens = tokens
        self.token_ids = self.token_ids[:tokens]

    def goes_on(self, shared: int) -> bool:
        """Is what shares so many tokens a later turn of this conversation, not another one?"""
        return shared + _ASKING_TOKENS >= self.prompt_tokens


class KeptPrefixes:
    """Caches by conversation, the least recently used of which go when memory is short.

    The conversation at hand is taken out, and counts with what it may grow to. Not for several
    threads.

    new_cache: makes an empty one, or None where a family's caches cannot be kept.
    budget_bytes: for all caches, the one at hand included.
    """

    def __init__(
        self, new_cache: Callable[[], Cache | None], memory: CacheMemory, budget_bytes: int
    ) -> None:
        self._new_cache = new_cache
        self._memory = memory
        self.budget_bytes = budget_bytes
        self.kept: list[Kept] = []  # the least recently used first

    @property
    def memory_bytes(self) -> int:
        return sum(kept.memory_bytes for kept in self.kept)

    def take(self, prompt: Sequence[int], most_tokens: int) -> Kept | None:
        """What goes on with a prompt, up to `most_tokens`: to be given to `keep` afterwards.

        Its `token_ids` are those that need not be computed. None: caches cannot be kept.
        """
        best = max(self.kept, key=lambda kept: kept.shared_tokens(prompt), default=None)
        shared = best.shared_tokens(prompt) if best else 0
        if best and shared and best.goes_on(shared):
            self.kept.remove(best)
            taken = best
        elif best and shared:  # a beginning that conversations share, such as a system prompt
            taken = copy.copy(best)
            taken.cache = _same_tensors(best.cache)
        else:
            cache = self._new_cache()
            if cache is None:
                return None
            taken = Kept([], cache, 0)
        taken.cut(shared)
        taken.prompt_tokens = len(prompt)
        self._make_room(self._memory.at(most_tokens))
        return taken

    def keep(self, taken: Kept, token_ids: Sequence[int]) -> None:
        """Keep what was taken for the next turn. Its cache has the first of `token_ids`."""
        taken.token_ids = list(token_ids[: taken.cache.get_seq_length()])
        taken.memory_bytes = size_bytes(taken.cache)
        if taken.token_ids and taken.memory_bytes <= self.budget_bytes:
            self._make_room(taken.memory_bytes)
            self.kept.append(taken)

    def _make_room(self, need_bytes: int) -> None:
        while self.kept and self.memory_bytes + need_bytes > self.budget_bytes:
            self.kept.pop(0)


def _same_tensors(cache: Cache) -> Cache:
    """A cache that grows on its own. No layer that can be cut writes into its tensors."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
