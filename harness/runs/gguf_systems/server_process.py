"""Starts llama-server under a limit, asks it to go on with a prompt, and stops it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flashmoe.engines.llama.decode_event import rehearse
from flashmoe.errors import FlashMoEError
from harness.runs import llama_client
from harness.runs.gguf_systems import Work, capped_program
from harness.runs.memory_cap import memory_cap
from harness.runs.process_usage import drive_bytes

START_SECONDS, ANSWER_SECONDS = 120, 600
_OURS_FAILS = "flashmoe: this request fails: "


@cache
def compile_ours() -> None:
    """What a machine compiles once, so that no run's start pays for it."""
    rehearse("learned")


@dataclass(frozen=True)
class ServerRun:
    """One server, once. `memory` is FlashMoE's budget; None: the program without FlashMoE.

    trace: where FlashMoE records the routing.
    """

    program: Path
    model: Path
    memory: str | None
    prompt: list[int]  # token ids
    new_tokens: int
    cap_bytes: int | None = None
    arguments: tuple[str, ...] = ()
    trace: Path | None = None

    def command(self, port: int) -> list[str]:
        own = [str(self.program), "-m", str(self.model), "--port", str(port), *self.arguments]
        if self.memory is None:
            return own
        record = ["--record", str(self.trace)] if self.trace else []
        ours = [sys.executable, "-m", "flashmoe", "run", "--memory", self.memory, "--stats"]
        return [*ours, *record, *own]

    def measure(self) -> dict[str, Any]:
        """Tokens, the server's own times, and the kernel's peak.

        To be killed by the limit, or not to be ready in START_SECONDS, is an outcome.

        Raises FlashMoEError when it fails otherwise, with FlashMoE's sentence or the program's
        last words, or wrote no trace.
        """
        port = llama_client.free_port()
        with memory_cap(self.cap_bytes) as cap:
            started = time.perf_counter()
            process = capped_program.start(self.command(port), cap, stdout=subprocess.DEVNULL)
            try:
                answer = self._ask(process, port, started)
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    _, errors = process.communicate(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    _, errors = process.communicate()
                    if answer["outcome"] == "failed":
                        answer["outcome"] = "failed, and did not end"
            answer["peak_memory_bytes"] = cap.peak_bytes() if cap else None
        said = errors.strip().splitlines() or ["it said nothing"]
        if answer["outcome"] == "failed":
            if process.returncode == -signal.SIGKILL and self.cap_bytes:
                return answer | {"outcome": "out of memory"}
            last = f"{said[-1]} (status {process.returncode})"
            why = next((line for line in said if _OURS_FAILS in line), last)
            why = why.replace(f"{self.model.parent}/", "")  # a table tells no one's folders
            raise FlashMoEError(f"{self.program.name} failed: {why}")
        if answer["outcome"] == "ok" and self.memory and self.trace:
            if not self.trace.exists():
                raise FlashMoEError(f"{self.program.name} wrote no trace: {said[-1]}")
            answer["trace"] = self.trace
        return answer | _stats(errors)

    def _ask(self, process: subprocess.Popen[str], port: int, started: float) -> dict[str, Any]:
        address = f"http://127.0.0.1:{port}"
        if not llama_client.is_up(process, address, START_SECONDS):
            late = process.poll() is None
            return {"outcome": f"not ready in {START_SECONDS} s" if late else "failed"}
        ready_seconds = time.perf_counter() - started
        body = {
            "prompt": self.prompt, "n_predict": self.new_tokens, "temperature": 0,
            "cache_prompt": False, "return_tokens": True, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        request = llama_client.request(address, "/completion", body)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                # it decodes from the first token on
                tokens: list[int] = []
                reads: list[int] = []
                answer: dict[str, Any] = {}
                for line in response:
                    if line.startswith(b"data: {"):
                        answer = json.loads(line.removeprefix(b"data: "))
                        tokens += answer.get("tokens", [])
                        begun = answer.get("tokens") or answer.get("content")
                        if answer.get("stop") or (begun and not reads):
                            reads.append(drive_bytes(process.pid))
        except TimeoutError:
            return {"outcome": f"no answer in {ANSWER_SECONDS} s"}
        except OSError:
            return {"outcome": "failed"}
        if "timings" not in answer:
            return {"outcome": "failed"}
        times = answer["timings"]
        # the prompt gave the first token, before the server's clock of decode began
        steps = times["predicted_n"] - 1
        return {
            "outcome": "ok",
            "token_ids": tokens,
            "bytes_per_token": (reads[-1] - reads[0]) / steps if len(reads) > 1 and steps else None,
            "ready_seconds": ready_seconds,
            "prompt_seconds": times["prompt_ms"] / 1e3,
            "tokens_per_second": steps / times["predicted_ms"] * 1e3 if steps else None,
        }


def _stats(errors: str) -> dict[str, Any]:
    """What `flashmoe run --stats` said at its end, if it ran."""
    for line in reversed(errors.splitlines()):
        if line.startswith('{"policy"'):
            stats = json.loads(line)
            names = ("slots_per_layer", "hit_rate", "bytes_read", "wait_seconds", "memory_bytes")
            return {name: stats[name] for name in names}
    return {}


def measure(
    work: Work, program: Path, *arguments: str, memory: str | None = None
) -> dict[str, Any]:
    """One run of `program` that others can be compared with: one slot, no warm-up."""
    if memory:
        compile_ours()
    sizes = ("-c", str(work.context_tokens), "-t", str(work.threads))
    same = ("-np", "1", "--no-warmup", "-ngl", "0", *sizes)
    return ServerRun(
        program,
        work.model,
        memory,
        list(work.prompt),
        work.new_tokens,
        work.cap_bytes,
        (*same, *arguments),
        work.trace,
    ).measure()
