"""Who may ask: whoever knows the key."""

from __future__ import annotations

import hmac

from flashmoe.engines.transformers.serving.errors import shaped
from flashmoe.engines.transformers.serving.job import App, Message, Receive, Send

OPEN = ("/health",)


class ApiKey:
    """Passes on requests that carry `Authorization: Bearer KEY`, and answers 401 to others (ASGI).

    key: None passes on all. Whether the server lives is told to anybody.
    """

    def __init__(self, app: App, key: str | None) -> None:
        self.app = app
        self.expected = key and f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if self.expected and scope["type"] == "http" and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                sentence = "give the server's key: `Authorization: Bearer KEY`"
                answer = shaped(401, sentence, "invalid_api_key")
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)
