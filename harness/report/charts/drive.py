"""The drive by fio and by the engine's reader."""

from __future__ import annotations

import altair as alt
import pandas as pd

from harness.report.charts import theme


def bandwidth(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """Bandwidth against block size, a line a depth, a panel a pattern; one scale for all."""
    shown = pd.DataFrame(
        {
            "kib": rows.block_bytes / 1024,
            "gb": (rows.bytes_per_second / 1e9).round(4),
            "depth": rows.depth.map("depth {}".format),
            "pattern": rows.pattern,
        }
    )
    most = float(shown.gb.max())
    return [
        alt.Chart(part.drop(columns="pattern"))
        .mark_line(point=True)
        .encode(
            x=alt.X("kib:Q", title="Block, KiB", scale=alt.Scale(type="log", base=2)),
            y=alt.Y("gb:Q", title="GB/s", scale=alt.Scale(domain=[0, most])),
            color=alt.Color("depth:N", scale=theme.scale(shown.depth)),
            tooltip=[alt.Tooltip("depth:N"), alt.Tooltip("kib:Q"), alt.Tooltip("gb:Q")],
        )
        .properties(height=theme.PANEL_HEIGHT, title=f"{pattern} direct reads by fio")
        for pattern, part in shown.groupby("pattern", sort=False)
    ]


def reader(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """The engine's reader over fio at the same block size and depth; 1 is fio's speed."""
    named = rows.extents_of + "\ndepth " + rows.depth.astype(str)
    shown = rows[["reader_over_fio", "ratio_min", "ratio_max"]].assign(case=named)
    base = alt.Chart(shown).encode(y=alt.Y("case:N", sort=None, title=None, axis=theme.bar_names()))
    x = alt.X("reader_over_fio:Q", title="Reader over fio, times")
    bars = base.mark_bar(color=theme.colour("orange")).encode(
        x=x,
        tooltip=[
            alt.Tooltip("case:N"),
            alt.Tooltip("reader_over_fio:Q"),
            alt.Tooltip("ratio_min:Q"),
            alt.Tooltip("ratio_max:Q"),
        ],
    )
    ranges = base.mark_rule(color=theme.colour("ink")).encode(x="ratio_min:Q", x2="ratio_max:Q")
    equal = alt.Chart(pd.DataFrame({"fio": [1]})).mark_rule(
        color=theme.colour("faint"), strokeDash=[4, 3]
    )
    title = "The engine's reader over fio"
    return [
        (bars + ranges + equal.encode(x="fio:Q")).properties(
            height=theme.height(len(shown), 36), title=title
        )
    ]
