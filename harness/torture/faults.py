"""Drives that fail and machines that lose power: what comes of it, counted.

Reads: faults are put into the system call under the engine while a tiny model generates. Packing:
the process is killed, as by the kernel, before one of its own steps, every step in turn.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import transformers

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.reading.verify import verify
from flashmoe.store import manifest as manifests
from harness import tiny_models
from harness.runs.budget import budget_for

FAMILY = "olmoe"
KINDS = ("error", "short", "late", "wrong", "end")
OUTCOMES = ("right", "refused", "wrong", "hangs")
HARMLESS = ("short", "late")  # the output must be right all the same
ONE_IN = 40  # reads
TOKENS = 6
HANGS_AFTER_SECONDS = 60.0
# Every call by which a pack changes what is on disk.
STEPS = ("pwrite", "fsync", "replace", "unlink", "posix_fallocate", "mkdir")


class Faults:
    """In place of os.preadv: now and then, by a seed, something else than the drive's bytes."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.random = random.Random(seed)
        self.injected = 0
        self.read = os.preadv
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: Any, offset: int) -> int:
        with self._lock:
            struck = not self.random.randrange(ONE_IN)
            self.injected += struck
            at = self.random.random()
        if not struck:
            return self.read(descriptor, buffers, offset)
        view = memoryview(buffers[0])
        match self.kind:
            case "error":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case "end":
                return 0
            case "short":
                count = max(1, int(at * self.read(descriptor, buffers, offset)))
                view[count:] = bytes(len(view) - count)  # which did not come
                return count
            case "late":
                time.sleep(0.02 * at)
                return self.read(descriptor, buffers, offset)
        count = self.read(descriptor, buffers, offset)
        view[int(at * count)] ^= 1 << int(at * 8)
        return count


def reads(faults: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row a kind of fault, of at least `faults` of each: what the runs gave."""
    rows = []
    with TemporaryDirectory() as work, torch.inference_mode():
        store = _store(Path(work))
        ids = torch.arange(9)[None] + 3
        model = _load(store)
        expected = _generate(model, ids)
        model.flashmoe.close()
        for kind in KINDS:
            outcomes: Counter[str] = Counter()
            injected = runs = 0
            while injected < faults:
                runs += 1
                injector = Faults(kind, seed + runs)
                model = _load(store)
                outcome = _outcome(model, ids, expected, injector)
                outcomes[outcome] += 1
                injected += injector.injected
                if outcome != "hangs":
                    model.flashmoe.close()
            tally = {what: outcomes.pop(what, 0) for what in OUTCOMES}
            other = sum(outcomes.values())
            rows.append(
                {"fault": kind, "injected": injected, "runs": runs} | tally | {"other": other}
            )
    return rows


def _store(work: Path) -> Path:
    tiny_models.make(FAMILY).save_pretrained(work / "checkpoint")
    pack(work / "checkpoint", work / "store")
    return work / "store"


def _load(store: Path) -> transformers.PreTrainedModel:
    """With slots for two experts a layer, so that it reads all the time, and checks every read."""
    return flashmoe.load(store, memory=budget_for(store, 2), policy="lru", check_reads=True)


def _generate(model: transformers.PreTrainedModel, ids: torch.Tensor) -> list[int]:
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    tokens: list[int] = output[0].tolist()
    return tokens


def _outcome(
    model: transformers.PreTrainedModel, ids: torch.Tensor, expected: list[int], faults: Faults
) -> str:
    """Generate with faults, then once more without: a model outlives a failed read."""
    outcomes: list[str] = []

    def work() -> None:
        with torch.inference_mode():
            try:
                with patch.object(os, "preadv", faults):
                    outcomes.append("right" if _generate(model, ids) == expected else "wrong")
            except FlashMoEError as error:
                named = "expert" in str(error) and "MoE layer" in str(error)
                outcomes.append("refused" if named else f"unclear: {error}")
            except BaseException as error:
                outcomes.append(repr(error))
            if _generate(model, ids) != expected:
                outcomes.insert(0, "wrong")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(HANGS_AFTER_SECONDS)
    return "hangs" if thread.is_alive() else outcomes[0]


def kills(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row a situation: packing into a new place, and over a store that is there."""
    rows = []
    torch.set_num_threads(1)  # what forks must not have other threads at work
    with TemporaryDirectory() as work:
        checkpoint, store = Path(work) / "checkpoint", Path(work) / "store"
        tiny_models.make(FAMILY).save_pretrained(checkpoint)
        steps = _steps(lambda: pack(checkpoint, Path(work) / "counted"))
        for there in (False, True):
            outcomes: Counter[str] = Counter()
            for number in range(count):
                if there and not manifests.is_store(store):
                    pack(checkpoint, store)
                _killed(lambda: pack(checkpoint, store), 1 + (seed + number) % steps)
                outcomes[_state(store)] += 1
                if not there and store.exists():
                    pack(checkpoint, store)  # whatever lies there, packing again mends it
                    shutil.rmtree(store)
            rows.append(
                {
                    "before": "a store" if there else "nothing",
                    "kills": count,
                    "steps": steps,
                    **{what: outcomes[what] for what in ("no store", "whole store", "damaged")},
                }
            )
    return rows


def _steps(work: Callable[[], object]) -> int:
    """How many calls of STEPS `work` makes."""
    counter = _Killer(0)
    with counter:
        work()
    return counter.calls


class _Killer:
    """Kills this process before the `at`-th call of STEPS; at 0 it only counts."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0
        self._patches = [patch.object(os, name, self._counted(getattr(os, name))) for name in STEPS]

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return counted

    def __enter__(self) -> None:
        for each in self._patches:
            each.start()

    def __exit__(self, *_: object) -> None:
        for each in self._patches:
            each.stop()


def _killed(work: Callable[[], object], at: int) -> None:
    """Run `work` in a process of its own that is killed before its `at`-th step."""
    child = os.fork()
    if not child:
        try:
            with _Killer(at):
                work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _state(store: Path) -> str:
    """What lies there: nothing that passes for a store, one whose every byte is right, or worse."""
    if not manifests.is_store(store):
        return "no store"
    try:
        verify(store)
    except FlashMoEError:
        return "damaged"
    return "whole store"
