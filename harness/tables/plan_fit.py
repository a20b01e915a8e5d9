"""What `flashmoe plan` takes from measured rows: each figure as it makes these rows' errors least.

Of the machines of the rows neither memory's speed nor what new memory costs was measured. So both
are fitted too, for all of them, and used to judge rows; what ships is told them by the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from typing import Any

import numpy as np

from flashmoe.plan import formula, measured, planner
from flashmoe.plan.formula import Speeds
from flashmoe.plan.machine import Machine
from flashmoe.plan.measured import LEARNED, Curve, Measured
from harness.report import report
from harness.tables import prompt_experts
from harness.tables.full_scale import PROMPT_TOKENS
from harness.tables.plan_cases import Case

HIT_RATES = report.RESULTS / "intel-xeon-avx512-2-core-24gib-policies"
# By trace: layers, experts of a layer, experts a token; False: of a small model of this geometry.
_TRACES = {
    "demo": ((16, 64, 8), True),
    "gpt-oss-20b-mmlu": ((24, 32, 4), True),
    "deepseek-v2-lite-prompts": ((26, 64, 6), True),
    "gpt-oss-20b stand-in": ((24, 32, 4), False),
    "deepseek-v2-lite stand-in": ((26, 64, 6), False),
    "qwen3-30b-a3b stand-in": ((48, 128, 8), False),
    "mixtral-8x7b stand-in": ((32, 8, 2), False),
}
_SHARES = [round(float(share), 2) for share in np.linspace(0, 1, 21)]
_SECONDS = [float(f"{seconds:.3g}") for seconds in np.geomspace(1e-12, 5e-9, 121)]
_TIMES = [round(float(times), 2) for times in np.geomspace(1, 8, 43)]
_NEW_MEMORY = [float(f"{speed:.3g}") for speed in np.geomspace(0.3e9, 10e9, 36)]
_MOST_SWEEPS = 20  # over all figures, one after the other, until none changes
_STEP = 5  # every so many choices are tried first, then those near the best
Figures = dict[str, float]


@dataclass(frozen=True)
class Fit:
    """Figures that ship, and what is assumed of the rows' machines."""

    figures: Measured
    core_memory: float  # bytes a second and core
    new_memory: float  # bytes a second


def fit(cases: Sequence[Case]) -> Fit:
    """What these rows give."""
    figures = Measured(
        source=f"{HIT_RATES.relative_to(report.RESULTS.parent)}/hit_rates.csv, policy {LEARNED}, "
        f"cold, and {prompt_experts.TITLE}.csv; the rest fitted to the rows of results/*/plan.csv "
        "by `python -m harness plan`",
        curves=tuple(curves()),
        core_seconds_per_weight={},
        slower_without_avx512=1.0,
        layer_seconds=_layer_seconds(),
        serial_share={},
        prompt_core_seconds_per_weight={},
        prompt_slower_without_avx512={},
        token_range={},
        first_token_range={},
    )
    fitted = Fit(figures, _core_memory(cases), 1e9)
    return _with_prompts(_with_shares(_with_arithmetic(fitted, cases), cases), cases)


def curves() -> list[Curve]:
    """Of each trace, the mean of its parts."""
    frame = report.read(HIT_RATES, "hit_rates")
    frame = frame[(frame.policy == LEARNED) & (frame.start == "cold")]
    (path,) = report.RESULTS.glob(f"*/{prompt_experts.TITLE}.csv")
    prompts = report.read(path.parent, prompt_experts.TITLE)
    found = []
    for trace, (geometry, real) in _TRACES.items():
        by_share = frame[frame.trace == trace].groupby("capacity").hit_rate.mean()
        needed = prompts[prompts.trace == trace]
        found.append(
            Curve(
                trace=trace,
                real=real,
                geometry=geometry,
                shares=tuple(map(float, by_share.index)),
                hit_rates=tuple(round(rate, 4) for rate in by_share),
                prompt_tokens=tuple(map(int, needed.tokens)),
                needed_shares=tuple(round(float(share), 4) for share in needed.needed_share),
            )
        )
    return found


def curve_of(case: Case, figures: Measured) -> Curve:
    """Of the routing that the row had."""
    return next(curve for curve in figures.curves if curve.trace == case.trace)


def speeds_of(case: Case, fitted: Fit) -> Speeds:
    """As a plan has them, on the row's machine."""
    machine = Machine(
        available_bytes=0,
        cores=case.cores,
        avx512=case.avx512,
        memory_bytes_per_second=case.cores * fitted.core_memory,
        new_memory_bytes_per_second=fitted.new_memory,
        drive_bytes_per_second=case.drive_bytes_per_second,
        drive_measured_on="",
    )
    return planner.speeds_of(case.facts, machine, case.arithmetic, fitted.figures)


def calibrated(case: Case, speeds: Speeds) -> Speeds:
    """The same, with a token's arithmetic as rows of the same machine told."""
    times = case.arithmetic_seconds / formula.arithmetic_seconds(case.facts, speeds)
    return replace(
        speeds,
        memory=speeds.memory / times,
        expert_weights=speeds.expert_weights / times,
        dense_weights=speeds.dense_weights / times,
        layer_seconds=speeds.layer_seconds * times,
    )


def token_seconds(case: Case, fitted: Fit, speeds: Speeds) -> float:
    hit_rate = curve_of(case, fitted.figures).at(case.share)
    return formula.token_seconds(case.facts, case.share, hit_rate, speeds)


def first_token_seconds(case: Case, fitted: Fit, speeds: Speeds) -> float:
    needed = curve_of(case, fitted.figures).needed(PROMPT_TOKENS)
    return formula.first_token_seconds(case.facts, case.share, needed, PROMPT_TOKENS, speeds)


def _layer_seconds() -> Figures:
    """By engine, what a layer takes of a token besides: the demo model's, which has no weights to
    speak of. llama.cpp's was not measured, and is small.
    """
    seconds = []
    for folder in report.folders():
        if (folder / "generation.csv").exists():
            frame = report.read(folder, "generation")
            layers, n_experts, _ = _TRACES["demo"][0]
            whole = frame[(frame.system == "flashmoe") & (frame.slots == n_experts)]
            seconds += [1 / speed / layers for speed in whole.tokens_per_second]
    return {"llama": 0.0, "transformers": round(statistics.median(seconds), 5)}


def _core_memory(cases: Sequence[Case]) -> float:
    """At least what the fastest of these rows multiplied by."""
    return max(
        (case.facts.dense_token_bytes + case.facts.touched_bytes)
        / (case.arithmetic_seconds * case.cores)
        for case in cases
    )


def _with_arithmetic(fitted: Fit, cases: Sequence[Case]) -> Fit:
    """Each table's rows of one model and arithmetic count once."""
    once = {(case.source, case.system, case.facts.weights): case for case in cases}.values()
    ways = sorted({way for case in once for way in _ways(case)})
    without = any(not case.avx512 for case in once)
    choices = dict.fromkeys(ways, _SECONDS) | ({"slower": _TIMES} if without else {})

    def of(values: Figures) -> Fit:
        per_weight = {way: values[way] for way in ways}
        slower = values.get("slower", 1.0)
        return _with(fitted, core_seconds_per_weight=per_weight, slower_without_avx512=slower)

    def error(case: Case, candidate: Fit) -> float:
        seconds = formula.arithmetic_seconds(case.facts, speeds_of(case, _enough(candidate)))
        return log(seconds / case.arithmetic_seconds)

    return of(_descend(choices, of, list(once), error))


def _with_shares(fitted: Fit, cases: Sequence[Case]) -> Fit:
    """With the arithmetic that the rows' machines had."""
    shares = {}
    for engine in sorted({case.facts.engine for case in cases}):
        mine = [case for case in cases if case.facts.engine == engine]

        def of(values: Figures, engine: str = engine) -> Fit:
            return _with(fitted, serial_share={engine: values["share"]})

        def error(case: Case, candidate: Fit) -> float:
            speeds = calibrated(case, speeds_of(case, _enough(candidate)))
            return log(token_seconds(case, candidate, speeds) * case.tokens_per_second)

        shares[engine] = _descend({"share": _SHARES}, of, mine, error)["share"]
    return _with(fitted, serial_share=shares)


def _with_prompts(fitted: Fit, cases: Sequence[Case]) -> Fit:
    ways = sorted({measured.prompt_way(way) for case in cases for way in _ways(case)})
    without = sorted({case.facts.engine for case in cases if not case.avx512})
    choices = dict.fromkeys(ways, _SECONDS) | dict.fromkeys(without, _TIMES)
    choices["new memory"] = _NEW_MEMORY

    def of(values: Figures) -> Fit:
        per_weight = {way: values[way] for way in ways}
        slower = {engine: values[engine] for engine in without}
        changed = _with(
            fitted, prompt_core_seconds_per_weight=per_weight, prompt_slower_without_avx512=slower
        )
        return replace(changed, new_memory=values["new memory"])

    def error(case: Case, candidate: Fit) -> float:
        seconds = first_token_seconds(case, candidate, speeds_of(case, candidate))
        return log(seconds / case.first_token_seconds)

    return of(_descend(choices, of, cases, error))


def _ways(case: Case) -> tuple[str, str]:
    return measured.expert_way(case.facts, case.arithmetic), measured.dense_way(case.facts)


def _with(fitted: Fit, **figures: Any) -> Fit:
    return replace(fitted, figures=replace(fitted.figures, **figures))


def _enough(fitted: Fit) -> Fit:
    """With something for what is not asked, where it was not fitted yet."""
    figures = fitted.figures
    return _with(
        fitted,
        serial_share=dict.fromkeys(figures.layer_seconds, 0.0) | figures.serial_share,
        prompt_core_seconds_per_weight=figures.prompt_core_seconds_per_weight
        or figures.core_seconds_per_weight,
    )


def _descend(
    choices: dict[str, list[float]],
    of: Callable[[Figures], Fit],
    cases: Sequence[Case],
    error: Callable[[Case, Fit], float],
) -> Figures:
    """One figure after the other, the choice with the least mean error of its logarithm."""
    values = {name: among[len(among) // 2] for name, among in choices.items()}

    def mean_error(name: str, choice: float) -> float:
        candidate = of(values | {name: choice})
        return statistics.fmean(abs(error(case, candidate)) for case in cases)

    for _ in range(_MOST_SWEEPS):
        before = dict(values)
        for name, among in choices.items():
            coarse = min(among[::_STEP], key=partial(mean_error, name))
            at = among.index(coarse)
            near = among[max(at - _STEP + 1, 0) : at + _STEP]
            values[name] = min(near, key=partial(mean_error, name))
        if values == before:
            break
    return values
