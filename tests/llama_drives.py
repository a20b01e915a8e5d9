"""Serves a model that lies on two drives, in a process of its own: `llama_drives.py JOB`.

JOB is a JSON object: model, a GGUF file; prompts. The second drive fails after a while, and then
both for one request. Prints a JSON object with the answers of each time, and what was said.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import llama_server

from flashmoe.engines.llama.hosts import xllamacpp as host
from flashmoe.errors import FlashMoEError
from flashmoe.reading.pread import read_through


def main(job: dict[str, Any]) -> dict[str, Any]:
    path = Path(job["model"])
    copy = Path(shutil.copy(path, path.with_name("copy of it.gguf")))
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flashmoe").addHandler(handler)
    memory = path.stat().st_size // 2
    options = {"memory": memory, "policy": "lru", **llama_server.PARAMETERS}
    refused = _refusals(path, copy, options)
    server, attachment = host.serve(path, also=[copy], **options)
    assert attachment.engine
    address = server.listening_address

    def answers() -> list[dict[str, Any]]:
        return [llama_server.ask(address, prompt) for prompt in job["prompts"]]

    found = [answers()]
    spread = attachment.engine.stats()["bytes_by_drive"]
    (file,) = attachment.engine.experts.files
    broken, calls = {file.descriptors[1]}, Counter[int]()

    def preadv(descriptor: int, *arguments: Any) -> int:
        calls[descriptor] += 1
        if descriptor in broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, *arguments)

    read_through(preadv)
    found += [answers(), answers()]
    failed_reads = calls[file.descriptors[1]]
    broken.add(file.descriptors[0])
    failed = llama_server.ask(address, "b" + job["prompts"][-1])
    broken.clear()
    found.append(answers())
    return {
        "answers": found, "spread": spread, "said": said, "failed reads": failed_reads,
        "failed": failed, "refused": refused,
    }  # fmt: skip


def _refusals(path: Path, copy: Path, options: dict[str, Any]) -> dict[str, str]:
    """What is said of copies that are none; `copy` is one again afterwards."""
    content = copy.read_bytes()
    other, shorter = copy.with_name("other.gguf"), copy.with_name("shorter.gguf")
    other.write_bytes(bytes([content[0], content[1] ^ 1]) + content[2:])
    shorter.write_bytes(content[:4096])
    refused = {}
    for place in (other, shorter, path, copy.with_name("none.gguf")):
        try:
            host.serve(path, also=[place], **options)
        except FlashMoEError as error:
            refused[place.name] = str(error)
        if place != path:
            place.unlink(missing_ok=True)
    return refused


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the server's threads go on
