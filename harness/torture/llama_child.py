"""The xllamacpp wheel's server with the cache, and orders on stdin: `MODEL MEMORY [WARM] --port N`.

Orders, each answered by a line of JSON: fault KIND SEED; mend; save; resize BYTES; reset; look.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from flashmoe.engines.llama.hosts import xllamacpp as host
from flashmoe.reading.pread import read_through
from flashmoe.residency import warm_start
from harness.torture.faults import Faults
from harness.torture.usage import usage

_SETTINGS: dict[str, Any] = {"n_ctx": 2048, "n_parallel": 1, "warmup": False, "n_gpu_layers": 0}


def _descriptors() -> int:
    """Without sockets: the server closes a client's a moment after its answer."""
    count = 0
    for number in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed since
            count += not stat.S_ISSOCK(os.fstat(int(number.name)).st_mode)
    return count


def main(words: list[str]) -> None:
    *paths, _, port = words
    model, memory, warm = paths[0], paths[1], Path(paths[2]) if len(paths) > 2 else None
    server, attachment = host.serve(
        Path(model), memory=memory, policy="lru", warm=warm, port=int(port), **_SETTINGS
    )
    assert server.listening_address.endswith(port)
    read = os.preadv
    for line in sys.stdin:
        order, *values = line.split()
        engine = attachment.engine
        answer: dict[str, Any] = {}
        match order:
            case "fault":
                os.preadv = Faults(values[0], int(values[1]))  # type: ignore[assignment]
                read_through(os.preadv)
            case "mend":
                answer["injected"] = getattr(os.preadv, "injected", 0)
                os.preadv = read
                read_through(None)
            case "save" if engine and warm:
                warm_start.save(engine.residency, warm)
            case "resize" if engine:
                engine.resize(int(values[0]))
            case "reset" if engine:
                engine.reset()
            case "look" if engine:
                answer |= usage(engine)
        process = psutil.Process()
        answer |= {
            "rss_bytes": process.memory_info().rss,
            "descriptors": _descriptors(),
            "threads": process.num_threads(),
            "python_threads": threading.active_count(),
        }
        print(json.dumps(answer), flush=True)
    os._exit(0)  # the server's threads go on


if __name__ == "__main__":
    main(sys.argv[1:])
