"""Lists of experts in their order of arrival, of which queue-based policies are made.

A policy that uses them has these int64 arrays: `where` [n_keys], the list that each key is in, 0
for none; `order` [n_keys], when it came there; `sizes`, the length of each list; and `clock`,
whose element MOVES counts moves.
"""

from __future__ import annotations

from flashmoe.util.machine_code import helper

MOVES = 0  # a position in a policy's `clock`


@helper
def oldest(where, order, queue, candidates):
    """The one of `candidates` that came first to list `queue`; -1 if none is in it."""
    first = -1
    for key in candidates:
        if where[key] == queue and (first < 0 or order[key] < order[first]):
            first = key
    return first


@helper
def move(policy, key, queue):
    """Put `key` at the young end of list `queue`."""
    policy.sizes[policy.where[key]] -= 1
    policy.sizes[queue] += 1
    policy.where[key] = queue
    policy.clock[MOVES] += 1
    policy.order[key] = policy.clock[MOVES]
