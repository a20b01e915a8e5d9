"""Speeds that may be compared: those of one machine, model, weights and share of memory.

Rows of one table were run interleaved, so their ratios hold; speeds of two tables were measured on
different days. Every table has FlashMoE in it, so rows of two tables are compared through it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from flashmoe import quant
from harness.report import names, report
from harness.runs.gguf_systems import BENCH

KINDS = ("speedups", "servers", "quant", "published", "compare")
BASELINES = ("flashmoe", "flashmoe run llama-server")  # FlashMoE as it runs unless told otherwise


@dataclass(frozen=True)
class Ranged:
    """A median and its range over the rounds, equal to it where there was one round."""

    value: float
    low: float
    high: float

    def inverse(self) -> Ranged:
        return Ranged(1 / self.value, 1 / self.high, 1 / self.low)

    def over(self, other: Ranged) -> Ranged:
        return Ranged(self.value / other.value, self.low / other.high, self.high / other.low)


_ONE = Ranged(1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Row:
    """One system in one table at one cap. NaN where it did not finish."""

    folder: str
    table: str
    system: str
    format: str  # of the experts' weights
    outcome: str
    tokens_per_second: Ranged
    rounds: int
    over_flashmoe: Ranged | None  # within its own run
    disturbed: bool  # by other work on the machine

    @property
    def name(self) -> str:
        plain = names.system(self.system)
        return f"{plain}, {self.format} experts" if self.mixed else plain

    @property
    def mixed(self) -> bool:
        """Its table compares formats of the weights."""
        return self.table.startswith(("quant-", "published-"))

    @property
    def finished(self) -> bool:
        return self.outcome == "ok" and not math.isnan(self.tokens_per_second.value)

    @property
    def ours(self) -> bool:
        return self.system.startswith("flashmoe")

    @property
    def baseline(self) -> bool:
        return self.system in BASELINES

    @property
    def variant(self) -> bool:
        """FlashMoE with something switched off or added, which nobody is advised to run."""
        return self.ours and not self.baseline and self.system != "flashmoe-fast"


@dataclass
class Contest:
    """All that was measured of one model with the same memory on one machine."""

    machine: str  # the folder's name without the profile
    model: str
    weights: str
    conditions: str  # "" or what differs from an ordinary run
    share: float  # of the model's bytes; NaN without a limit
    share_of: str
    cap_bytes: float
    rows: list[Row] = field(default_factory=list)

    @property
    def memory(self) -> str:
        if math.isnan(self.share):
            return "no limit"
        return f"{self.share * 100:.0f} % of the {self.share_of}, {self.cap_bytes / 1e9:.1f} GB"

    def ranked(self) -> list[Row]:
        """Rows that finished, the fastest first; one of each system, that with most rounds."""
        best: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            known = best.get((row.system, row.format))
            if row.finished and (known is None or row.rounds > known.rounds):
                best[row.system, row.format] = row
        through = all(row.over_flashmoe for row in best.values())
        return sorted(
            best.values(),
            key=lambda row: (
                row.over_flashmoe.value
                if through and row.over_flashmoe
                else row.tokens_per_second.value
            ),
            reverse=True,
        )


def ratio(first: Row, other: Row) -> Ranged:
    """How many times as fast `first` is; within one run if it can be, else through FlashMoE."""
    if first.over_flashmoe and other.over_flashmoe:
        if other.over_flashmoe == _ONE:
            return first.over_flashmoe
        if first.over_flashmoe == _ONE:
            return other.over_flashmoe.inverse()
        if first.table != other.table:
            return first.over_flashmoe.over(other.over_flashmoe)
    return first.tokens_per_second.over(other.tokens_per_second)


def contests() -> list[Contest]:
    """Of every table of speeds under results/, in the order of machine, model, weights, share."""
    found: dict[tuple[str, ...], Contest] = {}
    for folder in report.folders():
        for path in sorted(folder.glob("*.csv")):
            if report.kind_of(path.stem) in KINDS and path.stem != "quant-quality":
                for contest, row in _rows(folder, path.stem):
                    key = (contest.machine, contest.model, contest.weights, contest.conditions,
                           contest.share_of, f"{contest.share:.3f}")  # fmt: skip
                    found.setdefault(key, contest).rows.append(row)
    return sorted(
        found.values(),
        key=lambda each: (each.machine, each.model, each.weights, each.conditions,
                          math.inf if math.isnan(each.share) else each.share),
    )  # fmt: skip


def machine_of(folder: str) -> str:
    return re.sub(r"-(quick|desktop|full-scale|policies)$", "", folder)


def subject(folder: Path, name: str) -> tuple[str, str, str]:
    """Model, format of the weights and label of a table of speeds."""
    kind, _, rest = name.partition("-")
    record = report.records(folder).get(report.record_of(name), {})
    command = record.get("command", "")
    frame = report.read(folder, name)
    if "model" in frame:
        model = str(frame.model.iloc[0])
    else:
        given = re.search(r"--model (\S+)", command)
        model = given[1] if given else rest
    tail = rest.removeprefix(model).strip("-")
    if kind == "compare":
        return model, "bf16", tail
    if kind == "speedups" and tail.partition("-")[0] not in quant.quantisers():
        return model, "bf16", tail
    if kind == "quant":
        return model, "bf16 or quantised", tail
    weights, _, label = tail.partition("-")
    return model, weights or "bf16", label


def _rows(folder: Path, name: str) -> Iterator[tuple[Contest, Row]]:
    frame = report.read(folder, name)
    model, of_table, _ = subject(folder, name)
    command = report.records(folder).get(report.record_of(name), {}).get("command", "")
    if report.kind_of(name) == "published":
        of_table = "as published"
    for values in frame.to_dict("records"):
        if values.get("clock") == BENCH and report.kind_of(name) == "compare":
            continue  # its tokens are others, and so is its clock
        weights = str(values.get("weights", of_table))
        cap = values.get("cap_share", values.get("experts_share", math.nan))
        limit = values.get("read_limit_bytes_per_second", math.nan)
        conditions = ["a text that repeats itself"] if "--repeating" in command else []
        if not str(values.get("routing", "shipped")).startswith("shipped"):
            conditions.append("routing of the real model")
        if not _absent(limit):
            conditions.append(f"drive limited to {limit / 1e6:.0f} MB/s")
        contest = Contest(
            machine_of(folder.name), model, weights, ", ".join(conditions), cap,
            _share_of(name, values), values.get("cap_bytes", math.nan),
        )  # fmt: skip
        row = Row(
            folder.name, name, values["system"], _format(values, weights),
            values.get("outcome", "ok"), _range(values, "tokens_per_second"),
            0 if _absent(values.get("rounds")) else int(values["rounds"]),
            None, values.get("disturbed") is True,
        )  # fmt: skip
        yield contest, replace(row, over_flashmoe=_over_flashmoe(values, frame, row))


def _share_of(name: str, values: dict[str, object]) -> str:
    if report.kind_of(name) == "compare":
        return "model in bf16"
    return "experts" if "experts_share" in values else "model"


def _format(values: dict[str, object], weights: str) -> str:
    quant = values.get("quant", weights)
    return "bf16" if _absent(quant) or quant == "none" else str(quant)


def _range(values: dict[str, object], column: str) -> Ranged:
    middle = float(values.get(column, math.nan))  # type: ignore[arg-type]
    ends = [values.get(f"{column}_{end}") for end in ("min", "max")]
    low, high = (middle if _absent(end) else float(end) for end in ends)  # type: ignore[arg-type]
    return Ranged(middle, low, high)


def _over_flashmoe(values: dict[str, object], frame: pd.DataFrame, row: Row) -> Ranged | None:
    if not row.finished:
        return None
    if "weights" in frame:  # where FlashMoE ran on both engines: through that on transformers
        ours = frame[(frame.weights == values["weights"]) & (frame.system == BASELINES[0])]
        ours = ours[(ours.cap_share == values["cap_share"]) & (ours.outcome == "ok")]
        if ours.empty or row.system == BASELINES[0]:
            return None if ours.empty else _ONE
        return row.tokens_per_second.over(_range(ours.iloc[0].to_dict(), "tokens_per_second"))
    if row.baseline and not row.mixed:
        return _ONE
    if not _absent(values.get("flashmoe_speedup")):
        if "flashmoe_speedup_min" in values:  # of the rounds, each beside its own
            return _range(values, "flashmoe_speedup").inverse()
        speeds = row.tokens_per_second.over(_baseline_speed(values, frame))
        return replace(speeds, value=1 / float(values["flashmoe_speedup"]))  # type: ignore[arg-type]
    if not _absent(values.get("over_bf16")):
        return _range(values, "over_bf16")
    return None


def _baseline_speed(values: dict[str, object], frame: pd.DataFrame) -> Ranged:
    cap = values["cap_share"]
    at = frame.cap_share.isna() if _absent(cap) else frame.cap_share == cap
    by_bench = frame.system.str.contains(BENCH, regex=False)  # a clock of its own
    same_clock = by_bench == (BENCH in str(values["system"]))
    ours = frame[at & same_clock & frame.system.isin((*BASELINES, f"flashmoe run {BENCH}"))]
    return _range(ours.iloc[0].to_dict(), "tokens_per_second")


def _absent(value: object) -> bool:
    return value is None or bool(pd.isna(value))  # type: ignore[call-overload]
