"""How long one expert takes where it lies, by which it is computed there or copied first.

From Fiddler's paper: an expert that is not pinned is computed on the CPU, unless so many tokens
need it that copying its weights to the pinned tier, and computing there, is faster. Decided here:
the latencies are measured at start (the original's code ships constants for one machine), each as
a line in the number of tokens, of which a GPU's constant is the flat case.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from flashmoe.engines.transformers.experts.expert_arithmetic import expert_output
from flashmoe.quant import Parameters

_MEASURED_TOKENS = (1, 8, 32)
_REPEATS = 5


class Latencies(NamedTuple):
    """Seconds for one expert; computing is a line in the tokens: (a token's, constant part)."""

    cpu: tuple[float, float]
    pinned: tuple[float, float]
    copy: float

    def copies(self, tokens: int) -> bool:
        """Is copying to the pinned tier, to compute there, faster than computing on the CPU?"""
        on_cpu = self.cpu[0] * tokens + self.cpu[1]
        return on_cpu > self.copy + self.pinned[0] * tokens + self.pinned[1]


def measure(
    module: Any, mapped: Parameters, copy: Callable[[], Parameters], token: torch.Tensor
) -> Latencies:
    """On one expert, as if the mapped tier were all in DRAM, which the original assumes.

    copy: copies the expert to the pinned tier. token [1, width]: in the module's dtype.
    """
    pinned = copy()

    def line(parameters: Parameters) -> tuple[float, float]:
        seconds = []
        for tokens in _MEASURED_TOKENS:
            x = token.repeat(tokens, 1)
            seconds.append(
                _seconds(lambda x=x: expert_output(module, parameters, x))  # type: ignore[misc]
            )
        slope, constant = np.polyfit(_MEASURED_TOKENS, seconds, 1)
        return float(slope), float(constant)

    with torch.inference_mode():
        return Latencies(line(mapped), line(pinned), _seconds(copy))


def _seconds(work: Callable[[], object]) -> float:
    """The best of a few repetitions, the first of which warms up."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
