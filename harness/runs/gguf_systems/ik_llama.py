"""ik_llama.cpp's llama-server: kernels of its own, the file mapped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness.runs.gguf_systems import System, Work
from harness.runs.gguf_systems.server_process import ServerRun, silent

PROGRAM = "FLASHMOE_IK_LLAMA_SERVER"


def _run(work: Work) -> dict[str, Any]:
    return ServerRun(
        Path(os.environ[PROGRAM]),
        work.model,
        None,
        list(work.prompt),
        work.new_tokens,
        work.cap_bytes,
        silent(("-c", "1024", "-t", str(work.threads))),
    ).measure()


SYSTEMS = (System("ik_llama.cpp llama-server", _run, program=PROGRAM),)
