"""What users measured on their machines, and where each stands among all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from flashmoe.errors import FlashMoEError
from harness.report import report
from harness.report.charts import theme
from harness.report.page.columns import Cell, Table, text
from harness.report.page.filters import machine_name
from harness.report.page.speeds import machine_of

FOLDER = "datapoints"
_HEADERS = ["Place", "Machine", "Drive, random reads", "Decode, token/s", "Times the best other",
            "Of the roofline, %", "Disturbed", "Date"]  # fmt: skip


def load() -> list[dict[str, Any]]:
    """All files of results/datapoints/, the oldest first. Raises FlashMoEError for no datapoint."""
    paths = sorted((report.RESULTS / FOLDER).glob("*.json"))
    return sorted(map(_read, paths), key=lambda point: str(point["date"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        point: dict[str, Any] = json.loads(path.read_text()) | {"file": path.name}
        section([point])  # has all that the page shows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlashMoEError(
            f"{FOLDER}/{path.name} is no datapoint ({error!r}): remove it, or measure it again"
        ) from error
    return point


def section(points: list[dict[str, Any]]) -> dict[str, Any]:
    """For the page: a table for each cap, with the project's own machines, and a chart of each."""
    entries = [_of_user(point, row) for point in points for row in _flashmoe(point["rows"])]
    models = {str(point["model"]) for point in points}
    entries += [entry for model in sorted(models) for entry in _own(model)]
    shares = sorted({entry["share"] for entry in entries if entry["file"]})
    return {
        "count": len(points),
        "newest": str(points[-1]["file"]) if points else "",
        "caps": [_standing(share, entries, points) for share in shares],
    }


def _standing(
    share: float, entries: list[dict[str, Any]], points: list[dict[str, Any]]
) -> dict[str, Any]:
    at = sorted((e for e in entries if e["share"] == share), key=lambda e: -e["speed"])
    newest = points[-1]["file"]
    place = next((n for n, entry in enumerate(at, 1) if entry["file"] == newest), 0)
    cap = f"{share * 100:.0f} % of the model" if math.isfinite(share) else "no limit"
    return {
        "cap": cap,
        "place": place,
        "of": len(at),
        "table": _table(at),
        "chart": _chart(at, newest),
    }


def _table(entries: list[dict[str, Any]]) -> Table:
    rows = [
        [
            Cell(str(place), str(place), True),
            Cell("", e["machine"], links=((e["machine"], e["href"]),)),
            _number(e["read"], "{:.2f} GB/s", 1e9, e["drive"]), _number(e["speed"], "{:.3g}"),
            _number(e["over"], "{:.2f}"), _number(e["roofline"], "{:.0f}", 0.01),
            text(e["disturbed"]), text(e["date"]),
        ]
        for place, e in enumerate(entries, 1)
    ]  # fmt: skip
    return Table(_HEADERS, rows)


def _number(value: float | None, form: str, unit: float = 1.0, before: str = "") -> Cell:
    if value is None or pd.isna(value):
        return Cell(before, "", True)
    return Cell(f"{before} {form.format(value / unit)}".strip(), f"{value:.9g}", True)


def _chart(entries: list[dict[str, Any]], newest: str) -> dict[str, Any]:
    whose = {True: "the newest", False: "a user's"}
    shown = pd.DataFrame(
        {
            "machine": f"{place}. {entry['machine']}".replace(", ", "\n", 1),
            "speed": entry["speed"],
            "whose": whose[entry["file"] == newest] if entry["file"] else "the project's",
        }
        for place, entry in enumerate(entries, 1)
    )
    names = ["the newest", "a user's", "the project's"]
    chart = alt.Chart(shown).mark_bar().encode(
        y=alt.Y("machine:N", sort=None, title=None, axis=theme.bar_names()),
        x=alt.X("speed:Q", title="FlashMoE, decode, token/s"),
        color=alt.Color("whose:N", scale=theme.scale(names)),
        tooltip=[alt.Tooltip("machine:N"), alt.Tooltip("speed:Q")],
    )  # fmt: skip
    return theme.specification(chart.properties(height=theme.height(len(entries), 34)))


def _of_user(point: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    machine, drive = point["machine"], point["drive"]
    sets = " ".join(machine["instruction_sets"])
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    return {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {memory}, {sets}".rstrip(", "),
        "file": point["file"],
        "href": f"{FOLDER}/{point['file']}",
        "drive": str(drive["class"]),
        "read": drive["random_read_bytes_per_second"],
        "disturbed": row["disturbed"],
        "date": point["date"],
    } | _speeds(row, point["rows"])


def _own(model: str) -> list[dict[str, Any]]:
    """The project's machines: the same model, measured by `reproduce`."""
    entries = []
    for path in sorted(report.RESULTS.glob(f"*/speedups-{model}.csv")):
        rows = json.loads(pd.read_csv(path).to_json(orient="records"))
        record = report.records(path.parent).get(path.stem, {})
        entries += [
            {
                "machine": machine_name(machine_of(path.parent.name)), "file": "", "drive": "",
                "href": f"{path.parent.name}/{path.name}",
                "read": row.get("drive_bytes_per_second"),
                "disturbed": None, "date": record.get("date", ""),
            }
            | _speeds(row, rows)
            for row in _flashmoe(rows)
        ]  # fmt: skip
    return entries


def _flashmoe(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["system"] == "flashmoe" and row["outcome"] == "ok"]


def _speeds(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    rivals = [
        other["tokens_per_second"]
        for other in rows
        if other["cap_share"] == row["cap_share"] and other["outcome"] == "ok"
        and not other["system"].startswith("flashmoe")
    ]  # fmt: skip
    share = row["cap_share"]
    return {
        "share": math.inf if share is None else float(share),
        "speed": row["tokens_per_second"],
        "over": row["tokens_per_second"] / max(rivals) if rivals else None,
        "roofline": row.get("share_of_roofline"),
    }
