"""Budgets in slots."""

from __future__ import annotations

from pathlib import Path

from flashmoe.store import manifest as manifests


def budget_for(store: Path, slots: int) -> int:
    """The bytes that give every layer exactly `slots` slots."""
    return slots * sum(layer.extent_bytes for layer in manifests.load(store).layers)
