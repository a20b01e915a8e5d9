"""How long a token takes, of what a model needs and how fast a machine is (docs/plan.md)."""

from __future__ import annotations

from dataclasses import dataclass

from flashmoe.engines.model_facts import ModelFacts


@dataclass(frozen=True)
class Speeds:
    """How fast a machine runs an engine."""

    arithmetic: float  # bytes of weights that a token multiplies by in a second
    layer_seconds: float  # that a layer takes besides, however small it is
    drive: float  # bytes a second
    serial_share: float  # of the shorter of reading and computing, that the longer does not hide
    prompt_gain: float  # how many times as fast a prompt's tokens are computed as single ones


def token_seconds(facts: ModelFacts, hit_rate: float, speeds: Speeds) -> float:
    """Of one token after the prompt. hit_rate: the share of its experts that are in memory."""
    reading = (1 - hit_rate) * facts.touched_bytes / speeds.drive
    return _together(arithmetic_seconds(facts, speeds), reading, speeds)


def first_token_seconds(facts: ModelFacts, prompt_tokens: int, speeds: Speeds) -> float:
    """Of a prompt on an empty cache: each expert that it needs is read once."""
    needed = 1 - (1 - facts.top_k / facts.n_experts) ** prompt_tokens
    computing = prompt_tokens * arithmetic_seconds(facts, speeds) / speeds.prompt_gain
    return _together(computing, needed * facts.experts_bytes / speeds.drive, speeds)


def arithmetic_seconds(facts: ModelFacts, speeds: Speeds) -> float:
    """Of one token whose experts are all in memory."""
    multiplied = (facts.dense_token_bytes + facts.touched_bytes) / speeds.arithmetic
    return facts.layers * speeds.layer_seconds + multiplied


def _together(computing: float, reading: float, speeds: Speeds) -> float:
    return max(computing, reading) + speeds.serial_share * min(computing, reading)
