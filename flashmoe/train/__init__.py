"""Training of policies, a file a kind. `kinds()` lists them; dropping in a file adds one."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from flashmoe.trace import Trace
from flashmoe.util.registry import discover


class Training(ABC):
    """Makes a policy file from traces."""

    name: ClassVar[str]

    @abstractmethod
    def run(
        self, traces: Sequence[Trace], out: Path, seed: int, report: Callable[[str], object]
    ) -> dict[str, Any]:
        """Train on `traces`, write `out`, return what is worth telling.

        `report` is given a line now and then. Raises FlashMoEError when the traces do not serve.
        """


@cache
def kinds() -> dict[str, type[Training]]:
    """Every kind of training by name."""
    return discover(sys.modules[__name__], Training)  # type: ignore[type-abstract]
