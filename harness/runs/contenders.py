"""Everything that can be compared on the same weights, whichever files it reads, in one form."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import baselines
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest as manifests
from harness.runs import gguf_file, gguf_systems, peers
from harness.runs.gguf_systems import System, Work, user_engine
from harness.runs.gguf_systems.llama_server import PLAIN
from harness.runs.isolated_run import run_alone
from harness.runs.job import STEERED_TOKENS, Job, prompt_ids

STORE = "store"  # and peers.CHECKPOINT, peers.GGUF: what a contender reads
OURS = "flashmoe"
PYTHON_SYSTEMS = (OURS, "flashmoe-fast", "fiddler", "daop", "os-paging", "accelerate-disk")
DECODED_TOKENS = 48  # by every system, from the first on: the prompt is the warm-up
DECODE_SECONDS = 60.0  # slow Python systems stop then
Run = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run under one limit.

    base: the job of a Python system, but for what the case says. beside_bytes: of the limit, what
    is neither the model's dense part nor its experts.
    """

    base: Job
    files: dict[str, Path]  # by kind
    cap_bytes: int
    beside_bytes: int
    prompt_tokens: int
    only_first: bool  # the first token is all that is asked for


@dataclass(frozen=True)
class Contender:
    """A system by the name that its rows bear.

    files: the kind that it reads. like: whose tokens its own are to be. run: raises FlashMoEError
    where the system fails. gives: `outcome`, and where that is "ok" the columns' figures.
    """

    name: str
    files: str
    like: str
    run: Callable[[Case], Run]
    identity: str = ""  # what else the journal must know it by
    clock: str = gguf_systems.SERVER


def available(programs: Path | None, engines: Sequence[str]) -> tuple[list[Contender], list[str]]:
    """All contenders that can run here, and why the others cannot, a sentence each.

    programs: a folder with llama.cpp's programs. engines: users' own, `NAME=command ...` each.
    """
    found = [
        Contender(name, peers.CHECKPOINT if name == "accelerate-disk" else STORE, OURS,
                  partial(_python, name))
        for name in PYTHON_SYSTEMS
    ]  # fmt: skip
    reasons = []
    for peer in peers.available().values():
        if peer.installed():
            like = PLAIN if peer.files == peers.GGUF else OURS
            found.append(Contender(peer.name, peer.files, like, partial(_peer, peer)))
        else:
            reasons.append(f"{peer.name} is left out: its library is not installed")
    for system in gguf_systems.available().values():
        if not system.usual:
            continue
        if not system.installed():
            what = f"program that has {system.option}" if system.option else "program"
            reasons.append(f"{system.name} is left out: {system.program} names no {what}")
        elif programs is None and not system.program:
            reasons.append(f"{system.name} is left out: --programs names no build of llama.cpp")
        else:
            found.append(_of_gguf(system, programs or Path()))
    for system, named in zip(user_engine.systems(engines), engines, strict=True):
        found.append(replace(_of_gguf(system, programs or Path()), identity=named))
    return found, reasons


def _of_gguf(system: System, programs: Path) -> Contender:
    run = partial(_gguf, system, programs)
    return Contender(system.name, peers.GGUF, PLAIN, run, clock=system.clock)


def _python(name: str, case: Case) -> Run:
    store = case.files[STORE]
    checkpoint = case.files.get(peers.CHECKPOINT, store)  # only who reads it has to have it
    job = replace(_job(case), system=name, checkpoint=checkpoint, store=store)
    manifest = manifests.load(job.store)
    memory_bytes = case.cap_bytes - manifest.dense_bytes - case.beside_bytes
    if memory_bytes <= 0 and baselines.get(name).system_class.uses_budget:
        raise FlashMoEError("the limit leaves nothing for experts")
    return _columns(run_alone(replace(job, memory_bytes=memory_bytes)))


def _peer(peer: peers.Peer, case: Case) -> Run:
    job = replace(_job(case), system=peer.name, checkpoint=case.files[peer.files])
    return _columns(run_alone(job))


def _job(case: Case) -> Job:
    return replace(
        case.base,
        cap_bytes=case.cap_bytes,
        prompt_tokens=case.prompt_tokens,
        forced=case.prompt_tokens <= STEERED_TOKENS,  # no more was recorded
        warm_up_tokens=0,
        new_tokens=1 if case.only_first else DECODED_TOKENS - 1,  # the prompt gives one
        decode_seconds=None if case.only_first else DECODE_SECONDS,
    )


def _columns(run: Run) -> Run:
    """What a job's process says, under the names of a comparison's columns."""
    if run["outcome"] != "ok":
        return {"outcome": run["outcome"]}
    parts = run.get("experts_seconds"), run.get("rest_of_model_seconds")
    return {
        "outcome": "ok",
        "tokens_per_second": run["tokens_per_second"],
        "first_token_seconds": run["first_token_seconds"],
        "load_seconds": run["load_seconds"],
        "bytes_per_token": run["device_bytes_per_token"],
        "peak_memory_bytes": run["peak_memory_bytes"],
        "hit_rate": run.get("hit_rate"),
        "token_ids": run["token_ids"][run["prompt_tokens"] :],
        "arithmetic_seconds": None if None in parts else sum(parts),  # type: ignore[arg-type]
    }


def _gguf(system: System, programs: Path, case: Case) -> Run:
    model = case.files[peers.GGUF]
    dense_bytes, _ = gguf_file.sizes(model)
    prompt = tuple(prompt_ids(case.prompt_tokens))
    new_tokens = 2 if case.only_first else DECODED_TOKENS  # a rate needs two
    threads = os.cpu_count() or 1
    run = system.run(
        Work(programs, model, dense_bytes, prompt, new_tokens, threads, case.cap_bytes)
    )
    if run["outcome"] != "ok":
        return {"outcome": run["outcome"]}
    names = (
        *("outcome", "tokens_per_second", "bytes_per_token", "peak_memory_bytes", "hit_rate"),
        *("token_ids", "own_tokens_per_second"),
    )
    return {name: run.get(name) for name in names} | {
        "first_token_seconds": run.get("prompt_seconds"),
        "load_seconds": run.get("ready_seconds"),
    }
