"""When each expert is needed next: what offline policies and the trainers know of the future."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashmoe.events import Events
from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import kernel
from flashmoe.util.machine_code import helper


class Future(NamedTuple):
    """The next use of every key as a replay goes on; arrays that compiled code updates.

    A use is told by the number of its event, counted from 0.
    """

    next_use: np.ndarray  # [requests] int64: of each request, the next event that has its key
    requests: np.ndarray  # [1] int64: how many have been served
    due: np.ndarray  # [n_keys] int64: the next event that has the key; largest int64: never served

    @classmethod
    def of(cls, events: Events, n_keys: int) -> Future:
        """Before the first of `events`."""
        return cls._new(next_uses(events, n_keys), n_keys)

    @classmethod
    def unknown(cls, n_keys: int) -> Future:
        """Before a policy foresees anything."""
        return cls._new(np.empty(0, np.int64), n_keys)

    @classmethod
    def _new(cls, next_use: np.ndarray, n_keys: int) -> Future:
        return cls(next_use, np.zeros(1, np.int64), np.full(n_keys, np.iinfo(np.int64).max))


@helper
def advance(future, keys):
    """Serve the requests of one event, which has `keys`."""
    for key in keys:
        future.due[key] = future.next_use[future.requests[0]]
        future.requests[0] += 1


def next_uses(events: Events, n_keys: int) -> np.ndarray:
    """Of each of `events.keys`, the next event that has it; the number of events if none has.

    Returns int64 [requests].
    """
    out = np.empty(len(events.keys), np.int64)
    kernel(_next_uses, Policy)(events.keys, events.starts, n_keys, out)  # the same for any policy
    return out


@helper
def _next_uses(keys, starts, n_keys, out):
    following = np.full(n_keys, len(starts) - 1)
    for event in range(len(starts) - 2, -1, -1):
        for i in range(starts[event], starts[event + 1]):
            out[i] = following[keys[i]]
        for i in range(starts[event], starts[event + 1]):
            following[keys[i]] = event
