"""What is wrong with a request, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

SERVER_ERROR = 500


class Refused(HTTPException):
    """A request that is not answered: a status, a sentence and OpenAI's word for the reason."""

    def __init__(self, status: int, sentence: str, code: str | None = None) -> None:
        super().__init__(status, sentence)
        self.code = code


class Failed(Exception):
    """A generation that broke off, through no fault of the request: a sentence."""


def shaped(status: int, sentence: str, code: str | None = None) -> JSONResponse:
    """The answer that OpenAI's clients take for an error."""
    kind = "invalid_request_error" if status < SERVER_ERROR else "server_error"
    error = {"message": sentence, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and quotation marks.

    transformers puts it between quotation marks into a stream.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace("\\", "/").replace('"', "'")


async def on_refused(_: Request, error: Exception) -> JSONResponse:
    """Of an HTTPException, which transformers' handlers raise too."""
    assert isinstance(error, HTTPException)
    return shaped(error.status_code, str(error.detail), getattr(error, "code", None))


async def on_failed(_: Request, error: Exception) -> JSONResponse:
    """Of any other error."""
    return shaped(SERVER_ERROR, one_line(error))


HANDLERS: dict[Any, Any] = {
    HTTPException: on_refused,
    Failed: on_failed,
    Exception: on_failed,
}
