"""What a policy has learnt, as arrays by name, to save it or to hand it to another policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flashmoe.policies.base import Policy


def arrays(policy: Policy) -> dict[str, np.ndarray]:
    """Every array of a policy, not copied; those of its named tuples are called tuple/field."""
    return dict(_arrays(vars(policy)))


def _arrays(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            yield prefix + name, value
        elif hasattr(value, "_asdict"):
            yield from _arrays(value._asdict(), f"{prefix}{name}/")


def fits(policy: Policy, state: dict[str, np.ndarray]) -> bool:
    """Does `state` come from a policy of the same kind, for as many keys?"""
    targets = arrays(policy)
    return targets.keys() == state.keys() and all(
        targets[name].shape == value.shape and targets[name].dtype == value.dtype
        for name, value in state.items()
    )


def take(policy: Policy, state: dict[str, np.ndarray]) -> None:
    """Copy `state`, which `fits`, into the policy."""
    for name, array in arrays(policy).items():
        array[...] = state[name]
