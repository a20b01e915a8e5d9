"""A policy that makes the most of bypass: for tests of what may happen at all."""

from __future__ import annotations

from flashmoe.policies.random import Random


class Whim(Random):
    """Evicts whom chance says, be it the newcomer or another expert of the event."""

    name = "whim"
    pools = True
    bypasses = True
