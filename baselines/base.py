"""What a system under test is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from flashmoe.lookahead import Lookahead


class System(ABC):
    """One way of running a model that may not fit in memory; alone in its process."""

    name: ClassVar[str]
    residency: ClassVar[str]  # what is where, for the table's reader
    uses_budget: ClassVar[bool] = True
    lookahead: Lookahead | None = None  # what it guesses by, if it does, once loaded

    @abstractmethod
    def load(self, checkpoint: Path, store: Path, memory_bytes: int) -> PreTrainedModel:
        """The model, ready to generate; `checkpoint` and `store` hold the same weights."""

    @abstractmethod
    def reset_counts(self) -> None:
        """Called between prefill and decode."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counts since `reset_counts`, by the names of `Engine.stats`; absent where unknown."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""
