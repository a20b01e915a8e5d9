"""Lines from standard input, answers to standard output, as a script wants them."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Callable
from contextlib import aclosing
from typing import NoReturn

from flashmoe.chat.conversation import Answer
from flashmoe.errors import FlashMoEError


class Plain:
    """A `Screen` for pipes and files: what a model thinks is left out.

    status: a line for standard error after each answer.
    """

    def __init__(self, runner: asyncio.Runner, status: Callable[[], str] | None) -> None:
        self._runner = runner
        self._status = status
        if isinstance(sys.stdin, io.TextIOWrapper):  # it is None where it is closed
            sys.stdin.reconfigure(errors="replace")

    def read(self) -> str | None:
        return (sys.stdin.readline() or None) if sys.stdin else None

    def show(self, pieces: Answer) -> None:
        self._runner.run(self._print(pieces))
        if self._status:
            self.say(self._status())

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def fail(self, error: FlashMoEError) -> NoReturn:
        raise error

    async def _print(self, pieces: Answer) -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                if not piece.is_reasoning:
                    print(piece.text, end="", flush=True)
        print(flush=True)
