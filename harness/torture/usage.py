"""What an engine and its process take, for whoever watches from outside."""

from __future__ import annotations

import psutil

from flashmoe.engines.base import Engine


def usage(engine: Engine) -> dict[str, int]:
    """Counts, and the process's memory that is of no file."""
    stats, memory = engine.stats(), psutil.Process().memory_info()
    names = ("memory_bytes", "resident_bytes", "grew", "shrank")
    return {name: stats[name] for name in names} | {"anonymous_bytes": memory.rss - memory.shared}
