"""First in, first out."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.events import Event
from flashmoe.policies.base import Policy


class FIFO(Policy):
    """Evicts the expert that has been resident longest, used or not."""

    name = "fifo"

    def touch(self, event: Event, now: int) -> None:
        pass

    def victim(self, candidates: Sequence[int]) -> int:
        return candidates[0]
