"""What a system under test is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from flashmoe.engines.transformers.experts.lookahead import Lookahead
from flashmoe.errors import FlashMoEError
from flashmoe.reading.read_queue import Span
from flashmoe.trace import Trace


@dataclass(frozen=True)
class Setting:
    """What a system is given; `checkpoint` and `store` hold the same weights."""

    checkpoint: Path
    store: Path
    memory_bytes: int  # for experts, page cache included: however the system divides it
    profile: Trace | None = None  # routing of other text, for those that calibrate by one
    scratch: Path | None = None  # for files of its own; its runner removes what a kill leaves


class System(ABC):
    """One way of running a model that may not fit in memory; alone in its process."""

    name: ClassVar[str]
    residency: str  # what is where, for the table's reader
    uses_budget: ClassVar[bool] = True
    exact: ClassVar[bool] = True  # the output is the model's own
    lookahead: Lookahead | None = None  # what it guesses by, if it does, once loaded

    @classmethod
    def options(cls, argument: str) -> dict[str, object]:
        """Keyword arguments of __init__, from what follows the name: the 0.25 of `fiddler:0.25`.

        Raises FlashMoEError when the argument makes no sense; a system without this method takes
        none.
        """
        raise FlashMoEError(f"system {cls.name!r} takes no argument, so leave out ':{argument}'")

    @abstractmethod
    def load(self, setting: Setting) -> PreTrainedModel:
        """The model, ready to generate."""

    def reset_counts(self) -> None:  # noqa: B027  (some count nothing)
        """Called between warm-up and decode."""

    def stats(self) -> dict[str, Any]:
        """Counts since `reset_counts`, by the names of `engines.stats.Stats`; those it knows."""
        return {}

    def record_spans(self) -> list[Span]:
        """As `Engine.record_spans`; always empty where a system cannot tell."""
        return []

    def close(self) -> None:  # noqa: B027  (some hold nothing)
        """Give everything back."""
