"""The turns of a conversation, answered by a server that speaks OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import openai

from flashmoe.errors import FlashMoEError


class Piece(NamedTuple):
    """A part of an answer, as it comes."""

    text: str
    is_reasoning: bool = False  # what the model thinks before it answers
    tokens: int | None = None  # of the whole answer, at its end, where the server tells


Answer = AsyncGenerator[Piece, None]


class Conversation:
    """Questions and answers so far. An answer that breaks off stays as far as it came."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        model: str,
        system: str | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> None:
        """sampling: more of the request, by the client's names; None: as the server chooses."""
        self.turns: list[tuple[str, str]] = []
        self._client = client
        self._model = model
        self._system = system
        self._seed = seed
        self._sampling = {name: value for name, value in sampling.items() if value is not None}
        self._asked: tuple[str, int] | None = None  # the last question, and its turn's number
        self._attempt = 0  # to answer it

    def ask(self, question: str) -> Answer:
        """The answer. To be closed where it is not read to its end: the server then stops.

        Raises FlashMoEError where the server refuses or breaks off.
        """
        self._asked, self._attempt = (question, len(self.turns)), 0
        return self._answer(*self._asked)

    def ask_again(self) -> Answer:
        """Another answer to the last question, instead of the one there is.

        With a seed, by the seed's next number. Raises FlashMoEError where nothing was asked.
        """
        if self._asked is None:
            raise FlashMoEError("there is no question yet that could be answered anew")
        self._attempt += 1
        return self._answer(*self._asked)

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()
        self._asked = None

    async def _answer(self, question: str, number: int) -> Answer:
        request = self._sampling | {"messages": self._messages(question, number)}
        if self._seed is not None:
            request["seed"] = self._seed + self._attempt
        text = ""
        try:
            async with await self._client.chat.completions.create(
                model=self._model,
                stream=True,
                stream_options={"include_usage": True},
                **request,
            ) as chunks:
                async for chunk in chunks:
                    for piece in _pieces(chunk):
                        text += "" if piece.is_reasoning else piece.text
                        yield piece
        except Exception as error:  # of the connection the client's HTTP library has its own
            raise FlashMoEError(_sentence(error)) from None
        finally:
            if text:
                self.turns[number:] = [(question, text)]

    def _messages(self, question: str, number: int) -> list[dict[str, str]]:
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        for earlier, answer in self.turns[:number]:
            messages.append({"role": "user", "content": earlier})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": question}]


def _pieces(chunk: Any) -> list[Piece]:
    pieces = []
    for choice in chunk.choices[:1]:
        # llama-server's name for it, which the client passes on
        if reasoning := getattr(choice.delta, "reasoning_content", None):
            pieces.append(Piece(reasoning, is_reasoning=True))
        if choice.delta.content:
            pieces.append(Piece(choice.delta.content))
    if chunk.usage:
        pieces.append(Piece("", tokens=chunk.usage.completion_tokens))
    return pieces


def _sentence(error: Exception) -> str:
    """What the server says, without the client's words around it."""
    if isinstance(error, openai.APIConnectionError) or not isinstance(error, openai.APIError):
        return f"the server broke off ({error.__cause__ or error})"
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)
