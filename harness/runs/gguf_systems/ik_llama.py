"""ik_llama.cpp's llama-server: kernels of its own, the file mapped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness.runs.gguf_systems import System, Work
from harness.runs.gguf_systems.server_process import measure

PROGRAM = "FLASHMOE_IK_LLAMA_SERVER"


def _run(work: Work) -> dict[str, Any]:
    return measure(work, Path(os.environ[PROGRAM]))


SYSTEMS = (System("ik_llama.cpp llama-server", _run, program=PROGRAM),)
