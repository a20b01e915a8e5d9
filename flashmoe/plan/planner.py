"""What to expect of a model on a machine, for a few budgets of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from flashmoe.engines.model_facts import ModelFacts
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.plan import formula, measured
from flashmoe.plan.formula import Speeds
from flashmoe.plan.machine import Machine
from flashmoe.plan.measured import Measured

SHARES = (0.15, 0.25, 0.4, 0.6, 1.0)  # of all experts, beside what "auto" would take
AUTO, ASKED = "auto", "asked"
_GOOD_ENOUGH = 0.95  # of the best speed, for which a smaller budget is advised


class Between(NamedTuple):
    """What is expected, and between what eight of ten measured runs lay."""

    expected: float
    low: float
    high: float


@dataclass(frozen=True)
class Outlook:
    """What a budget brings."""

    budget: str  # "auto", a share of all experts, or "asked": the request's
    memory_bytes: int  # for experts
    share: float  # of the experts that this holds
    fits: bool  # beside the rest of the model, in memory that is free now
    hit_rate: Between
    tokens_per_second: Between
    first_token_seconds: Between


@dataclass(frozen=True)
class Request:
    """What the model is to do."""

    context_tokens: int
    prompt_tokens: int
    arithmetic: str = "exact"
    memory_bytes: int | None = None  # for experts; None: the best budget is looked for


def speeds_of(facts: ModelFacts, machine: Machine, arithmetic: str, figures: Measured) -> Speeds:
    """How fast this machine should run the model's engine: cores multiply, memory brings."""
    engine = facts.engine
    expert_way, dense_way = measured.expert_way(facts, arithmetic), measured.dense_way(facts)
    slower, prompt_slower = 1.0, 1.0
    if not machine.avx512:
        slower = figures.slower_without_avx512
        prompt_slower = figures.prompt_slower_without_avx512.get(engine, slower)

    def weights(by_way: dict[str, float], way: str, times: float) -> float:
        return machine.cores / (times * measured.seconds_per_weight(by_way, way))

    decode, prompt = figures.core_seconds_per_weight, figures.prompt_core_seconds_per_weight
    return Speeds(
        memory=machine.memory_bytes_per_second,
        expert_weights=weights(decode, expert_way, slower),
        dense_weights=weights(decode, dense_way, slower),
        layer_seconds=figures.layer_seconds[engine],
        drive=machine.drive_bytes_per_second,
        serial_share=figures.serial_share[engine],
        waits_for_reads=engine == "llama",
        prompt_expert_weights=weights(prompt, measured.prompt_way(expert_way), prompt_slower),
        prompt_dense_weights=weights(prompt, measured.prompt_way(dense_way), prompt_slower),
        new_memory=machine.new_memory_bytes_per_second,
    )


def outlooks(
    facts: ModelFacts, machine: Machine, request: Request, figures: Measured
) -> list[Outlook]:
    """Of each share of the experts that the engine can run in, of "auto" where that fits, and of
    what is asked. Raises FlashMoEError where the engine cannot run in what is asked.
    """
    free = _auto_bytes(facts, machine, request)
    budgets = [
        (f"{share:.0%}", int(share * facts.experts_bytes))
        for share in SHARES
        if share * facts.experts_bytes >= facts.least_bytes
    ]
    if free >= facts.least_bytes:
        budgets.append((AUTO, min(free, facts.experts_bytes)))
    if request.memory_bytes is not None:
        if request.memory_bytes < facts.least_bytes:
            least = f"{-(-facts.least_bytes >> 20)}MiB"
            raise FlashMoEError(f"this model's experts need a budget of {least} at least")
        budgets.append((ASKED, min(request.memory_bytes, facts.experts_bytes)))
    return [
        _outlook(facts, machine, request, figures, name, memory_bytes, memory_bytes <= free)
        for name, memory_bytes in budgets
    ]


def _auto_bytes(facts: ModelFacts, machine: Machine, request: Request) -> int:
    """What memory="auto" would give the experts; none or less: the rest does not fit."""
    cache_bytes = facts.cache_bytes(request.context_tokens)
    reserve = max(facts.reserve_bytes, int(machine.available_bytes * free_memory.RESERVE_SHARE))
    beside_bytes = facts.dense_bytes + facts.beside_bytes + cache_bytes + reserve
    return machine.available_bytes - beside_bytes


def _outlook(
    facts: ModelFacts,
    machine: Machine,
    request: Request,
    figures: Measured,
    name: str,
    memory_bytes: int,
    fits: bool,
) -> Outlook:
    share = memory_bytes / facts.experts_bytes
    curves = measured.curves_for(figures, facts)
    rates = [curve.at(share) for curve in curves]
    hit_rate = Between(fmean(rates), min(rates), max(rates))
    speeds = speeds_of(facts, machine, request.arithmetic, figures)
    expected, low, high = (
        1 / formula.token_seconds(facts, share, rate, speeds) for rate in hit_rate
    )
    below, above = figures.token_range[facts.engine]
    needed = fmean(curve.needed(request.prompt_tokens) for curve in curves)
    first = formula.first_token_seconds(facts, share, needed, request.prompt_tokens, speeds)
    sooner, later = figures.first_token_range[facts.engine]
    return Outlook(
        budget=name,
        memory_bytes=memory_bytes,
        share=share,
        fits=fits,
        hit_rate=hit_rate,
        tokens_per_second=Between(
            expected, min(low * below, expected), max(high * above, expected)
        ),
        first_token_seconds=Between(first, min(first, first * sooner), max(first, first * later)),
    )


def advised(rows: Sequence[Outlook]) -> Outlook | None:
    """What was asked; else the smallest budget that is nearly as fast as the best that fits.

    None: it does not fit, or nothing does.
    """
    asked = [row for row in rows if row.budget == ASKED]
    fitting = [row for row in asked or rows if row.fits]
    best = max((row.tokens_per_second.expected for row in fitting), default=0.0)
    good = [row for row in fitting if row.tokens_per_second.expected >= _GOOD_ENOUGH * best]
    return min(good, key=lambda row: (row.memory_bytes, row.budget != AUTO), default=None)


def resized(facts: ModelFacts, total_bytes: int) -> ModelFacts:
    """The same model in a file of so many bytes, its parts in the same proportions."""
    factor = total_bytes / facts.total_bytes
    return replace(
        facts,
        experts_bytes=int(factor * facts.experts_bytes),
        dense_bytes=int(factor * facts.dense_bytes),
        dense_token_bytes=int(factor * facts.dense_token_bytes),
        least_bytes=int(factor * facts.least_bytes),
    )
