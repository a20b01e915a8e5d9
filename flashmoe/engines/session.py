"""What the commands ask of an engine: prompts, and a loaded model that continues them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flashmoe.engines.base import Engine
from flashmoe.errors import FlashMoEError
from flashmoe.residency import warm_start
from flashmoe.trace import Trace


class Continuation(NamedTuple):
    """A prompt with what a model continued it with."""

    text: str
    token_ids: list[int]
    new_tokens: int


def check_prompt(prompt: str) -> None:
    """Raises FlashMoEError for a prompt that no tokenizer can take."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise FlashMoEError("the prompt is not valid UTF-8: give it as plain text") from None
    if not prompt:
        raise FlashMoEError("the prompt is empty: give at least one character")


class Session(ABC):
    """Some prompts as tokens, and the model that continues them greedily; to be closed.

    The prompts are read before the model is loaded, which takes minutes.
    """

    engine: Engine

    @abstractmethod
    def generate(self, *, show: bool, count: Callable[[], object]) -> Continuation:
        """Continue the first prompt.

        show: print the text as it comes; of a chat, only the answer. count: called once a token.
        """

    @abstractmethod
    def record(self, *, probabilities: bool, guesses: bool, info: Mapping[str, Any]) -> Trace:
        """The routing of every prompt with its continuation, each a sequence.

        probabilities, guesses: keep these too. Raises FlashMoEError where the engine cannot.
        """

    def restore(self, path: Path) -> None:
        """Begin with the experts that an earlier run ended with (see `warm_start`)."""
        warm_start.restore(self.engine.residency, path)

    @abstractmethod
    def close(self) -> None:
        """End the model and its engine."""
