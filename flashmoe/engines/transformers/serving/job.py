"""One request on its way through the server, and whether its client still waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Gone(Exception):
    """Nobody waits for this generation any more."""


@dataclass
class Job:
    """What a request asks besides a GenerationConfig, and what came of it."""

    gone: threading.Event = field(default_factory=threading.Event)
    """Set once nobody waits for the answer: the client went away, or has it."""
    seed: int | None = None
    stops: tuple[str, ...] = ()
    cached_tokens: int = 0
    """Of the prompt: those that an earlier turn had computed."""

    def check_waiting(self) -> None:
        """Raises Gone when nobody waits."""
        if self.gone.is_set():
            raise Gone


current: ContextVar[Job] = ContextVar("flashmoe_job")


class Jobs:
    """Gives every request a `Job`, and ends its answering when its client goes away (ASGI)."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await self._answer(scope, body, receive, send)

    async def _answer(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        job = Job()
        current.set(job)
        hung_up = asyncio.ensure_future(receive())  # after the body nothing else can come
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await asyncio.shield(hung_up)

        answer = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({answer, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            job.gone.set()
            answer.cancel()
            hung_up.cancel()
            await asyncio.gather(answer, hung_up, return_exceptions=True)
