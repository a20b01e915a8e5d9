"""Asks one model questions in a process of its own: `python llama_server.py JOB`, a JSON object.

model: a GGUF file; memory: a budget, or null for xllamacpp alone; prompts; n_parallel; fail_after:
from so many reads on, reading fails until the first request has failed; record: a trace's file;
n_ubatch; slow: reads take 2 ms more; unnamed: the node after which late reads are awaited has
another name. Prints a JSON object, `refused` the sentence where the model is not served.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

from flashmoe.engines.llama.hooks import Hooks
from flashmoe.errors import FlashMoEError
from flashmoe.reading.pread import read_through
from flashmoe.residency import prefetch, warm_start
from harness.runs import llama_client

PARAMETERS = {"n_ctx": 2048, "n_gpu_layers": 0, "warmup": False, "fit_params": False}


def serve_plain(model: str, **parameters: Any) -> Any:
    common = xllamacpp.CommonParams()
    common.model.path = model
    common.no_extra_bufts = True  # repacked weights are multiplied by other kernels
    for name, value in parameters.items():
        setattr(common, name, value)
    return xllamacpp.Server(common)


def ask(address: str, prompt: str) -> dict[str, Any]:
    """Greedy tokens with their likeliest rivals, or the status of the failure."""
    # of a character in several bytes the server does not tell each one's rivals
    return llama_client.ask(address, prompt, logit_bias=[[b, False] for b in range(128, 256)])


def resident_bytes(start: int, end: int) -> int:
    """Of this process's memory between two addresses: whole pages that are present.

    Whoever looks at an empty page gets the kernel's page of zeros, which takes no memory.
    """
    first, last = start // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        pages = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    own = (pages >> np.uint64(63)) & (pages >> np.uint64(56)) & np.uint64(1)  # mapped here alone
    return int(np.count_nonzero(own)) * mmap.PAGESIZE


def fail_reads(after: int) -> Any:
    """Reads fail from the `after`-th on, until the function that is returned is called."""
    read, count, broken = os.preadv, [0], [True]

    def preadv(*arguments: Any) -> int:
        count[0] += 1
        if broken[0] and count[0] > after:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    os.preadv = preadv
    read_through(preadv)
    return lambda: broken.__setitem__(0, False)


def slow_reads() -> None:
    def preadv(*arguments: Any) -> int:
        time.sleep(0.002)
        return os.preadv(*arguments)

    read_through(preadv)


def wait_for_another_node() -> None:
    given = Hooks.await_apart
    Hooks.await_apart = lambda hooks, _, downs: given(hooks, "no_such_node-", downs)


def main(job: dict[str, Any]) -> dict[str, Any]:
    prefetch.PREFETCH_FROM_BYTES = 1  # tiny experts are guessed too
    parameters = PARAMETERS | {"n_parallel": job.get("n_parallel", 1)}
    parameters["n_ubatch"] = job.get("n_ubatch", 512)
    attachment = None
    if "slow" in job:
        slow_reads()
    if "unnamed" in job:
        wait_for_another_node()
    if job["memory"] is None:
        server = serve_plain(job["model"], **parameters)
    else:
        from flashmoe.engines.llama.hosts import xllamacpp as host

        server, attachment = host.serve(
            Path(job["model"]), memory=job["memory"], policy=job.get("policy", "lru"),
            warm=Path(job["warm"]) if "warm" in job else None, record="record" in job, **parameters,
        )  # fmt: skip
    address = server.listening_address
    mend = fail_reads(job["fail_after"]) if "fail_after" in job else None
    with ThreadPoolExecutor(parameters["n_parallel"]) as threads:
        answers = []
        for prompt in job["prompts"]:
            answers.append(threads.submit(ask, address, prompt))
            if mend:
                answers[-1].result()
                mend()
        result = {"answers": [answer.result() for answer in answers]}
    if attachment and attachment.engine:
        backend = attachment.engine.experts
        files = backend.files
        if "warm" in job:
            warm_start.save(attachment.engine.residency, Path(job["warm"]))
        if "record" in job:
            attachment.engine.trace(source="a test").save(job["record"])
        result["stats"] = attachment.engine.stats()
        result["layers_to_guess"] = attachment.lookahead.layers
        result["dense_bytes"] = backend.manifest.dense_bytes
        result["rss_bytes"] = sum(resident_bytes(f.base, f.base + f.size_bytes) for f in files)
        result["mapped"] = job["model"] in Path("/proc/self/maps").read_text()
    return result


if __name__ == "__main__":
    try:
        found = main(json.loads(sys.argv[1]))
    except FlashMoEError as error:
        found = {"refused": str(error)}
    print(json.dumps(found), flush=True)
    os._exit(0)  # the server's threads go on
