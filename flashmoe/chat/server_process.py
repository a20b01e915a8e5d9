"""`flashmoe serve` as a child process, which ends with this one."""

from __future__ import annotations

import ctypes
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from flashmoe.errors import FlashMoEError

_HOST = "127.0.0.1"
_OURS = "flashmoe: "  # begins each sentence of ours
_PATIENCE_SECONDS = 3.0  # for its end
_AGAIN_SECONDS = 0.1  # between two looks whether it answers
_ANSWER_SECONDS = 5.0  # for /health and /metrics
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_libc = ctypes.CDLL(None)


class ServerProcess:
    """The server, while it is used as a context manager; to be entered in the main thread.

    It listens on free ports of loopback, with a key that only its environment holds.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """arguments: of `flashmoe serve`, without addresses and key."""
        self.api_key = secrets.token_urlsafe(32)
        self._port, self._page_port = _free_ports(2)
        # before the model and before `--`
        options = ["--port", str(self._port), "--page-port", str(self._page_port)]
        self._command = [sys.executable, "-P", "-m", "flashmoe", "serve", *options, *arguments]
        self._said: deque[str] = deque(maxlen=20)  # lines

    @property
    def url(self) -> str:
        """Of OpenAI's routes."""
        return f"http://{_HOST}:{self._port}/v1"

    def __enter__(self) -> ServerProcess:
        root = str(Path(__file__).parents[2])  # with -P, the working directory is not searched
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
            env=os.environ | {"FLASHMOE_API_KEY": self.api_key, "PYTHONPATH": ":".join(paths)},
            start_new_session=True,  # Ctrl-C of the terminal is not for it
            preexec_fn=partial(_end_with, os.getpid()),
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_until_ready(self, show: Callable[[str], object]) -> None:
        """Return once it answers; `show` gets how long it takes, and the line that it said last.

        Raises FlashMoEError where it ends instead.
        """
        started = time.monotonic()
        while self._get(self._port, "/health") is None:
            if self._process.poll() is not None:
                self._print_log()
                raise self._failure()
            said = self._said[-1].removeprefix(_OURS) if self._said else "the server starts"
            show(f"loading, {time.monotonic() - started:.0f} s: {said}")
            time.sleep(_AGAIN_SECONDS)

    def check(self) -> None:
        """Raises FlashMoEError where it has ended, or is just about to."""
        try:
            self._process.wait(_AGAIN_SECONDS)
        except subprocess.TimeoutExpired:
            return
        raise self._failure()

    def metrics(self) -> str | None:
        """Its counts as Prometheus reads them; None where it does not tell."""
        return self._get(self._page_port, "/metrics")

    def _get(self, port: int, path: str) -> str | None:
        """What is answered with status 200; not by way of a proxy."""
        connection = http.client.HTTPConnection(_HOST, port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.api_key}"})
            answer = connection.getresponse()
            return answer.read().decode(errors="replace") if answer.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:  # a progress bar's returns end lines too
            if text := "".join(filter(str.isprintable, line)).strip():
                self._said.append(text)

    def _failure(self) -> FlashMoEError:
        self._listener.join(_PATIENCE_SECONDS)
        status = self._process.returncode
        if status == -signal.SIGKILL:
            return FlashMoEError(
                "the server was killed, as the system does where memory runs out: give a smaller "
                "--memory"
            )
        if status < 0:
            return FlashMoEError(f"the server was ended by {signal.Signals(-status).name}")
        sentences = [line for line in self._said if line.startswith(_OURS)] or [*self._said]
        last = sentences[-1] if sentences else f"the server ended with status {status}"
        return FlashMoEError(last.removeprefix(_OURS))

    def _print_log(self) -> None:
        """What it said that is no sentence of ours, such as a library's reasons."""
        self._listener.join(_PATIENCE_SECONDS)
        for line in self._said:
            if not line.startswith(_OURS):
                print(line, file=sys.stderr)


def _end_with(parent: int) -> None:
    """In the child: be killed when the parent ends, however that does."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended by now
        os._exit(1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as until_known:
        bound = [until_known.enter_context(socket.create_server((_HOST, 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in bound]
