"""Measures this machine for a datapoint, in a given time."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import flashmoe
from flashmoe.engines.transformers.checkpoints.named_models import config_of
from flashmoe.errors import FlashMoEError
from flashmoe.plan import machine as plan_machine
from flashmoe.util import cores
from harness.datapoints import check, files
from harness.datapoints.files import Datapoint
from harness.datapoints.machine import drive_class, machine
from harness.progress import say
from harness.report import provenance, report
from harness.runs import disturbance, ssd
from harness.runs.memory_cap import require_limits
from harness.tables import full_scale

MINUTES = 15.0
CAPS = (0.4, 1.2)  # of the model: reading every token, and all in memory; as the memory allows
ROUNDS = 3  # as far as the time allows
_BEGIN_SHARE = 0.8  # of the time, after which no run begins: the last one must end
_FIO_SECONDS = 1.0
_COLUMNS = (
    *("system", "cap_share", "outcome", "rounds"),
    *("tokens_per_second", "tokens_per_second_min", "tokens_per_second_max"),
    *("first_token_seconds", "hit_rate", "roofline_tokens_per_second", "share_of_roofline"),
    "disturbed",
)


def measure(command: str, into: Path, minutes: float = MINUTES) -> Path:
    """Measure the machine, and the drive that holds `into`; the datapoint's path in there.

    Raises FlashMoEError, at once where it can, where what came out would be refused, where fio is
    missing, or where nothing can be capped.
    """
    until = time.monotonic() + 60 * minutes * _BEGIN_SHARE
    gathered = provenance.gather(command, into)
    if gathered["commit"] is None:
        raise FlashMoEError(
            "git does not tell this code's commit: a datapoint needs a clone that you own"
        )
    if gathered["uncommitted_changes"]:
        raise FlashMoEError("this code differs from its commit: a datapoint needs a clone as it is")
    if ssd.fio_path() is None:
        raise FlashMoEError("fio is missing: install it (for example `sudo apt install fio`)")
    require_limits()
    with report.scratch(into) as work:
        about = {"machine": machine(), "drive": _drive(work), "speed": _speed()}
        comparison = replace(full_scale.QUICK, caps=CAPS, rounds=ROUNDS, until=until)
        full_scale.full_scale(work, command, comparison)
        table = report.read(work, full_scale.title_of("speedups", comparison.model, "none"))
        datapoint = assemble(table, about, gathered)
    if why := next(check.faults(datapoint), None):
        raise FlashMoEError(f"no datapoint is written, as it would be refused: {why}")
    return files.write(datapoint, into)


def assemble(table: pd.DataFrame, about: dict[str, Any], gathered: dict[str, Any]) -> Datapoint:
    """A datapoint of the speedup table; gathered: where it came from, as provenance has it."""
    rows = json.loads(table.reindex(columns=_COLUMNS).to_json(orient="records"))
    for row in rows:
        row["rounds"] = row["rounds"] and int(row["rounds"])
    most = table.reindex(columns=disturbance.FIGURES).max()
    return {
        "schema": files.VERSION,
        "date": gathered["date"],
        "flashmoe": flashmoe.__version__,
        "torch": gathered["versions"]["torch"],
        "commit": gathered["commit"],
        "uncommitted_changes": gathered["uncommitted_changes"],
        **about,
        "disturbance": {name: None if pd.isna(v) else float(v) for name, v in most.items()},
        "model": full_scale.QUICK.model,
        "rows": rows,
    }


def _drive(folder: Path) -> dict[str, Any]:
    say("measuring the drive")
    config = config_of(full_scale.QUICK.model)
    block_bytes = 3 * config.hidden_size * config.intermediate_size * 2  # matrices in bf16
    with ssd.test_file(folder) as path:
        random, sequential = (
            ssd.read_speed(path, block_bytes, _FIO_SECONDS, pattern)
            for pattern in ("random", "sequential")
        )
    kind, said_by = drive_class(folder, max(random, sequential))
    return {
        "class": kind,
        "class_by": said_by,
        "block_bytes": block_bytes,
        "random_read_bytes_per_second": random,
        "sequential_read_bytes_per_second": sequential,
    }


def _speed() -> dict[str, float]:
    say("measuring memory and a product")
    fastest = min(disturbance.product_seconds() for _ in range(3))
    return {
        "memory_read_bytes_per_second": float(plan_machine.memory_speed(cores.available())),
        "product_flop_per_second": disturbance.PRODUCT_OPERATIONS / fastest,
    }
