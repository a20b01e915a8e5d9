"""Small tables out of large ones, for pages; and Markdown out of a data frame."""

from __future__ import annotations

import pandas as pd

GAP_POLICIES = ("lfu", "lfu-decay", "arc", "s3-fifo", "lecar", "learned")
RATE_POLICIES = ("lru", "lfu", "lfu-decay", "learned", "belady", "belady-bypass")
COMPARED_CAPACITIES = (0.25, 0.5)  # of which every start has rows


def table(frame: pd.DataFrame, format: str) -> str:
    """Markdown; an empty cell for what is absent."""
    shown = frame.astype(object).where(frame.notna(), None)
    text: str = shown.to_markdown(index=False, floatfmt=format, missingval="")
    return text


def hit_rates(frame: pd.DataFrame) -> str:
    """How much of the gap each policy closes, and hit rates by start."""
    return (
        "Gap between LRU and Belady closed, %, cold, mean over 25, 37.5 and 50 % resident:\n\n"
        + table(gap_closed(frame), ".1f")
        + "\n\nHit rates, %, by start (belady sees the future):\n\n"
        + table(rates_by_start(frame), ".1f")
    )


def gap_closed(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a case, a column a policy."""
    cold = frame[(frame.start == "cold") & frame.capacity.between(0.25, 0.5)]
    cold = cold[cold.gap_closed.notna()].assign(case=cold.trace + ", " + cold.part)
    closed = cold.pivot_table(index="case", columns="policy", values="gap_closed", sort=False)
    return (closed[[name for name in GAP_POLICIES if name in closed]] * 100).reset_index()


def rates_by_start(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each case, capacity and start, a column a policy."""
    part = frame[frame.capacity.isin(COMPARED_CAPACITIES)]
    part = part.assign(
        case=part.trace + ", " + part.part, at=(part.capacity * 100).map("{:.0f} %".format)
    )
    rates = part.pivot_table(
        index=["case", "at", "start"], columns="policy", values="hit_rate", sort=False
    )
    return (rates[[name for name in RATE_POLICIES if name in rates]] * 100).reset_index()


def policy_cost(frame: pd.DataFrame) -> str:
    """The median over traces and starts: a row a policy, a column a capacity."""
    costs = frame.pivot_table(
        index="policy", columns="capacity", values="microseconds", aggfunc="median"
    )
    costs.columns = [f"{capacity:.1%} resident" for capacity in costs.columns]
    return "Microseconds a token and layer, median:\n\n" + table(costs.reset_index(), ".3g")


def paper_rates(frame: pd.DataFrame) -> str:
    """A row for each trace, replay, what is counted and slots, a column a policy."""
    rates = frame.pivot_table(
        index=["trace", "replay", "counted", "slots"], columns="policy", values="hit_rate",
        sort=False,
    )  # fmt: skip
    rates.columns = [name.replace("flashmoe-paper, ", "paper: ") for name in rates.columns]
    return "Hit rates, %:\n\n" + table((rates * 100).reset_index(), ".1f")
