"""Experts kept in lists by their order of arrival: what queue-based policies are made of.

A policy that uses them has `where` (int64 [n_keys], the list each key is in, 0 for none),
`order` (int64 [n_keys], when it came there), `sizes` (int64, by list) and `clock` (int64, its
first element the moves so far).
"""

from __future__ import annotations

from flashmoe.policies.parts.compiled import helper


@helper
def oldest(where, order, wanted, among):  # type: ignore[no-untyped-def]
    """The key of `among` in list `wanted` that came there first; -1 if there is none."""
    found = -1
    for key in among:
        if where[key] == wanted and (found < 0 or order[key] < order[found]):
            found = key
    return found


@helper
def move(policy, key, to):  # type: ignore[no-untyped-def]
    """Put `key` at the young end of list `to`."""
    policy.sizes[policy.where[key]] -= 1
    policy.sizes[to] += 1
    policy.where[key] = to
    policy.clock[0] += 1
    policy.order[key] = policy.clock[0]
