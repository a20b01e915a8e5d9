"""Eviction policies, one file each. `available()` lists them; dropping in a file adds one."""

from __future__ import annotations

import sys
from functools import cache

from flashmoe.errors import FlashMoEError
from flashmoe.policies.base import Policy
from flashmoe.registry import discover


@cache
def available() -> dict[str, type[Policy]]:
    """Every policy by name."""
    return discover(sys.modules[__name__], Policy)  # type: ignore[type-abstract]


def get(name: str, *, online: bool = False) -> type[Policy]:
    """The policy called `name`; with `online`, only one that can run without the future.

    Raises FlashMoEError when there is none.
    """
    policy = available().get(name)
    if policy is None:
        raise FlashMoEError(f"no policy is called {name!r}: choose from {', '.join(available())}")
    if online and policy.offline:
        raise FlashMoEError(
            f"policy {name!r} needs the future, which only a recorded trace has: "
            "use it with `flashmoe simulate`"
        )
    return policy
