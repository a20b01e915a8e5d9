"""How long a token takes, of what a model needs and how fast a machine is (docs/plan.md)."""

from __future__ import annotations

from dataclasses import dataclass

from flashmoe.engines.model_facts import ModelFacts


@dataclass(frozen=True)
class Speeds:
    """How fast a machine runs a model; speeds in a second."""

    memory: float  # bytes of weights that come from memory
    # weights that are multiplied by besides, once they have come: of experts, and of all else
    expert_weights: float
    dense_weights: float
    layer_seconds: float  # that a layer takes besides, however small it is
    drive: float  # bytes
    serial_share: float  # of the shorter of reading and computing, that the longer does not hide
    waits_for_reads: bool  # a layer's product begins when all its experts are there
    # the same of a prompt, a token and weight each
    prompt_expert_weights: float
    prompt_dense_weights: float
    new_memory: float  # bytes of memory that are written for the first time


def token_seconds(facts: ModelFacts, share: float, hit_rate: float, speeds: Speeds) -> float:
    """Of one token after the prompt.

    share: of the experts for which there is memory; hit_rate: of a token's that are in it.
    """
    reading = (1 - hit_rate) * facts.touched_bytes / speeds.drive
    # with fewer slots than a token needs, nothing can be read ahead
    crowded = speeds.waits_for_reads and share * facts.n_experts < facts.top_k
    return _together(
        arithmetic_seconds(facts, speeds), reading, 1.0 if crowded else speeds.serial_share
    )


def first_token_seconds(
    facts: ModelFacts, share: float, needed: float, prompt_tokens: int, speeds: Speeds
) -> float:
    """Of a prompt on an empty cache: each expert that it needs is read once, into new memory.

    share: of the experts for which there is memory; needed: of the experts that the prompt uses.
    """
    computing = prompt_tokens * (
        facts.touched_parameters / speeds.prompt_expert_weights
        + _dense_token_weights(facts) / speeds.prompt_dense_weights
    )
    reading = needed * facts.experts_bytes / speeds.drive
    filling = min(share, needed) * facts.experts_bytes / speeds.new_memory
    return filling + _together(computing, reading, speeds.serial_share)


def arithmetic_seconds(facts: ModelFacts, speeds: Speeds) -> float:
    """Of one token whose experts are all in memory."""
    return (
        facts.layers * speeds.layer_seconds
        + (facts.dense_token_bytes + facts.touched_bytes) / speeds.memory
        + facts.touched_parameters / speeds.expert_weights
        + _dense_token_weights(facts) / speeds.dense_weights
    )


def _dense_token_weights(facts: ModelFacts) -> float:
    return facts.dense_token_bytes / facts.dense_bytes_per_weight


def _together(computing: float, reading: float, serial_share: float) -> float:
    return max(computing, reading) + serial_share * min(computing, reading)
