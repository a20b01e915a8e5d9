"""Where datapoints lie, and what a file is called: DATE-CPU-HASH.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flashmoe.disk import files
from harness.report import provenance, report

FOLDER_NAME = "datapoints"
SCHEMA_PATH = Path(__file__).with_name("schema.json")
VERSION = 1  # of the schema
_HASH_DIGITS = 8

Datapoint = dict[str, Any]


def folder() -> Path:
    """Where those that are committed lie."""
    return report.RESULTS / FOLDER_NAME


def committed() -> list[Path]:
    return sorted(folder().glob("*.json"))


def name_of(datapoint: Datapoint) -> str:
    """What its file must be called: the content says all of it."""
    digest = hashlib.sha256(json.dumps(datapoint, sort_keys=True).encode()).hexdigest()
    cpu = provenance.slug(datapoint["machine"]["cpu"])
    return f"{datapoint['date']}-{cpu}-{digest[:_HASH_DIGITS]}.json"


def write(datapoint: Datapoint, into: Path) -> Path:
    """Write its file in the folder `into`, whole or not at all; its path."""
    into.mkdir(parents=True, exist_ok=True)
    path = into / name_of(datapoint)
    text = json.dumps(datapoint, indent=1) + "\n"
    files.replace(path, lambda file: file.write(text.encode()))
    return path
