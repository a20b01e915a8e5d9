"""What transformers' handlers leave out of answers: the tokens that were kept, a stream's end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from flashmoe.engines.transformers.serving.job import Job

_EVENT = "data: "


def completed(answer: Response, job: Job, *, last: str = "") -> Response:
    """The same answer with them. last: an event that OpenAI's streams end with."""
    if isinstance(answer, StreamingResponse):
        answer.body_iterator = _stream(answer.body_iterator, job, last)
        return answer
    content = json.loads(bytes(answer.body))
    _tell_cached(content, job)
    return JSONResponse(content)


async def _stream(parts: Any, job: Job, last: str) -> AsyncIterator[str]:
    async for part in parts:
        if '"usage":{' in part:  # a quotation mark within a text is written \"
            events = [_event(event, job) for event in part.split("\n\n")]
            yield "\n\n".join(events)
        else:
            yield part
    if last:
        yield f"{_EVENT}{last}\n\n"


def _event(event: str, job: Job) -> str:
    if not event.startswith(_EVENT):
        return event
    content = json.loads(event.removeprefix(_EVENT))
    _tell_cached(content, job)
    return _EVENT + json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _tell_cached(content: dict[str, Any], job: Job) -> None:
    """Into the usage of a chat, of a completion, of a response or of a response's event."""
    if usage := content.get("usage") or content.get("response", {}).get("usage"):
        name = "input_tokens_details" if "input_tokens" in usage else "prompt_tokens_details"
        usage[name] = {**usage.get(name, {}), "cached_tokens": job.cached_tokens}
