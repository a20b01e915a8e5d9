"""uvicorn, which ends cleanly when it is told to."""

from __future__ import annotations

import socket
from types import FrameType
from typing import Any

import uvicorn

from flashmoe.engines.transformers.serving.generations import Generations

_LAST_SECONDS = 5  # for a client that does not read the end of its answer


class Server(uvicorn.Server):
    """Answers on a bound socket until `should_exit`, Ctrl-C or SIGTERM.

    generations: end then, and their clients are told.
    """

    def __init__(self, app: Any, bound: socket.socket, generations: Generations) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                access_log=False,
                log_level="warning",
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        self.port: int = bound.getsockname()[1]
        self._bound = bound
        self.generations = generations

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or [self._bound])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.generations.stop()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's, it does not raise the signal again once the server has ended."""
        self.force_exit = self.should_exit
        self.should_exit = True
