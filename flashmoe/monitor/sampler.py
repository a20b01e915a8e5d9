"""What the page shows of an engine, a few times a second while somebody looks."""

from __future__ import annotations

import base64
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.engines.base import Engine
from flashmoe.engines.stats import Stats
from flashmoe.monitor.passes import Pass, Passes, n_tokens
from flashmoe.monitor.shadows import Shadows

INTERVAL_SECONDS = 0.25
WINDOW_SECONDS = 2.0  # over which rates are taken
HISTORY_SECONDS = 300  # a point each second
# Passes of more tokens count as prompts: several conversations may decode in one.
DECODE_TOKENS = 16
_BUSY_SHARE = 0.05  # of a window; of less, the drive's speed is not taken
_SMALL_CHANGE = 0.05  # of the budget; shadow caches begin anew only after a larger one
# Of a cell of the map: bits, and above them how many tokens used the expert.
RESIDENT, ARRIVED, LEFT, USES = 1, 2, 4, 3
_MOST_USES = 31


@dataclass(frozen=True)
class _Moment:
    at: float  # by time.monotonic
    stats: Stats
    decoded: int  # tokens, and the next one, since the sampler began
    prompted: int


class Sampler:
    """Looks at one engine. Several viewers share what it sees; without one, it sees nothing."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name  # of the model
        self._layers = [layer.n_experts for layer in engine.manifest.layers]
        self._firsts = np.cumsum([0, *self._layers])
        self._lock = threading.Lock()
        self._viewers = 0
        self._best = 0.0  # bytes a second that the drive gave at most
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY_SECONDS)
        self._frame: dict[str, Any] = {}
        self._taken = 0.0

    @property
    def viewers(self) -> int:
        return self._viewers

    def join(self) -> dict[str, Any]:
        """Begin to look; what a new page must know. `leave` ends it."""
        with self._lock:
            self._viewers += 1
            if self._viewers == 1:
                self._begin()
            stats = self.engine.snapshot()
            return {
                "model": self.name,
                "policy": stats.policy,
                "arithmetic": stats.arithmetic,
                "direct_io": stats.direct_io,
                "layers": self._layers,
                "top_k": self.engine.manifest.top_k,
                "interval_seconds": INTERVAL_SECONDS,
                "window_seconds": WINDOW_SECONDS,
                "decode_tokens": DECODE_TOKENS,
                "history": list(self._history),
            }

    def leave(self) -> None:
        with self._lock:
            self._viewers -= 1
            if not self._viewers:
                self.engine.watch_choices(False)

    def _begin(self) -> None:
        self._passes = Passes(self.engine.manifest.top_k)
        self._shadows: Shadows | None = None
        self._moments: deque[_Moment] = deque()
        self._decoded = self._prompted = 0
        with self.engine.lock:
            self._resident = self._residents() if self.engine.residency.pools.all else None
            self.engine.watch_choices(True)

    def _residents(self) -> np.ndarray:
        """[experts of all layers] bool; not without the engine's lock."""
        pools = self.engine.residency.pools
        return np.concatenate([pools.of(n).slot_of(n) >= 0 for n in range(len(self._layers))])

    def frame(self) -> dict[str, Any]:
        """What happened since the last one; the last one if that was just now.

        Only {"closed": True} where the engine was closed.
        """
        with self._lock:
            if time.monotonic() - self._taken >= INTERVAL_SECONDS / 2:
                self._frame = self._take()
                self._taken = time.monotonic()
            return self._frame

    def _take(self) -> dict[str, Any]:
        engine = self.engine
        with engine.lock:
            if not engine.residency.pools.all:
                return {"closed": True}
            stats, choices = engine.snapshot(), engine.take_choices()
            resident = self._residents()
        uses = np.zeros(self._firsts[-1], np.int64)
        for choice in choices:
            np.add.at(uses, choice.rows.ravel() + self._firsts[choice.layer], 1)
        passes = self._passes.add(choices)
        for one in passes:
            if (tokens := n_tokens(one)) <= DECODE_TOKENS:
                self._decoded += tokens
            else:
                self._prompted += tokens
        figures = self._figures(stats)
        if not self._history or figures["at"] - self._history[-1]["at"] >= 1:
            self._history.append(figures)
        return {
            "figures": figures,
            "map": self._cells(uses, resident),
            "shadows": self._replay(passes, stats),
        }

    def _cells(self, uses: np.ndarray, resident: np.ndarray) -> str:
        """A byte an expert, in base64."""
        before = resident if self._resident is None else self._resident
        cells = resident * RESIDENT | (resident & ~before) * ARRIVED | (before & ~resident) * LEFT
        self._resident = resident
        cells = cells | np.minimum(uses, _MOST_USES) << USES
        return base64.b64encode(cells.astype(np.uint8).tobytes()).decode()

    def _figures(self, stats: Stats) -> dict[str, Any]:
        """Rates over the last seconds, None where there is nothing to tell."""
        now = _Moment(time.monotonic(), stats, self._decoded, self._prompted)
        if self._moments and stats.requests < self._moments[-1].stats.requests:
            self._moments.clear()  # its counts began anew
        self._moments.append(now)
        while len(self._moments) > 2 and now.at - self._moments[1].at >= WINDOW_SECONDS:
            self._moments.popleft()
        then = self._moments[0]
        seconds = now.at - then.at
        requests = stats.requests - then.stats.requests
        bytes_read = stats.bytes_read - then.stats.bytes_read
        busy_seconds = stats.read_seconds - then.stats.read_seconds
        if seconds and busy_seconds >= _BUSY_SHARE * seconds:
            self._best = max(self._best, bytes_read / busy_seconds)

        def rate(count: float) -> float | None:
            return count / seconds if seconds else None

        return {
            "at": time.time(),
            "tokens_per_second": rate(now.decoded - then.decoded),
            "prompt_tokens_per_second": rate(now.prompted - then.prompted),
            "hit_rate": (stats.hits - then.stats.hits) / requests if requests else None,
            "total_hit_rate": stats.hit_rate if stats.requests else None,
            "read_bytes_per_second": rate(bytes_read),
            "best_bytes_per_second": self._best or None,
            "waiting": rate(stats.wait_seconds - then.stats.wait_seconds),
            "resident_bytes": stats.resident_bytes,
            "memory_bytes": stats.memory_bytes,
            "lost_events": self.engine.residency.routing.log.lost,
        }

    def _replay(self, passes: Sequence[Pass], stats: Stats) -> dict[str, Any] | None:
        known = self._shadows.memory_bytes if self._shadows else 0
        if self._shadows is None or abs(stats.memory_bytes - known) > _SMALL_CHANGE * known:
            self._shadows = Shadows(self.engine)
        self._shadows.add(passes)
        self._shadows.take_turn()
        return self._shadows.as_dict()
