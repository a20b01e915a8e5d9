"""First in, first out."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy


class FIFO(Policy):
    """Evicts the expert that has been resident longest, used or not."""

    name = "fifo"

    def touch(self, event: Event, now: int) -> None:
        pass

    def victim(self, candidates: np.ndarray) -> int:
        return candidates[0]
