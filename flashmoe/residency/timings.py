"""Where the time inside the experts goes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from flashmoe.reading.read_queue import Span


@dataclass
class Timings:
    """Seconds since the last reset."""

    total_seconds: float = 0.0  # in the experts altogether
    wait_seconds: float = 0.0  # blocked on reads
    compute_seconds: float = 0.0  # expert arithmetic
    spans: list[Span] | None = None  # if set, it gets every computation and layer

    def since(self, started: float, what: str) -> float:
        """Seconds since `started`, which were spent on `what`."""
        ended = time.perf_counter()
        if self.spans is not None:
            self.spans.append((what, started, ended))
        return ended - started

    def reset(self) -> None:
        self.total_seconds = self.wait_seconds = self.compute_seconds = 0.0
