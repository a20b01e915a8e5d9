"""What a policy has learnt, as arrays by name: to be kept, and to be given to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flashmoe.policies.base import Policy


def arrays(policy: Policy) -> dict[str, np.ndarray]:
    """Every array of a policy, those of its named tuples as tuple/field; not copied."""
    return dict(_arrays(vars(policy)))


def _arrays(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            yield prefix + name, value
        elif hasattr(value, "_asdict"):
            yield from _arrays(value._asdict(), f"{prefix}{name}/")


def fits(policy: Policy, state: dict[str, np.ndarray]) -> bool:
    """Is `state` of a policy of the same kind, on as many keys?"""
    own = arrays(policy)
    return own.keys() == state.keys() and all(
        own[name].shape == value.shape and own[name].dtype == value.dtype
        for name, value in state.items()
    )


def take(policy: Policy, state: dict[str, np.ndarray]) -> None:
    """Copy `state` into the policy, which it `fits`."""
    for name, array in arrays(policy).items():
        array[...] = state[name]
