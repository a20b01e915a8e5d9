"""Runs one job in a process of its own, limited by the kernel where the job says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flashmoe.errors import FlashMoEError
from flashmoe.store import folders
from flashmoe.store import manifest as manifests
from flashmoe.util import workers
from harness.runs import peers
from harness.runs.job import Job
from harness.runs.memory_cap import ReadLimit, memory_cap

Run = dict[str, Any]

OUT_OF_MEMORY = "out of memory"

workers.CONTEXT.set_forkserver_preload(["harness.runs.run"])


def run_alone(job: Job) -> Run:
    """What the job's system did.

    A run that the limit kills is an outcome, OUT_OF_MEMORY. Raises FlashMoEError with the
    process's last words when it fails otherwise.
    """
    if job.system in peers.available():
        return _limited(job)
    # beside the store: what a system writes there may be as large
    with tempfile.TemporaryDirectory(dir=job.store, ignore_cleanup_errors=True) as scratch:
        job = replace(job, scratch=Path(scratch))
        return _limited(job) if job.cap_bytes or job.read_bytes_per_second else _forked(job)


def _forked(job: Job) -> Run:
    """From a server that has imported torch: a new interpreter would take longer than the run."""
    here, there = workers.CONTEXT.Pipe(duplex=False)
    process = workers.CONTEXT.Process(target=_answer, args=(job, there))
    process.start()
    there.close()
    try:
        outcome, answer = here.recv()
    except EOFError:
        process.join()
        outcome, answer = "failed", f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if outcome != "ok":
        raise FlashMoEError(f"{job.system} failed: {answer}")
    limits = ("cap_bytes", "read_limit_bytes_per_second", "peak_memory_bytes")
    result: Run = json.loads(answer)
    return result | {"outcome": "ok"} | dict.fromkeys(limits)


def _answer(job: Job, there: Connection) -> None:
    workers.end_with_parent()
    workers.silence_stderr()
    from harness.runs.run import run

    try:
        there.send(("ok", json.dumps(run(job))))
    except Exception as error:
        there.send(("failed", str(error) or repr(error)))


def _limited(job: Job) -> Run:
    """In a new interpreter: of a forked one, the limit would not count what it was born with."""
    command = [*_program(job), job.to_json()]
    # a peer's environment has no harness installed
    paths = filter(None, (str(peers.ROOT), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with memory_cap(job.cap_bytes, _read_limits(job)) as cap:
        enter = cap.enter if cap else None
        done = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=enter, env=environment
        )
        if done.returncode == -signal.SIGKILL and cap and job.cap_bytes:
            result: Run = {"system": job.system, "outcome": OUT_OF_MEMORY}
        elif done.returncode:
            words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise FlashMoEError(f"{job.system} failed: {words[-1]}")
        else:
            result = json.loads(done.stdout.splitlines()[-1]) | {"outcome": "ok"}
        result["cap_bytes"] = job.cap_bytes if cap else None
        result["read_limit_bytes_per_second"] = job.read_bytes_per_second
        result["peak_memory_bytes"] = cap.peak_bytes() if cap else None
    return result


def _read_limits(job: Job) -> list[ReadLimit]:
    """Each drive that the store lies on is limited alike."""
    if not job.read_bytes_per_second:
        return []
    is_store = manifests.is_store(job.store)
    others = folders.listed(job.store, manifests.load(job.store)) if is_store else []
    return [ReadLimit(folder, job.read_bytes_per_second) for folder in (job.store, *others)]


def _program(job: Job) -> list[str]:
    if peer := peers.available().get(job.system):
        return peer.command
    return [sys.executable, "-m", "harness", "run", job.system, "--job"]
