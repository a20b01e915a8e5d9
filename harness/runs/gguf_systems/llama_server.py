"""llama-server in the modes that its users choose, and with FlashMoE under it."""

from __future__ import annotations

from functools import partial
from typing import Any

from harness.runs.gguf_systems import System, Work
from harness.runs.gguf_systems.server_process import measure

PLAIN, OURS = "llama-server --no-repack", "flashmoe run llama-server"


def _run(work: Work, *arguments: str, memory: str | None = None) -> dict[str, Any]:
    return measure(work, work.programs / "llama-server", *arguments, memory=memory)


SYSTEMS = (
    System(PLAIN, lambda work: _run(work, "--no-repack")),
    System(OURS, partial(_run, memory="auto"), is_ours=True),
    System("llama-server", _run),  # repacks at load
    System("llama-server --load-mode dio", lambda work: _run(work, "--load-mode", "dio")),
    System("llama-server --load-mode none", lambda work: _run(work, "--load-mode", "none")),
)
