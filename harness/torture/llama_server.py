"""A server of llama.cpp in a process of its own, with the cache or without: start, ask, stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from flashmoe.errors import FlashMoEError
from harness.runs import llama_client

START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 120.0, 60.0, 60.0
# One thread and one size of step, so that two runs multiply alike; repacked weights do not.
ALIKE = ("-t", "1", "-ub", "128", "--no-warmup", "--no-repack", "-ngl", "0")


def under_flashmoe(memory: int | str, *options: str, policy: str = "lru") -> list[str]:
    """The words before a program's own."""
    return [
        sys.executable, "-m", "flashmoe", "run", "--memory", str(memory), "--policy", policy,
        *options,
    ]  # fmt: skip


class Server:
    """Runs until the `with` ends; what it writes to stderr is kept in a file."""

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        arguments: Sequence[str] = (),
        before: Callable[[], None] | None = None,
    ) -> None:
        """command: takes `--port N` and `arguments` at its end; before: runs in the new process.

        Raises FlashMoEError with its last words when it does not come up.
        """
        port = llama_client.free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.log = log
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                preexec_fn=before,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self) -> None:
        if llama_client.is_up(self.process, self.address, START_SECONDS):
            return
        words = self.words().strip().splitlines()[-1:] or [f"status {self.process.poll()}"]
        raise FlashMoEError(f"the server did not come up: {words[0]}")

    def words(self) -> str:
        """What it has written to stderr."""
        return self.log.read_text("utf-8", errors="replace")

    def sentences(self) -> list[str]:
        """Those of FlashMoE's among its words."""
        lines = self.words().splitlines()
        return [line.removeprefix("flashmoe: ") for line in lines if line.startswith("flashmoe: ")]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=ANSWER_SECONDS) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer, or {"status": N} of a refusal; raises OSError where there is none."""
        return llama_client.post(self.address, path, body, ANSWER_SECONDS)

    def ask(self, prompt: str, **options: Any) -> dict[str, Any]:
        """Greedy tokens with their likeliest rivals, or the status of the failure."""
        return llama_client.ask(self.address, prompt, seconds=ANSWER_SECONDS, **options)

    def ask_all(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """All at once."""
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(self.ask, prompts))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after this signal."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with suppress(BrokenPipeError):  # an order that it has not read
                    stream.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
