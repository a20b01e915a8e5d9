"""Which of several files of one model to run: the fastest that keeps four bits a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashmoe.engines.model_facts import ModelFacts
from flashmoe.plan import planner
from flashmoe.plan.machine import Machine
from flashmoe.plan.measured import Measured
from flashmoe.plan.planner import Request

LEAST_BITS = 4.0  # a weight, below which answers become clearly worse
_AS_FAST = 0.9  # of the fastest, among which the largest file is chosen


@dataclass(frozen=True)
class Candidate:
    """A file, and what is expected of it with the memory that is free."""

    file: str
    size_bytes: int
    bits_per_weight: float
    tokens_per_second: float | None  # None: it does not fit


def candidates(
    sizes: Mapping[str, int],
    facts: ModelFacts,
    machine: Machine,
    request: Request,
    figures: Measured,
) -> list[Candidate]:
    """Smallest first. facts: of any one of the files; the others differ in size alone."""
    found = []
    for file, size_bytes in sorted(sizes.items(), key=lambda item: item[1]):
        other = planner.resized(facts, size_bytes)
        rows = planner.outlooks(other, machine, request, figures)
        speeds = [row.tokens_per_second.expected for row in rows if row.fits]
        bits = 8 * size_bytes / facts.parameters
        found.append(Candidate(file, size_bytes, bits, max(speeds, default=None)))
    return found


def chosen(found: list[Candidate]) -> Candidate | None:
    """The largest of those that are nearly as fast as the fastest; None: no file fits."""
    fitting = [one for one in found if one.tokens_per_second]
    fine = [one for one in fitting if one.bits_per_weight >= LEAST_BITS] or fitting
    best = max((one.tokens_per_second or 0 for one in fine), default=0)
    fast = [one for one in fine if (one.tokens_per_second or 0) >= _AS_FAST * best]
    return max(fast, key=lambda one: one.size_bytes, default=None)
