"""Colours and sizes of charts; a chart as a specification for a page, or as PNG for a document.

A page's style sheet gives the colours, dark or light, so a chart names them as CSS variables.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image

from harness.report import names

# A name, and the colour on light and on dark ground. Eight hues that the colour-blind tell apart.
COLOURS = {
    "ink": ("#1c2430", "#e6e9ee"),
    "faint": ("#5b6675", "#9aa5b4"),
    "grid": ("#d9dee5", "#333c48"),
    "ground": ("#ffffff", "#14181e"),
    "orange": ("#d1490c", "#ff8a4c"),
    "blue": ("#1f6fb4", "#62b0f0"),
    "green": ("#1d8553", "#4cc38a"),
    "purple": ("#7b4fb5", "#b894f0"),
    "gold": ("#a87a00", "#e0b341"),
    "pink": ("#c23a7c", "#f07fb4"),
    "teal": ("#0b8390", "#46c5d0"),
    "grey": ("#6f7a88", "#a3adba"),
}
_HUES = ("orange", "blue", "green", "purple", "gold", "pink", "teal", "grey")
# What a picture shows keeps its colour in all of them.
_OF = {
    "flashmoe": "orange", "flashmoe run llama-server": "orange", "learned": "orange",
    "flashmoe-fast": "pink", "fiddler": "blue", "daop": "green", "os-paging": "purple",
    "llama-cpp": "teal", "llama-server --no-repack": "teal", "llama-server": "blue",
    "BigMoeOnEdge": "green", "in-memory": "grey", "airllm": "gold", "lru": "grey", "lfu": "blue",
    "lfu-decay": "teal", "arc": "gold", "s3-fifo": "green", "lecar": "purple", "belady": "ink",
    "belady-bypass": "faint", "paper's network": "pink",
}  # fmt: skip
_STROKES = [1, 0], [5, 3], [2, 2]
PANEL_HEIGHT = 240  # pixels
_LABEL_WIDTH = 165  # pixels
_PNG_COLOURS = 96  # the hues on white, with what smooths their edges
_PNG_WIDTH = {1: 620, 2: 420, 3: 300}  # of a panel, by how many stand side by side


def colour(name: str) -> str:
    return f"var(--{name})"


def scale(keys: Iterable[str]) -> alt.Scale:
    """A colour for each system or policy, the same in every chart for those that are known.

    Its domain, and so what a chart holds, are the names that people say.
    """
    domain = list(dict.fromkeys(keys))
    free = [hue for hue in _HUES if hue not in {_OF.get(key) for key in domain}]
    given = {
        names.system(key): _OF.get(key) or (free.pop(0) if free else _HUES[number % len(_HUES)])
        for number, key in enumerate(domain)
    }
    return alt.Scale(domain=list(given), range=[colour(hue) for hue in given.values()])


def strokes(colours: alt.Scale) -> alt.Scale:
    """Whole lines, and broken ones in another way where a colour comes again."""
    before: dict[str, int] = {}
    given = []
    for hue in colours.range:
        given.append(_STROKES[before.get(hue, 0) % len(_STROKES)])
        before[hue] = before.get(hue, 0) + 1
    return alt.Scale(domain=colours.domain, range=given)


def two_lines(names: pd.Series) -> pd.Series:
    """For an axis of bars: what follows the first comma stands in a line of its own."""
    return names.str.replace(", ", "\n", n=1)


def title(name: str) -> list[str]:
    """Above a panel, which may be narrow: likewise."""
    return name.split(", ", 1)


def bar_names() -> alt.Axis:
    """The axis of names that `two_lines` gave."""
    return alt.Axis(labelExpr=r"split(datum.label, '\n')", grid=False)


def config() -> dict[str, Any]:
    """What all charts share."""
    text = {"labelColor": colour("faint"), "titleColor": colour("faint")}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "title": {
            "color": colour("ink"), "anchor": "start", "fontSize": 13, "fontWeight": 600,
            "offset": 8, "limit": 420,
        },
        "axis": text | {
            "gridColor": colour("grid"), "domainColor": colour("grid"),
            "tickColor": colour("grid"), "labelFontSize": 11, "titleFontSize": 11,
            "titleFontWeight": "normal", "labelLimit": _LABEL_WIDTH,
        },
        "legend": text | {
            "orient": "bottom", "columns": 2, "title": None, "labelFontSize": 11,
            "labelLimit": 240, "symbolStrokeWidth": 3,
        },
        "line": {"strokeWidth": 2},
        "point": {"size": 45, "filled": True},
        "rule": {"strokeWidth": 1.5},
    }  # fmt: skip


def specification(chart: alt.LayerChart | alt.Chart) -> dict[str, Any]:
    """Vega-Lite for a page, as wide as its container; without what all charts share."""
    whole: dict[str, Any] = chart.properties(width="container").to_dict(validate=False)
    for shared in ("config", "$schema"):
        whole.pop(shared, None)
    return whole | {"autosize": {"type": "fit-x", "contains": "padding"}}


def height(rows: int, of_row: int) -> int:
    """Of a chart of bars, in pixels: a step of Vega-Lite's would not go with `fit`."""
    return max(1, rows) * of_row


def png(panels: list[alt.LayerChart | alt.Chart], path: Path) -> None:
    """All panels as one picture on light ground."""
    columns = min(len(panels), 3)
    sized = [panel.properties(width=_PNG_WIDTH[columns]) for panel in panels]
    whole = sized[0] if len(sized) == 1 else alt.concat(*sized, columns=columns)
    text = json.dumps(whole.to_dict() | {"config": config() | {"background": "white"}})
    for name, (light, _) in COLOURS.items():
        text = text.replace(colour(name), light)
    drawn = Image.open(io.BytesIO(vl_convert.vegalite_to_png(text, scale=1.5)))
    few = drawn.convert("RGB").quantize(_PNG_COLOURS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)  # a fifth of the bytes, which git keeps for ever
