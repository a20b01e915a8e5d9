"""ik_llama.cpp's llama-server: kernels of its own, the file mapped, experts prefetched or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness.runs.gguf_systems import System, Work
from harness.runs.gguf_systems.server_process import measure

PROGRAM = "FLASHMOE_IK_LLAMA_SERVER"


_NAME, _PREFETCH = "ik_llama.cpp llama-server", "--prefetch-experts"


def _run(work: Work, *arguments: str) -> dict[str, Any]:
    return measure(work, Path(os.environ[PROGRAM]), *arguments)


SYSTEMS = (
    System(_NAME, _run, program=PROGRAM),
    System(
        f"{_NAME} {_PREFETCH}",
        lambda work: _run(work, _PREFETCH),
        program=PROGRAM,
        option=_PREFETCH,
    ),
)
