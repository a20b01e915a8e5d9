"""What drives, files and kills do to llama.cpp's server under the cache, counted.

A GGUF has no checksums, so a drive that gives wrong bytes unasked is not among the faults.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import tiny_gguf
from harness.torture.faults import OUTCOMES
from harness.torture.llama_server import Server

KINDS = ("error", "short", "late", "end")
CHANGES = ("touched", "cut short", "grown", "replaced", "removed")
HARMLESS = ("late", "replaced", "removed")  # the output must be right all the same
PROMPTS = ("a", "hello world, this is a prompt. " * 2)
_KILLED_WITHIN_SECONDS = 0.5


def serve(model: Path, log: Path, warm: Path | None = None) -> Server:
    """With memory for half of the experts, so that every request reads."""
    words = [str(model), str(model.stat().st_size // 2), *([str(warm)] if warm else [])]
    return Server([sys.executable, "-m", "harness.torture.llama_child", *words], log)


def order(server: Server, words: str) -> dict[str, Any]:
    """What the server's process answers to an order (see `llama_child`)."""
    assert server.process.stdin and server.process.stdout
    server.process.stdin.write(words + "\n")
    server.process.stdin.flush()
    answer: dict[str, Any] = json.loads(server.process.stdout.readline())
    return answer


def _expected(server: Server) -> list[list[int]]:
    return [server.ask(prompt)["tokens"] for prompt in PROMPTS]


def _outcome(server: Server, number: int, expected: list[list[int]]) -> str:
    """Of one request: a refusal counts only with one sentence more, and at once."""
    before = len(server.sentences())
    which = number % len(PROMPTS)
    try:
        answer = server.ask(PROMPTS[which])
    except TimeoutError:
        return "hangs"
    except OSError as error:
        return repr(error)
    said = server.sentences()[before:]
    if "status" in answer:
        one = len(said) == 1 and said[0].startswith("this request fails: ")
        return "refused" if answer["status"] == 500 and one else f"unclear: {said}"
    if said:
        return f"right, but said {said}"
    return "right" if answer["tokens"] == expected[which] else "wrong"


def _row(named: dict[str, Any], outcomes: Counter[str]) -> dict[str, Any]:
    tally = {what: outcomes.pop(what, 0) for what in OUTCOMES}
    return named | tally | {"other": ", ".join(outcomes)}


def reads(faults: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row a kind of fault, of at least `faults` of each: how requests ended, and the next ones.

    Each request that met a fault is followed by one that meets none and must be right.
    """
    rows = []
    with TemporaryDirectory() as work:
        model = tiny_gguf.write(Path(work) / "model.gguf")
        with serve(model, Path(work) / "log") as server:
            expected = _expected(server)
            for kind in KINDS:
                outcomes: Counter[str] = Counter()
                injected = requests = 0
                while injected < faults:
                    requests += 1
                    order(server, f"fault {kind} {seed + requests}")
                    outcome = _outcome(server, requests, expected)
                    injected += order(server, "mend")["injected"]
                    after = _outcome(server, requests + 1, expected)
                    outcomes[outcome if after == "right" else f"then {after}"] += 1
                named = {"fault": kind, "injected": injected, "requests": requests}
                rows.append(_row(named, outcomes))
    return rows


def changes(count: int) -> list[dict[str, Any]]:
    """A row a change of the file under a running server; as it was again, requests are right."""
    rows = []
    with TemporaryDirectory() as work:
        original = tiny_gguf.write(Path(work) / "original.gguf")
        model, open_one = Path(work) / "model.gguf", Path(work) / "open.gguf"
        shutil.copy2(original, model)
        open_one.hardlink_to(model)  # so that it can be had back where it was
        with serve(model, Path(work) / "log") as server:
            expected = _expected(server)
            for change in CHANGES:
                outcomes: Counter[str] = Counter()
                for number in range(count):
                    _change(model, change)
                    outcome = _outcome(server, number, expected)
                    _undo(model, open_one, original)
                    after = _outcome(server, number + 1, expected)
                    outcomes[outcome if after == "right" else f"then {after}"] += 1
                rows.append(_row({"file": change, "requests": count}, outcomes))
    return rows


def _change(model: Path, change: str) -> None:
    size = model.stat().st_size
    match change:
        case "touched":
            os.utime(model)
        case "cut short":
            os.truncate(model, size // 2)
        case "grown":
            os.truncate(model, size + 4096)
        case "replaced":  # by other bytes under the same name: the server's is open still
            other = model.with_suffix(".new")
            other.write_bytes(bytes(size))
            other.replace(model)
        case "removed":
            model.unlink()


def _undo(model: Path, open_one: Path, original: Path) -> None:
    with open(original, "rb") as source, open(open_one, "r+b") as file:
        shutil.copyfileobj(source, file)
        file.truncate()
    shutil.copystat(original, open_one)
    model.unlink(missing_ok=True)
    model.hardlink_to(open_one)


def kills(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Servers killed while they answer and keep what is resident; what the next one finds."""
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    kept = 0
    with TemporaryDirectory() as work:
        model = tiny_gguf.write(Path(work) / "model.gguf")
        warm, log = Path(work) / "kept.npz", Path(work) / "log"
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        with serve(model, log) as server:
            expected = _expected(server)
        for number in range(count):
            with serve(model, log, warm) as server:
                # first of all: does it begin well where the last one was killed?
                outcome = _outcome_of_start(server, number, expected)
                work_on = threading.Thread(target=_use, args=(server,), daemon=True)
                work_on.start()
                time.sleep(chance.random() * _KILLED_WITHIN_SECONDS)
                server.process.kill()
                work_on.join()
            if hashlib.sha256(model.read_bytes()).hexdigest() != digest:
                outcome = "the file changed"
            kept += warm.exists()
            outcomes[outcome] += 1
    return [_row({"kills": count, "kept": kept}, outcomes)]


def _outcome_of_start(server: Server, number: int, expected: list[list[int]]) -> str:
    answer = server.ask(PROMPTS[number % len(PROMPTS)])
    said = [line for line in server.sentences() if "for experts" not in line]
    if said:
        return f"said {said}"
    return "right" if answer.get("tokens") == expected[number % len(PROMPTS)] else "wrong"


def _use(server: Server) -> None:
    """Until it is killed."""
    with suppress(OSError, ValueError):
        while True:
            server.ask(PROMPTS[0])
            for _ in range(20):
                order(server, "save")
