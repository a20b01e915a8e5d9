"""Where the time of a token goes."""

from __future__ import annotations

import altair as alt
import pandas as pd

from harness.report import names
from harness.report.charts import theme

_PARTS = {
    "wait_ms": ("waiting for reads", "orange"),
    "experts_ms": ("expert arithmetic", "blue"),
    "rest_of_model_ms": ("rest of the model", "teal"),
    "python_ms": ("Python around the experts", "gold"),
    "policy_ms": ("policy", "green"),
}
_SPANS = {
    "demand": ("needed reads", "orange", "drive"),
    "guess": ("guessed reads", "gold", "drive"),
    "experts": ("experts", "blue", "processor"),
    "rest": ("the rest", "teal", "processor"),
}


def parts(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """A bar for each system and number of slots: the milliseconds of a token by part."""
    rows = rows[rows.wait_ms.notna()].sort_values(["system", "slots"], ascending=[False, True])
    if rows.empty:
        return []
    held = rows.slots.map("\n{:.3g} slots, ".format)
    hits = (rows.hit_rate * 100).map("{:.0f} % hits".format)
    rows = rows.assign(case=rows.system.map(names.system) + held + hits)
    long = rows.melt("case", list(_PARTS), "part", "milliseconds")
    labels = {name: label for name, (label, _) in _PARTS.items()}
    long = long.assign(part=long.part.map(labels), order=long.part.map(list(_PARTS).index))
    colours = alt.Scale(
        domain=[label for label, _ in _PARTS.values()],
        range=[theme.colour(hue) for _, hue in _PARTS.values()],
    )
    chart = alt.Chart(long).mark_bar().encode(
        y=alt.Y("case:N", sort=None, title=None, axis=theme.bar_names()),
        x=alt.X("milliseconds:Q", title="Milliseconds a token"),
        color=alt.Color("part:N", scale=colours), order="order:Q",
        tooltip=[alt.Tooltip("case:N"), alt.Tooltip("part:N"),
                 alt.Tooltip("milliseconds:Q", format=".3~g")],
    )  # fmt: skip
    return [
        chart.properties(
            height=theme.height(len(rows), 36), title="Demo model: where a token's time goes"
        )
    ]


def timelines(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """One token of each system: the drive above, the processor below; all on one scale."""
    end = float(rows.end_ms.max())
    return [_timeline(system, events, end) for system, events in rows.groupby("system", sort=False)]


def _timeline(system: str, events: pd.DataFrame, longest_ms: float) -> alt.Chart:
    spans = pd.concat([events[events.what != "layer"], _outside(events)])
    shown = pd.DataFrame(
        {
            "what": spans.what.map({name: label for name, (label, _, _) in _SPANS.items()}),
            "where": spans.what.map({name: where for name, (_, _, where) in _SPANS.items()}),
            "start": spans.start_ms.round(1),
            "end": spans.end_ms.round(1),
        }
    ).dropna()
    colours = alt.Scale(
        domain=[label for label, _, _ in _SPANS.values()],
        range=[theme.colour(hue) for _, hue, _ in _SPANS.values()],
    )
    chart = alt.Chart(shown).mark_bar(height={"band": 0.85}).encode(
        x=alt.X("start:Q", title="Milliseconds", scale=alt.Scale(domain=[0, longest_ms])),
        x2="end:Q",
        y=alt.Y("where:N", title=None, sort=["drive", "processor"]),
        color=alt.Color("what:N", scale=colours, legend=alt.Legend(columns=2)),
        tooltip=[alt.Tooltip("what:N"), alt.Tooltip("start:Q"), alt.Tooltip("end:Q")],
    )  # fmt: skip
    return chart.properties(
        height=theme.height(2, 34), title=f"{names.system(system)}: {events.end_ms.max():.0f} ms"
    )


def _outside(events: pd.DataFrame) -> pd.DataFrame:
    """The rest of the model: what lies between the layers' experts."""
    layers = events[events.what == "layer"].sort_values("start_ms")
    starts = [0.0, *layers.end_ms]
    ends = [*layers.start_ms, float(events.end_ms.max())]
    spans = pd.DataFrame({"what": "rest", "start_ms": starts, "end_ms": ends})
    return spans[spans.end_ms > spans.start_ms]
