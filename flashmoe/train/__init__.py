"""Training of policies, one file a kind. `kinds()` lists them; a new file adds one."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from flashmoe.trace import Trace
from flashmoe.util.registry import discover

Report = Callable[[str], object]  # is given a line of progress now and then


class Training(ABC):
    """Makes a policy file from traces."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, traces: Sequence[Trace], out: Path, seed: int, report: Report) -> dict[str, Any]:
        """Train on `traces`, write the policy file `out`, and return the training's losses.

        Raises FlashMoEError when the traces are too few, too many or too short.
        """


@cache
def kinds() -> dict[str, type[Training]]:
    """Every kind of training by name."""
    return discover(sys.modules[__name__], Training)  # type: ignore[type-abstract]
