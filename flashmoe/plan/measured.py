"""What the formula takes from committed tables: `python -m harness plan` writes measured.json."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import log
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
    prompt_tokens: tuple[int, ...]
    needed_shares: tuple[float, ...]  # of a layer's experts, that so many tokens use

    def at(self, share: float) -> float:
        """Between the points in a straight line; nothing hits at 0, everything at 1."""
        if share >= 1:
            return 1.0
        return _between((0.0, *self.shares, 1.0), (0.0, *self.hit_rates, 1.0), share)

    def needed(self, tokens: int) -> float:
        """Of a layer's experts, by a prompt: straight lines by the tokens' logarithm."""
        if tokens >= self.prompt_tokens[-1]:  # more were not recorded, and add little
            return self.needed_shares[-1]
        return _between(
            [log(count) for count in self.prompt_tokens], self.needed_shares, log(tokens)
        )


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    right = bisect_right(xs, x)
    part = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + part * (ys[right] - ys[right - 1])


# Ways to multiply by a weight, as far as they differ in what a weight costs.
PLAIN, PACKED, DEQUANTISED, FAST = "plain", "packed", "dequantised", "fast"
_PLAIN_FORMATS = ("bfloat16", "float16", "float32", "bf16", "f16", "f32")
_OWN_SCHEMES = ("int4", "int8")  # which torch multiplies by as they lie


@dataclass(frozen=True)
class Measured:
    """Everything in measured.json, fitted to tables: by engine, or by engine and way."""

    source: str
    curves: tuple[Curve, ...]
    core_seconds_per_weight: dict[str, float]  # once the weight has come from memory
    slower_without_avx512: float  # so many times as long
    layer_seconds: dict[str, float]
    serial_share: dict[str, float]
    # a weight and token of a prompt each
    prompt_core_seconds_per_weight: dict[str, float]
    prompt_slower_without_avx512: dict[str, float]
    # What was measured lay in eight of ten rows between so many times what was predicted.
    token_range: dict[str, tuple[float, float]]
    first_token_range: dict[str, tuple[float, float]]


@cache
def load(path: Path = FILE) -> Measured:
    document = json.loads(path.read_text())
    curves = (
        Curve(**one | {name: tuple(v) for name, v in one.items() if isinstance(v, list)})
        for one in document.pop("curves")
    )
    return Measured(curves=tuple(curves), **document)


def curves_for(measured: Measured, facts: ModelFacts) -> list[Curve]:
    """Those of models of this geometry, whose routing was recorded; of all where there is none."""
    geometry = (facts.layers, facts.n_experts, facts.top_k)
    real = [curve for curve in measured.curves if curve.real]
    return [curve for curve in real if curve.geometry == geometry] or real


def expert_way(facts: ModelFacts, arithmetic: str) -> str:
    """How experts are multiplied by: a key of the figures by engine and way."""
    if facts.weights in _PLAIN_FORMATS:
        fast = facts.engine != "llama" and arithmetic == "fast"
        return f"{facts.engine} {FAST if fast else PLAIN}"
    as_they_lie = facts.engine == "llama" or arithmetic == "fast" or facts.weights in _OWN_SCHEMES
    return f"{facts.engine} {PACKED if as_they_lie else DEQUANTISED}"


def dense_way(facts: ModelFacts) -> str:
    """The same of all but experts."""
    packed = facts.engine == "llama" and facts.dense_bytes_per_weight < 1.5
    return f"{facts.engine} {PACKED if packed else PLAIN}"


def prompt_way(way: str) -> str:
    """Of a prompt: transformers multiplies by plain weights, whatever they were made of."""
    engine = way.split()[0]
    return way if engine == "llama" else f"{engine} {PLAIN}"


def seconds_per_weight(figures: dict[str, float], way: str) -> float:
    """Of a way that was not measured: as another engine's of this name, else as plain weights."""
    engine, name = way.split()
    names = (
        way,
        *(key for key in sorted(figures) if key.endswith(f" {name}")),
        f"{engine} {PLAIN}",
    )
    known = next((key for key in names if key in figures), next(iter(figures)))
    return figures[known]
