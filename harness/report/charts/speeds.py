"""Speed against memory, and what was predicted of it."""

from __future__ import annotations

import altair as alt
import pandas as pd

from harness.report import names
from harness.report.charts import theme

_NO_LIMIT = "no limit"
_SPEED = "Decode, token/s"


def against_memory(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """Tokens a second against the cap, a line a system; at one cap only, a bar a system."""
    done = _points(rows, "cap_share")
    if done.empty:
        return []
    if done.memory.nunique() == 1 or done[done.memory != _NO_LIMIT].memory.nunique() == 1:
        return [_bars(done[done.memory == memory], memory) for memory in done.memory.unique()]
    return [_lines(done)]


def each(column: str, rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """The same for each value of a column, such as the weights."""
    return [
        chart.properties(title=f"{column.capitalize()}: {value}")
        for value, part in rows.groupby(column, sort=False)
        for chart in against_memory(part)
    ]


def formats(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """The same by what the experts are held in."""
    share = "experts_share" if "experts_share" in rows else "cap_share"
    held = rows.quant.replace("none", "bf16")
    return [_lines(_points(rows.assign(system=rows.system + ", " + held), share))]


def predicted(rows: pd.DataFrame) -> list[alt.LayerChart | alt.Chart]:
    """Predicted speed against measured; on the line they are equal."""
    measured, guessed = "tokens_per_second", "predicted_tokens_per_second"
    shown = rows[["of_table", measured, guessed]]
    ends = [shown.iloc[:, 1:].min().min(), shown.iloc[:, 1:].max().max()]
    shown = shown.assign(system=rows.system.map(names.system))
    line = alt.Chart(pd.DataFrame({"both": ends})).mark_line(color=theme.colour("grid"))
    log = alt.Scale(type="log", nice=False, padding=12)
    points = alt.Chart(shown).mark_point().encode(
        x=alt.X(f"{measured}:Q", title="Measured, token/s", scale=log),
        y=alt.Y(f"{guessed}:Q", title="Predicted, token/s", scale=log),
        color=alt.Color("system:N", scale=theme.scale(rows.system)),
        tooltip=[alt.Tooltip(name) for name in ("of_table:N", "system:N", f"{measured}:Q",
                                                f"{guessed}:Q")],
    )  # fmt: skip
    both = line.encode(x="both:Q", y="both:Q") + points
    return [both.properties(height=320, title="Predicted and measured decode")]


def _points(rows: pd.DataFrame, share: str) -> pd.DataFrame:
    """What a chart shows of rows that finished, smallest memory first."""
    done = rows[(rows.outcome == "ok") & rows.tokens_per_second.notna()].sort_values(share)
    memory = (done[share] * 100).map("{:.0f} %".format).where(done[share].notna(), _NO_LIMIT)
    columns = {
        "tokens_per_second": "speed", "tokens_per_second_min": "least",
        "tokens_per_second_max": "most", "roofline_tokens_per_second": "roofline",
        "hit_rate": "hit_rate",
    }  # fmt: skip
    points = done[[name for name in columns if name in done]].rename(columns=columns)
    return points.assign(memory=memory, key=done.system, system=done.system.map(names.system))


def _tips(done: pd.DataFrame) -> list[alt.Tooltip]:
    tips = [
        alt.Tooltip("system:N", title="System"),
        alt.Tooltip("memory:N", title="Memory cap"),
        alt.Tooltip("speed:Q", title="token/s, median", format=".3~g"),
        alt.Tooltip("least:Q", title="slowest round", format=".3~g"),
        alt.Tooltip("most:Q", title="fastest round", format=".3~g"),
    ]
    if "hit_rate" in done:
        tips.append(alt.Tooltip("hit_rate:Q", title="Hit rate", format=".1%"))
    return tips


def _lines(done: pd.DataFrame) -> alt.LayerChart:
    colours = theme.scale(done.key)
    color = alt.Color("system:N", scale=colours)
    stroke = alt.StrokeDash("system:N", scale=theme.strokes(colours))
    x = alt.X("memory:O", sort=list(done.memory.unique()), title="Memory cap, share of the model",
              axis=alt.Axis(labelAngle=0))  # fmt: skip
    base = alt.Chart(done.drop(columns="key")).encode(x=x, color=color)
    ranges = base.mark_rule().encode(y=alt.Y("least:Q", title=_SPEED), y2="most:Q")
    lines = base.mark_line().encode(y=alt.Y("speed:Q", title=_SPEED), strokeDash=stroke)
    points = base.mark_point(opacity=1).encode(
        y=alt.Y("speed:Q", title=_SPEED), tooltip=_tips(done)
    )
    return (ranges + lines + points).properties(height=300)


def _bars(done: pd.DataFrame, memory: str) -> alt.LayerChart:
    color = alt.Color("system:N", scale=theme.scale(done.key), legend=None)
    shown = done.drop(columns="key").assign(line=theme.two_lines(done.system))
    base = alt.Chart(shown).encode(y=alt.Y("line:N", sort=None, title=None, axis=theme.bar_names()))
    bars = base.mark_bar().encode(
        x=alt.X("speed:Q", title=_SPEED), color=color, tooltip=_tips(done)
    )
    ranges = base.mark_rule(color=theme.colour("ink")).encode(x="least:Q", x2="most:Q")
    title = f"Memory cap: {memory}" + ("" if memory == _NO_LIMIT else " of the model")
    return (bars + ranges).properties(height=theme.height(len(done), 34), title=title)
