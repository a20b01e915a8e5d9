"""The charts of tables, as Vega-Lite. Everything that a chart shows is in a CSV file.

theme     colours, sizes, and a chart as a specification or as PNG
speeds    speed against memory, and what was predicted of it
tokens    where the time of a token goes
policies  hit rates by policy
drive     the drive by fio and by the engine's reader
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import altair as alt
import pandas as pd

from harness.report import report
from harness.report.charts import drive, policies, speeds, tokens

CHARTS: dict[str, Callable[[pd.DataFrame], list[alt.LayerChart | alt.Chart]]] = {
    "speedups": speeds.against_memory,
    "servers": speeds.against_memory,
    "compare": partial(speeds.each, "weights"),
    "storage": partial(speeds.each, "storage"),
    "published": speeds.formats,
    "plan": speeds.predicted,
    "generation": tokens.parts,
    "timeline": tokens.timelines,
    "hit_rates": lambda rows: policies.gains(rows) + policies.closed(rows),
    "gap_by_layer": policies.gaps,
    "paper_rates": policies.of_the_paper,
    "reader": drive.reader,
    "ssd": drive.bandwidth,
}
_OTHERWISE = {"quant-quality": policies.quality}


def of(folder: Path, name: str) -> list[alt.LayerChart | alt.Chart]:
    """The charts of table `name` in `folder`, one a panel; none where the table says it all."""
    kind = report.kind_of(name)
    draw = _OTHERWISE.get(name) or (speeds.formats if kind == "quant" else CHARTS.get(kind))
    return draw(report.read(folder, name)) if draw else []
