"""The recorded routing that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import flashmoe
from flashmoe import trace
from flashmoe.trace import Trace


def shipped() -> Iterator[tuple[str, Trace]]:
    """By name: the demo model's, and that of small models of other geometries."""
    yield "demo", trace.load(flashmoe.demo_routing_path())
    for path in sorted(Path(flashmoe.__file__).parent.glob("routing/*.npz")):
        yield path.stem, trace.load(path)
