"""Last in, first out."""

from __future__ import annotations

import numpy as np

from flashmoe.events import Event
from flashmoe.policies.base import Policy


class LIFO(Policy):
    """Evicts the expert that came in last, used or not."""

    name = "lifo"

    def touch(self, event: Event, now: int) -> None:
        pass

    def victim(self, candidates: np.ndarray) -> int:
        return candidates[-1]
