"""Eviction policies, one file each. `available()` lists them; a new file adds one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from flashmoe.errors import FlashMoEError
from flashmoe.policies.base import Policy, Scope
from flashmoe.util.registry import discover


@dataclass(frozen=True)
class Choice:
    """A policy and its argument; calling it makes an instance for one cache."""

    policy_class: type[Policy]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, scope: Scope, n_slots: int) -> Policy:
        return self.policy_class(scope, n_slots, **self.options)


@cache
def available() -> dict[str, type[Policy]]:
    """Every policy by name."""
    return discover(sys.modules[__name__], Policy)  # type: ignore[type-abstract]


def get(label: str, *, online: bool = False) -> Choice:
    """The policy called `label`, a name or `name:argument`; `online` refuses offline policies.

    Raises FlashMoEError when there is no such policy, or its argument makes no sense.
    """
    name, colon, argument = label.partition(":")
    policy = available().get(name)
    if policy is None:
        raise FlashMoEError(f"no policy is called {name!r}: choose from {', '.join(available())}")
    options = policy.options(argument) if colon else {}
    if online and policy.offline and not options:
        raise FlashMoEError(
            f"policy {name!r} needs the future, which only a recorded trace has: "
            "use it with `flashmoe simulate`"
        )
    return Choice(policy, options)
