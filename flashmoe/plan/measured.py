"""What the formula takes from committed tables: `python -m harness plan` writes measured.json."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flashmoe.engines.model_facts import ModelFacts

FILE = Path(__file__).with_name("measured.json")
LEARNED = "learned"  # the policy that the curves are of


@dataclass(frozen=True)
class Curve:
    """The hit rate by the share of experts in memory: recorded routing, replayed, cold starts."""

    trace: str
    real: bool  # a model's own routing; else of a small model of its geometry
    geometry: tuple[int, int, int]  # layers, experts of a layer, experts a token
    shares: tuple[float, ...]
    hit_rates: tuple[float, ...]

    def at(self, share: float) -> float:
        """Between the points in a straight line; nothing hits at 0, everything at 1."""
        xs, ys = (0.0, *self.shares, 1.0), (0.0, *self.hit_rates, 1.0)
        if share >= 1:
            return 1.0
        right = bisect_right(xs, share)
        part = (share - xs[right - 1]) / (xs[right] - xs[right - 1])
        return ys[right - 1] + part * (ys[right] - ys[right - 1])


@dataclass(frozen=True)
class Measured:
    """Everything in measured.json: by engine, but for the speeds of a core (see `core_speed`)."""

    source: str
    curves: tuple[Curve, ...]
    core_bytes_per_second: dict[str, float]
    layer_seconds: dict[str, float]
    serial_share: dict[str, float]
    prompt_gain: dict[str, float]
    # What was measured lay in eight of ten rows between so many times what was predicted.
    token_range: dict[str, tuple[float, float]]
    first_token_range: dict[str, tuple[float, float]]


@cache
def load(path: Path = FILE) -> Measured:
    document = json.loads(path.read_text())
    curves = (
        Curve(**one | {name: tuple(one[name]) for name in ("geometry", "shares", "hit_rates")})
        for one in document.pop("curves")
    )
    return Measured(curves=tuple(curves), **document)


def curves_for(measured: Measured, facts: ModelFacts) -> list[Curve]:
    """Those of models of this geometry, whose routing was recorded; of all where there is none."""
    geometry = (facts.layers, facts.n_experts, facts.top_k)
    real = [curve for curve in measured.curves if curve.real]
    return [curve for curve in real if curve.geometry == geometry] or real


def kind_of(facts: ModelFacts, arithmetic: str) -> str:
    """The most telling key of `core_bytes_per_second`; a shorter one may be there in its place."""
    return f"{facts.engine} {arithmetic} {facts.weights}"


def core_speed(measured: Measured, facts: ModelFacts, arithmetic: str) -> float:
    """Bytes of weights that a core multiplies by in a second."""
    words = kind_of(facts, arithmetic).split()
    known = measured.core_bytes_per_second
    names = (" ".join(words[:count]) for count in (3, 2, 1))
    return next(known[name] for name in names if name in known)
