"""Many replays at once, on all cores or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from flashmoe.cache.simulate import Conditions, Replay, replay
from flashmoe.trace import Trace
from flashmoe.util import many_jobs


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

    Raises FlashMoEError as `replay` does, and as `many_jobs.outcomes` does.
    """
    jobs = list(jobs)
    for job, outcome in zip(jobs, many_jobs.outcomes(replay, jobs), strict=True):
        progress(job.events)
        yield outcome
