"""The server of the live page and of `/metrics`, in a thread of this process."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.engines.base import Engine
from flashmoe.errors import FlashMoEError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from flashmoe.monitor.sampler import Sampler

_LIBRARIES = ("prometheus_client", "starlette", "uvicorn")
_PAGE = Path(__file__).parent / "page"
_PATIENCE_SECONDS = 5.0  # for the thread's end
_AGAIN_SECONDS = 0.5  # between two looks for a model


class Monitor:
    """Shows one engine, whichever it is, while it is used as a context manager.

    Before there is a model the page says so. While nobody looks, the engine keeps
    nothing for it.
    """

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        """port: 0 takes a free one. api_key: what counts and page need; None: nothing.

        Raises FlashMoEError where the libraries of the `server` extra are not installed.
        """
        try:
            for library in _LIBRARIES:
                import_module(library)
        except ImportError as error:
            raise FlashMoEError(
                f"{error.name} is not installed: pip install 'flashmoe-ssd[server]'"
            ) from None
        self._host, self._port, self._api_key = host, port, api_key
        self._sampler: Sampler | None = None
        self._ended = False

    @property
    def url(self) -> str:
        """Where the page is, without the key."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/"

    def watch(self, engine: Engine, name: str = "") -> None:
        """Show this engine from now on, as `name` or as its path.

        The first time on a machine, it compiles for seconds.
        """
        from flashmoe.monitor.sampler import Sampler
        from flashmoe.monitor.shadows import rehearse

        rehearse(engine)
        self._sampler = Sampler(engine, name or engine.path.name)

    def __enter__(self) -> Monitor:
        """Raises FlashMoEError where the address cannot be had."""
        import uvicorn

        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listening = socket.create_server((self._host, self._port), family=family)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FlashMoEError(
                f"the live page cannot have {self._host}:{self._port} ({reason}): choose another "
                "port for it"
            ) from None
        self._port = listening.getsockname()[1]
        config = uvicorn.Config(
            self._app(), access_log=False, log_level="error", lifespan="off", ws="none",
            loop="asyncio", http="h11", timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listening],), name="flashmoe-monitor", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = self._server.should_exit = True
        self._thread.join(_PATIENCE_SECONDS)

    def _app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles

        return Starlette(
            routes=[
                Route("/metrics", self._metrics),
                Route("/events", self._events),
                Mount("/", StaticFiles(directory=_PAGE, html=True)),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request without the key."""
        from starlette.responses import PlainTextResponse

        if self._api_key is None:
            return None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else request.query_params.get("key", "")
        if hmac.compare_digest(given.strip().encode(), self._api_key.encode()):
            return None
        return PlainTextResponse(
            "the API key is missing or wrong: send it as a Bearer token, or as ?key=\n", 401,
            {"WWW-Authenticate": "Bearer"},
        )  # fmt: skip

    def _metrics(self, request: Request) -> Response:
        from starlette.responses import Response

        from flashmoe.monitor.metrics import exposition

        if refusal := self._refusal(request):
            return refusal
        sampler, accept = self._sampler, request.headers.get("accept", "")
        engine, name = (sampler.engine, sampler.name) if sampler else (None, "")
        body, content_type = exposition(engine, name, accept)
        return Response(body, headers={"Content-Type": content_type})

    async def _events(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        return self._refusal(request) or StreamingResponse(
            self._stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def _stream(self) -> AsyncIterator[str]:
        """Server-sent events, until the viewer goes away or there is another engine to show."""
        from flashmoe.monitor.sampler import INTERVAL_SECONDS

        while (sampler := self._sampler) is None:
            yield _event("waiting", {})
            await asyncio.sleep(_AGAIN_SECONDS)
            if self._ended:
                return
        joined = asyncio.get_running_loop().run_in_executor(None, sampler.join)
        try:
            yield _event("model", await asyncio.shield(joined))
            while sampler is self._sampler and not self._ended:
                # in a thread, since it waits for the engine's lock
                yield _event("frame", await asyncio.to_thread(sampler.frame))
                await asyncio.sleep(INTERVAL_SECONDS)
        finally:
            joined.add_done_callback(
                lambda _: threading.Thread(target=sampler.leave, daemon=True).start()
            )


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
