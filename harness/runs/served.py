"""A server of ours in a process of its own, asked as OpenAI's clients ask."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, NamedTuple

import psutil

from flashmoe.errors import FlashMoEError
from harness.runs import llama_client

START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 600.0, 600.0, 60.0
Prompt = str | list[int]  # text, or token ids where the server takes them


class Answer(NamedTuple):
    """Of one request, and how long it took as its client saw it."""

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float


class Usage(NamedTuple):
    """What the server's process takes."""

    threads: int
    descriptors: int
    anonymous_bytes: int  # memory of no file


class Served:
    """`flashmoe serve MODEL` until the `with` ends; its words go to a log file."""

    def __init__(self, model: Path, memory: str, log: Path, options: Sequence[str] = ()) -> None:
        """Raises FlashMoEError with its last words when it does not come up."""
        self.port, self.page_port = llama_client.free_port(), llama_client.free_port()
        command = [
            sys.executable, "-m", "flashmoe", "serve", str(model), "--memory", memory,
            "--port", str(self.port), "--page-port", str(self.page_port), *options,
        ]  # fmt: skip
        with open(log, "wb") as words:
            self.process = subprocess.Popen(command, stdout=words, stderr=words, text=True)
        if not llama_client.is_up(self.process, f"http://127.0.0.1:{self.port}", START_SECONDS):
            self.process.kill()
            last = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
            raise FlashMoEError(f"the server did not come up: {' '.join(last)}")

    def complete(self, prompt: Prompt, tokens: int) -> Answer:
        """The greedy continuation."""
        started = time.perf_counter()
        connection, response = self._ask(prompt, tokens)
        with closing(connection):
            answer = json.load(response)
        if response.status != 200:
            raise FlashMoEError(f"the server answered {response.status}: {answer}")
        seconds, usage = time.perf_counter() - started, answer["usage"]
        choice = answer["choices"][0]
        return Answer(choice["text"], usage["completion_tokens"], usage["prompt_tokens"], seconds)

    def stream(self, prompt: Prompt, tokens: int) -> tuple[str, list[float]]:
        """The same piece by piece, and when each came, in seconds since the request."""
        started = time.perf_counter()
        connection, response = self._ask(prompt, tokens, stream=True)
        text, times = "", []
        with closing(connection):
            for line in response:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and (piece := choices[0]["text"]):
                        text += piece
                        times.append(time.perf_counter() - started)
        return text, times

    def hang_up(self, prompt: Prompt, tokens: int) -> None:
        """Go away when the answer begins to come."""
        connection, response = self._ask(prompt, tokens, stream=True)
        with closing(connection):
            response.read(20)

    def _ask(
        self, prompt: Prompt, tokens: int, **options: Any
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection, connection.getresponse()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it somebody reads the live page's events, as a browser does."""
        connection = http.client.HTTPConnection("127.0.0.1", self.page_port)
        connection.request("GET", "/events")
        response = connection.getresponse()
        viewer = Thread(target=lambda: [None for _ in response], daemon=True)
        viewer.start()
        try:
            yield
        finally:
            connection.sock.shutdown(socket.SHUT_RDWR)
            viewer.join()
            connection.close()

    def usage(self) -> Usage:
        process = psutil.Process(self.process.pid)
        memory = process.memory_info()
        return Usage(process.num_threads(), process.num_fds(), memory.rss - memory.shared)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
