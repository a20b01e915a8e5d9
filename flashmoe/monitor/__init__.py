"""Shows what an engine does: a live page, and counts for Prometheus."""

from flashmoe.monitor.monitor import Monitor

__all__ = ["Monitor"]
