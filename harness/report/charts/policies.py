"""Hit rates by policy."""

from __future__ import annotations

from collections.abc import Iterable

import altair as alt
import pandas as pd

from harness.report import digests
from harness.report.charts import theme

# The charts' selection of the zoo; the tables have all.
_SHOWN = ("learned", "lru", "lfu", "lfu-decay", "arc", "s3-fifo", "lecar", "belady",
          "belady-bypass")  # fmt: skip
_RESIDENT = "Resident share of a layer's experts"


def _colour(policies: Iterable[str]) -> alt.Color:
    """Policies have short names: three fit side by side, on a telephone too."""
    return alt.Color("policy:N", scale=theme.scale(policies), legend=alt.Legend(columns=3))


def gains(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """Gain over LRU against capacity, cold, a panel a case, Belady as the ceiling."""
    cold = rows[(rows.start == "cold") & rows.policy.isin(_SHOWN)]
    lru = cold[cold.policy == "lru"].set_index(["trace", "part", "capacity"]).hit_rate
    at = pd.MultiIndex.from_frame(cold[["trace", "part", "capacity"]])
    cold = cold.assign(case=digests.case(cold), gain=cold.hit_rate.array - lru.reindex(at).array)
    policies = [name for name in _SHOWN if name in set(cold.policy)]
    return [_gain(str(case), part, policies) for case, part in cold.groupby("case", sort=False)]


def _gain(case: str, rows: pd.DataFrame, policies: list[str]) -> alt.LayerChart:
    shown = rows[["policy", "capacity"]].assign(
        rate=rows.hit_rate.round(4), gain=(rows.gain * 100).round(2)
    )
    base = alt.Chart(shown).encode(
        x=alt.X("capacity:Q", title=_RESIDENT, axis=alt.Axis(format="%", tickCount=5)),
        y=alt.Y("gain:Q", title="Hit rate above LRU's, points"),
        color=_colour(policies),
    )
    tips = [
        alt.Tooltip("policy:N"),
        alt.Tooltip("capacity:Q", format=".1%"),
        alt.Tooltip("rate:Q", title="hit rate", format=".1%"),
        alt.Tooltip("gain:Q"),
    ]
    return (base.mark_line() + base.mark_point(size=22).encode(tooltip=tips)).properties(
        height=theme.PANEL_HEIGHT, title=theme.title(case)
    )


def gaps(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """How much of the way from LRU to Belady `learned` goes, layer by layer."""
    rows = rows[rows.capacity.isin(digests.COMPARED_CAPACITIES) & rows.gap_closed.notna()]
    rows = rows.assign(
        case=digests.case(rows), resident=rows.capacity.map("{:.0%} resident".format),
        closed=(rows.gap_closed * 100).round(2),
    )  # fmt: skip
    return [
        alt.Chart(part[["layer", "resident", "closed"]])
        .mark_line(point=alt.OverlayMarkDef(size=22))
        .encode(
            x=alt.X("layer:Q", title="MoE layer", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("closed:Q", title="Gap closed, %"),
            color=alt.Color("resident:N", scale=theme.scale(rows.resident)),
            tooltip=[alt.Tooltip("layer:Q"), alt.Tooltip("resident:N"), alt.Tooltip("closed:Q")],
        )
        .properties(height=150, title=theme.title(str(case)))
        for case, part in rows.groupby("case", sort=False)
    ]


def of_the_paper(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """Hit rate against slots, the paper's network at the best of its readings."""
    readings = rows.policy.str.startswith("flashmoe-paper, ")
    rows = rows.assign(
        policy=rows.policy.mask(readings, "paper's network"),
        case=rows.trace + ", " + rows.replay + ", " + rows.counted,
    )
    wanted = ("learned", "paper's network", "lru", "lfu", "arc", "lecar", "belady")
    best = rows.groupby(["case", "slots", "policy"], sort=False).hit_rate.max().reset_index()
    best = best[best.policy.isin(wanted)]
    return [
        alt.Chart(part[["slots", "policy", "hit_rate"]])
        .mark_line(point=alt.OverlayMarkDef(size=22))
        .encode(
            x=alt.X("slots:O", title="Slots a layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("hit_rate:Q", title="Hit rate", axis=alt.Axis(format="%")),
            color=_colour(wanted),
            tooltip=[
                alt.Tooltip("policy:N"),
                alt.Tooltip("slots:O"),
                alt.Tooltip("hit_rate:Q", format=".1%"),
            ],
        )
        .properties(height=theme.PANEL_HEIGHT, title=theme.title(str(case)))
        for case, part in best.groupby("case", sort=False)
    ]


def closed(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """How much of the gap between LRU and Belady each online policy closes."""
    table = digests.gap_closed(rows)
    long = table.melt("case", var_name="policy", value_name="closed").dropna()
    long = long.assign(policy=long.policy.str.removesuffix(", %"), closed=long.closed.round(2))
    long = long.assign(case=theme.two_lines(long.case))
    chart = alt.Chart(long).mark_point(opacity=1).encode(
        y=alt.Y("case:N", sort=None, title=None, axis=theme.bar_names()),
        x=alt.X("closed:Q", title="Gap closed, %"),
        color=_colour(name for name in _SHOWN if name in set(rows.policy)),
        tooltip=[alt.Tooltip("case:N"), alt.Tooltip("policy:N"), alt.Tooltip("closed:Q")],
    )  # fmt: skip
    title = "Gap to Belady closed, 25 to 50 % resident"
    return [chart.properties(height=theme.height(len(table), 30), title=title)]


def quality(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """What quantised experts cost in perplexity, by kind of text."""
    shown = rows[rows.quant != "none"].assign(change=(rows.change * 100).round(4))
    chart = alt.Chart(shown[["kind", "quant", "change"]]).mark_bar().encode(
        y=alt.Y("kind:N", title=None), yOffset="quant:N",
        x=alt.X("change:Q", title="Perplexity over bf16's, %"),
        color=alt.Color("quant:N", scale=theme.scale(shown.quant)),
        tooltip=[alt.Tooltip("kind:N"), alt.Tooltip("quant:N"), alt.Tooltip("change:Q")],
    )  # fmt: skip
    return [
        chart.properties(height=theme.height(len(shown), 16), title="Quality of quantised experts")
    ]
