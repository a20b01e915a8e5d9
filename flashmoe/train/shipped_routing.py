"""The recorded routing that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flashmoe import trace
from flashmoe.trace import Trace

_PACKAGE = Path(__file__).parents[1]


def shipped() -> Iterator[tuple[str, Trace]]:
    """By name: the demo model's, and that of small models of other geometries."""
    yield "demo", trace.load(_PACKAGE / "demo" / "routing.npz")
    for path in sorted(_PACKAGE.glob("routing/*.npz")):
        yield path.stem, trace.load(path)
