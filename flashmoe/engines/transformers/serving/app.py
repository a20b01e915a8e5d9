"""Which path is answered by what."""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flashmoe.engines.transformers.serving.api_key import ApiKey
from flashmoe.engines.transformers.serving.errors import HANDLERS, Refused
from flashmoe.engines.transformers.serving.generations import Generations
from flashmoe.engines.transformers.serving.handlers import (
    AnswerHandler,
    ChatHandler,
    OneQueue,
    TextHandler,
)
from flashmoe.engines.transformers.serving.job import App, Jobs
from flashmoe.engines.transformers.serving.model_manager import OneModel

_HANDLERS = {
    "/v1/chat/completions": ChatHandler,
    "/v1/completions": TextHandler,
    "/v1/responses": AnswerHandler,
}


def build(manager: OneModel, generations: Generations, api_key: str | None) -> App:
    """The server as an ASGI application."""
    state = OneQueue(generations)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": manager.list_models()})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def load_model(_: Request) -> Response:
        return StreamingResponse(manager.load_model_streaming(), media_type="text/event-stream")

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/load_model", load_model, methods=["POST"]),
    ]
    for path, kind in _HANDLERS.items():
        endpoint = _answering(kind(manager, state))
        routes.append(Route(path, endpoint, methods=["POST"]))
    return ApiKey(Jobs(Starlette(routes=routes, exception_handlers=HANDLERS)), api_key)


def _answering(handler: Any) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except ValueError:
            raise Refused(400, "the request is not valid JSON") from None
        return await handler.handle_request(body, request.headers.get("x-request-id") or _id())

    return answer


def _id() -> str:
    return str(uuid.uuid4())
