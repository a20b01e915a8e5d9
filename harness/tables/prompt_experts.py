"""How many of a layer's experts a prompt needs, by its tokens: recorded routing, counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from flashmoe.trace import Trace
from harness.tables.full_scale import MODELS
from harness.tables.hit_rates import Case

TITLE = "prompt_experts"
TOKENS = (1, 4, 16, 64, 160, 256)
# Of these the rows of measured speed are, so they may not tell what to expect of them.
_OWN = {routing.sequence for routing in MODELS.values()}


def table(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row a trace and length; of sequences that are as long as that."""
    by_trace: dict[str, list[Trace]] = {}
    for case in cases:
        by_trace.setdefault(case.trace, []).append(case.routing)
    rows = []
    for name, parts in by_trace.items():
        for tokens in TOKENS:
            shares = [share for part in parts for share in _shares(part, tokens)]
            if shares:
                row = {"trace": name, "tokens": tokens, "sequences": len(shares)}
                rows.append(row | {"needed_share": fmean(shares)})
    return rows


def _shares(routing: Trace, tokens: int) -> Iterator[float]:
    """Of each sequence, the mean of its layers."""
    for name, (_, span) in zip(routing.names(), routing.sequences(), strict=True):
        chosen = routing.experts[span][:tokens]
        if len(chosen) == tokens and name not in _OWN:
            distinct = fmean(len(np.unique(layer)) for layer in chosen.swapaxes(0, 1))
            yield distinct / routing.n_experts
