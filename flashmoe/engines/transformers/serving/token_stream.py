"""A generation's tokens, as text for whoever waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import response_events_to_chunks

from flashmoe.engines.transformers.serving import stop_texts


class Stopped(Exception):
    """A stop text was generated."""


class TokenStream:
    """What `generate` gives its tokens to, as a streamer.

    stops: texts before one of which it ends. check: raises where it is to break off.
    send: takes pieces of text, and what the parser of a model's answers makes of them; None:
        nobody reads along. on_first: called before the first token is passed on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        check: Callable[[], object] = lambda: None,
        send: Callable[[Any], object] | None = None,
        parser: Any = None,
    ) -> None:
        self.token_ids: list[int] = []
        self.on_first: Callable[[], object] = lambda: None
        self._tokenizer = tokenizer
        self._stops = stops
        self._check = check
        self._decode = DecodeStream([], skip_special_tokens=parser is None)
        self._send = send
        self._parser = parser
        self._waiting = ""  # may be the beginning of a stop text
        self._prompt_passed = False
        if parser is not None:
            self._send_events(parser.initial_events)

    @property
    def total_tokens(self) -> int:
        return len(self.token_ids)

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then a token at a time. Raises Stopped at a stop text."""
        self._check()
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        if not self.token_ids:
            self.on_first()
        for token_id in value.tolist():
            self.token_ids.append(token_id)
            if self._send or self._stops:
                self._pass_on(self._decode.step(self._tokenizer, token_id) or "")

    def end(self) -> None:
        """Called by `generate` at the end of a generation, and by hand after Stopped."""
        self._emit(self._waiting)
        self._waiting = ""
        if self._parser is not None:
            try:
                _, events = self._parser.finalize()
            except (ValueError, RuntimeError):  # it ended amid a tool call
                events = []
            self._send_events(events)

    def cancel(self) -> None:
        """Called by transformers' handlers when the client has gone, which `Jobs` sees itself."""

    def _pass_on(self, text: str) -> None:
        text = self._waiting + text
        before = stop_texts.cut(text, self._stops)
        stopped = len(before) < len(text)
        size = 0 if stopped else stop_texts.begun(text, self._stops)
        self._waiting = text[len(text) - size :]
        self._emit(before[: len(text) - size])
        if stopped:
            raise Stopped

    def _emit(self, text: str) -> None:
        if not text or self._send is None:
            return
        if self._parser is None:
            self._send(text)
        else:
            self._send_events(self._parser.feed(text))

    def _send_events(self, events: list[dict[str, Any]]) -> None:
        if self._send is not None:
            for chunk in response_events_to_chunks(events):
                self._send(chunk)
