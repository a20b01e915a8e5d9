"""Small tables out of large ones; and Markdown out of a data frame."""

from __future__ import annotations

import pandas as pd

GAP_POLICIES = ("lfu", "lfu-decay", "arc", "s3-fifo", "lecar", "learned")
RATE_POLICIES = ("lru", "lfu", "learned", "belady", "belady-bypass")
COMPARED_CAPACITIES = (0.25, 0.5)  # of which every start has rows
_WORK = {
    "demand": "Reading what is needed, ms",
    "guess": "Reading what is guessed, ms",
    "experts": "Computing experts, ms",
}


def table(frame: pd.DataFrame, format: str) -> str:
    """Markdown; an empty cell for what is absent."""
    shown = frame.astype(object).where(frame.notna(), None)
    text: str = shown.to_markdown(index=False, floatfmt=format, missingval="")
    return text


def gap_closed(frame: pd.DataFrame) -> pd.DataFrame:
    """How much of the way from LRU to Belady, %: a row a case, a column a policy.

    Cold, the mean over 25, 37.5 and 50 % resident.
    """
    cold = frame[(frame.start == "cold") & frame.capacity.between(0.25, 0.5)]
    cold = cold[cold.gap_closed.notna()]
    closed = (
        cold.assign(case=case(cold))
        .pivot_table(index="case", columns="policy", values="gap_closed", sort=False)
    )  # fmt: skip
    return _named(closed[[name for name in GAP_POLICIES if name in closed]] * 100)


def rates_by_start(frame: pd.DataFrame) -> pd.DataFrame:
    """Hit rates, %: a row for each case, capacity and start, a column a policy."""
    part = frame[frame.capacity.isin(COMPARED_CAPACITIES)]
    part = part.assign(case=case(part), resident=part.capacity * 100)
    rates = part.pivot_table(
        index=["case", "resident", "start"], columns="policy", values="hit_rate", sort=False
    )
    named = _named(rates[[name for name in RATE_POLICIES if name in rates]] * 100)
    return named.rename(columns={"resident": "Resident, %"})


def gap_by_case(frame: pd.DataFrame) -> pd.DataFrame:
    """What `learned` closes of the gap, %: the mean over layers, the least, the most."""
    rows = frame[frame.gap_closed.notna()]
    rows = rows.assign(case=case(rows), resident=rows.capacity * 100)
    gaps = rows.groupby(["case", "resident"], sort=False).gap_closed.agg(["mean", "min", "max"])
    names = {
        "mean": "Gap closed, mean of layers, %", "min": "Least layer, %", "max": "Most, %",
        "resident": "Resident, %",
    }  # fmt: skip
    return (gaps * 100).reset_index().rename(columns=names)


def policy_cost(frame: pd.DataFrame) -> pd.DataFrame:
    """Microseconds a token and layer, median over traces and starts: a row a policy."""
    costs = frame.pivot_table(
        index="policy", columns="capacity", values="microseconds", aggfunc="median"
    )
    costs.columns = [f"{capacity:.1%} resident, µs" for capacity in costs.columns]
    return costs.reset_index()


def paper_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Hit rates, %: the paper's network at the best of its readings, beside others."""
    readings = frame.policy.str.startswith("flashmoe-paper, ")
    merged = frame.assign(
        policy=frame.policy.mask(readings, "paper's network, best reading"),
        case=frame.trace + ", " + frame.replay + ", " + frame.counted,
    )
    rates = merged.pivot_table(
        index=["case", "slots"], columns="policy", values="hit_rate", aggfunc="max", sort=False
    )
    policies = ("lru", "lfu", "arc", "paper's network, best reading", "learned", "belady")
    return _named(rates[[name for name in policies if name in rates]] * 100)


def time_by_work(frame: pd.DataFrame) -> pd.DataFrame:
    """The milliseconds of one token, by system: all of it, and the sum of each kind of work."""
    length = (frame.end_ms - frame.start_ms).rename("length")
    work = frame.assign(length=length).pivot_table(
        index="system", columns="what", values="length", aggfunc="sum", sort=False
    )
    whole = frame.groupby("system", sort=False).end_ms.max().rename("The token, ms")
    kinds = work[[name for name in _WORK if name in work]].rename(columns=_WORK)
    return pd.concat([whole, kinds], axis=1).reset_index()


def case(frame: pd.DataFrame) -> pd.Series:
    """What a hit rate is of: the recorded routing, and which part of it."""
    return frame.trace + ", " + frame.part


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Headers with the unit for policies, which stand in columns."""
    renamed = {name: f"{name}, %" for name in frame.columns}
    return frame.rename(columns=renamed).reset_index()
