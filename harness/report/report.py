"""Tables under results/: written as CSV, each with a record of where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from harness.report.provenance import gather

RESULTS = Path(__file__).parents[2] / "results"
RECORDS = "provenance.json"
_NOTES = Path(__file__).parent / "notes"
# Columns of measured times and speeds; more digits than these would be noise in every diff.
_MEASURED = ("_ms", "seconds", "_per_second", "_per_second_min", "_per_second_max")
_MEASURED_DIGITS = 4


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A directory on the results' file system, removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".scratch-", dir=folder) as path:
        yield Path(path)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Write `name`.csv in `folder`: six digits, four of times and speeds. Returns the table."""
    frame = pd.DataFrame(rows)
    folder.mkdir(parents=True, exist_ok=True)
    _rounded(frame).to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    return frame


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    measured = [c for c in frame if c.endswith(_MEASURED) and not c.startswith("read_limit_")]
    return frame.assign(
        **{
            column: frame[column].map(
                lambda value: float(f"{value:.{_MEASURED_DIGITS}g}"), na_action="ignore"
            )
            for column in measured
        }
    )


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv")


def record(folder: Path, name: str, command: str, **more: Any) -> None:
    """Note in `folder` that `command` has just written table(s) `name` on this machine."""
    provenance(folder, name, gather(command, folder, **more))


def provenance(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Keep the record of the run that wrote table(s) `name`."""
    (folder / RECORDS).write_text(json.dumps(records(folder) | {name: record}, indent=1) + "\n")


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder, by name; empty where no run was finished."""
    path = folder / RECORDS
    runs: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return runs


def folders() -> list[Path]:
    """Where runs were finished: one folder a machine and profile."""
    return sorted(path.parent for path in RESULTS.glob(f"*/{RECORDS}"))


# Tables that the run of another one writes as well.
_WRITTEN_WITH = {
    "soak-llama": "soak",
    "reader": "ssd",
    "gap_by_layer": "hit_rates",
    "policy_cost": "hit_rates",
    "paper_rates": "paper",
    "paper_training": "paper",
    "text": "generation",
    "quality": "generation",
    "warm": "generation",
}


def record_of(table: str) -> str:
    """The name of the record that tells where `table` came from."""
    kind, _, rest = table.partition("-")
    if kind == "tokens":
        return rest
    if kind in ("timeline", "packing"):
        return f"speedups-{rest}"
    return "faults" if kind == "faults" else _WRITTEN_WITH.get(table, table)


def kind_of(table: str) -> str:
    """`speedups` of `speedups-MODEL`: tables of one kind share a note, a picture and columns."""
    return table.partition("-")[0]


def note(table: str) -> str:
    """What a table's reader must know."""
    return (_NOTES / f"{kind_of(table)}.md").read_text()


def evidence(table: str) -> str:
    """How its figures came about, the first word of its note: measured, replayed, ..."""
    return note(table).split(maxsplit=1)[0].strip(".,:").lower()
