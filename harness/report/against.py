"""Which ratios of a folder of results another machine's tables give again.

Speeds differ from machine to machine, so only ratios are compared: how many times as fast FlashMoE
is as each system under each limit, what hit, and which share of the roofline was reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import pandas as pd

from flashmoe.errors import FlashMoEError
from harness.report import digests, report
from harness.runs.gguf_systems import BENCH

WIDEN = 0.25  # of either end of a band of speeds: so much differ runs of one shared machine
_WIDEN_HIT_RATE = 0.05  # of a measured one: slots are as many as the rest of the memory leaves
_COUNTED = ("tokens", "warm_up_tokens")  # a slow system counts fewer, and other ones
WITHIN, OUTSIDE, NOT_COMPARED = "within", "outside", "not compared"
# What names a row in each kind of table. Replayed rows must be equal as they are written.
_KEYS = {
    "speedups": ("cap_share", "system"),
    "servers": ("cap_share", "system"),
    "compare": ("weights", "cap_share", "system"),
    "generation": ("slots", "system"),
    "quant": ("cap_share", "quant"),
    "published": ("experts_share", "quant", "system"),
    "hit_rates": ("trace", "part", "start", "capacity", "policy"),
}
_RATIOS = ("flashmoe_speedup", "over_bf16", "share_of_roofline", "hit_rate")
_RANGES = {"share_of_roofline": ("share_min", "share_max")}


@dataclass(frozen=True)
class Compared:
    """One ratio of one row: here, and the band that the other machine's runs had, widened."""

    table: str
    row: str
    ratio: str
    theirs: float
    low: float
    high: float
    here: float | None
    verdict: str
    why: str = ""


def text(mine: Path, other: Path, widen: float = WIDEN) -> str:
    """The report, in Markdown. Raises FlashMoEError where one of the folders is none of results."""
    found = pd.DataFrame(list(compare(mine, other, widen)), columns=list(Compared.__annotations__))
    counted = found.groupby(["table", "ratio", "verdict"], sort=False).size()
    counts = counted.unstack(fill_value=0).reindex(
        columns=[WITHIN, OUTSIDE, NOT_COMPARED], fill_value=0
    )
    replayed = found.table.map(report.evidence) == "replayed"
    rows = found[~replayed | (found.verdict == OUTSIDE)]
    return "\n\n".join(
        (
            f"# {mine.name} against {other.name}",
            "A ratio is within where it lies in the other machine's range of rounds, each end "
            f"widened by {widen:.0%} (measured hit rates: by {_WIDEN_HIT_RATE:.0%}; replayed ones: "
            "by nothing). Of replayed tables only rows outside are listed.",
            digests.table(counts.reset_index(), ".4g"),
            digests.table(rows, ".4g"),
        )
    )


def compare(mine: Path, other: Path, widen: float = WIDEN) -> Iterator[Compared]:
    """Every ratio of `other`'s tables. Raises FlashMoEError as `text` does."""
    for folder in (mine, other):
        if not (folder / report.RECORDS).is_file():
            raise FlashMoEError(f"{folder} has no {report.RECORDS}: no results lie there")
    if mine.resolve() == other.resolve():
        raise FlashMoEError(f"{other} would be compared with itself: name another machine's folder")
    for path in sorted(other.glob("*.csv")):
        if report.kind_of(path.stem) in _KEYS:
            yield from _tables(path.stem, _rows(mine, path.stem), _rows(other, path.stem), widen)


def _tables(
    name: str, mine: dict[str, Any] | None, theirs: dict[str, Any] | None, widen: float
) -> Iterator[Compared]:
    replayed = report.evidence(name) == "replayed"
    for key, row in (theirs or {}).items():
        own = None if mine is None else mine.get(key)
        for ratio in _RATIOS:
            value = row.get(ratio)
            if not _is_number(value):
                continue
            here = own.get(ratio) if own else None
            if ratio == "flashmoe_speedup" and value == 1 and here in (1, None):
                continue  # FlashMoE's own row
            by = 0.0 if replayed else _WIDEN_HIT_RATE if ratio == "hit_rate" else widen
            low, high = _band(row, ratio, value)
            low, high = low * (1 - by), high * (1 + by)
            why = _why_not(mine, own, row, ratio)
            told = NOT_COMPARED
            if not why and here is not None:
                told = WITHIN if low <= here <= high else OUTSIDE
            yield Compared(name, key, ratio, value, low, high, here, told, why)


def _why_not(mine: Any, own: dict[str, Any] | None, row: dict[str, Any], ratio: str) -> str:
    """Why a ratio cannot be compared; "" where it can."""
    if mine is None:
        return "no such table here"
    if own is None:
        return "no such row here"
    if own.get("outcome", "ok") != "ok":
        return f"here: {own['outcome']}"
    if not _is_number(own.get(ratio)):
        return "not measured here"
    if ratio == "hit_rate" and any(_differ(own.get(n), row.get(n)) for n in _COUNTED):
        return "other tokens were counted"
    told = [where for where, one in (("here", own), ("there", row)) if one.get("disturbed") is True]
    return f"disturbed {' and '.join(told)}" if told else ""


def _rows(folder: Path, name: str) -> dict[str, dict[str, Any]] | None:
    """The table's rows by what names them; None where there is no such table, or of no ratios."""
    if not (folder / f"{name}.csv").exists():
        return None
    try:
        frame = report.read(folder, name)
    except ValueError:
        raise FlashMoEError(f"{folder.name}/{name}.csv is no table: fetch it again") from None
    keys = _KEYS[report.kind_of(name)]
    if not set(keys) <= set(frame):
        return None
    rows = frame.to_dict("records")
    add = _add_speedups if report.kind_of(name) == "compare" else _add_ranges
    add(rows)
    return {", ".join(_word(row[key]) for key in keys): row for row in rows}


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if _is_number(value) else "none"


def _add_speedups(rows: list[dict[str, Any]]) -> None:
    """How many times as fast the better of FlashMoE's engines is, where a table has speeds only."""
    best: dict[Any, float] = {}
    rivals = []
    for row in rows:
        speed, key = row.get("tokens_per_second"), (row["weights"], *_cap_and_clock(row))
        if not _is_number(speed) or speed <= 0:
            continue
        if str(row["system"]).startswith("flashmoe"):
            best[key] = max(best.get(key, 0.0), speed)
        else:
            rivals.append((row, key))
    for row, key in rivals:
        if key in best:
            row["flashmoe_speedup"] = best[key] / row["tokens_per_second"]


def _add_ranges(rows: list[dict[str, Any]]) -> None:
    """The range of a speedup, where a table has but the ranges of speeds that it is made of."""
    ours = {_cap_and_clock(row): row for row in rows if row.get("flashmoe_speedup") == 1}
    for row in rows:
        our = ours.get(_cap_and_clock(row))
        if our and "flashmoe_speedup_min" not in row and row.get("flashmoe_speedup") != 1:
            low, high = "tokens_per_second_min", "tokens_per_second_max"
            ends = (our.get(low), our.get(high), row.get(low), row.get(high))
            if all(_is_number(end) and end > 0 for end in ends):
                row["flashmoe_speedup_min"] = our[low] / row[high]
                row["flashmoe_speedup_max"] = our[high] / row[low]


def _cap_and_clock(row: dict[str, Any]) -> tuple[str, bool]:
    return _word(row.get("cap_share")), BENCH in str(row.get("system"))


def _band(row: dict[str, Any], ratio: str, value: float) -> tuple[float, float]:
    """The least and the most of the rounds; the value alone where a table has no range of it."""
    ends = [row.get(name) for name in _RANGES.get(ratio, (f"{ratio}_min", f"{ratio}_max"))]
    known = [end for end in ends if _is_number(end)]
    return min([value, *known]), max([value, *known])


def _differ(a: Any, b: Any) -> bool:
    return _is_number(a) and _is_number(b) and bool(a != b)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
