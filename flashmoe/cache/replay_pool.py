"""Many replays at once, on all cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from flashmoe.cache.simulate import Conditions, Replay, replay
from flashmoe.trace import Trace
from flashmoe.util import workers


class ReplayJob(NamedTuple):
    """The arguments of one `simulate.replay`."""

    trace: Trace
    policy: str
    capacity: float
    conditions: Conditions
    slots: float | None = None

    @property
    def events(self) -> int:
        """Token-layers."""
        return self.trace.experts[..., 0].size


def replay_all(
    jobs: Iterable[ReplayJob], progress: Callable[[int], object] = lambda events: None
) -> Iterator[Replay]:
    """The outcome of each job, in order; `progress` is told each one's token-layers.

    In processes, not threads: compiling a policy, seconds the first time, holds Python's lock.
    Raises FlashMoEError as `replay` does.
    """
    pool = ProcessPoolExecutor(
        os.cpu_count(), mp_context=workers.CONTEXT, initializer=workers.end_with_parent
    )
    try:
        pending = deque((job, pool.submit(replay, *job)) for job in jobs)
        while pending:
            job, outcome = pending.popleft()
            done = outcome.result()
            progress(job.events)
            yield done
    finally:
        pool.shutdown(cancel_futures=True)
