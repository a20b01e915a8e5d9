"""Committed rows of measured speed, as `flashmoe plan` would have seen them before the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from flashmoe.engines.model_facts import ModelFacts
from harness.report import report
from harness.runs.gguf_systems.llama_server import PLAIN
from harness.runs.model_heads import checkpoint_facts, gguf_facts
from harness.tables import full_scale

_SERVED = "flashmoe run llama-server"
# Whose rows without a limit tell the speed of llama.cpp's arithmetic, best first: a run of ours
# that stands aside, as all fits, multiplies by other kernels than one that streams.
_UNLIMITED = (PLAIN, _SERVED, "BigMoeOnEdge")
_RESIDENT_BELOW = 0.01  # of a token's experts may be read by what counts as all-resident
_ARITHMETIC = {"flashmoe": "exact", "flashmoe-fast": "fast", _SERVED: "exact"}
_STAND_INS = {"olmoe-1b-7b": "demo", "olmoe-quarter": "demo"}  # whose routing they had
RESIDENT, PARTS = "an all-resident row", "parts of a row's own token"
_PARTS_MS = ("experts_ms", "rest_of_model_ms", "python_ms", "policy_ms")


@dataclass(frozen=True)
class Case:
    """A row: what it had, and what was measured."""

    folder: str
    table: str
    system: str
    facts: ModelFacts
    arithmetic: str
    trace: str  # of the hit-rate table
    share: float  # of the experts that fit
    drive_bytes_per_second: float
    cores: int
    avx512: bool
    hit_rate: float
    tokens_per_second: float
    first_token_seconds: float
    arithmetic_seconds: float  # of a token, as other rows or its own parts tell
    arithmetic_from: str

    @property
    def source(self) -> tuple[str, str]:
        """The table, which is left out when a row of it is judged."""
        return self.folder, self.table

    @property
    def machine(self) -> str:
        """Its description: a folder is named after it and the profile."""
        return self.folder.partition("gib-")[0]


def committed() -> list[Case]:
    """Every row of FlashMoE under a limit, where the drive's speed is known."""
    return [case for folder in report.folders() for case in _of_folder(folder)]


def _of_folder(folder: Path) -> Iterator[Case]:
    for path in sorted(folder.glob("*.csv")):
        kind, record = report.kind_of(path.stem), report.records(folder).get(path.stem)
        if kind not in ("speedups", "published", "servers") or record is None:
            continue
        frame = report.read(folder, path.stem)
        frame = frame[frame.outcome == "ok"]
        cases = _served(path.stem, frame) if kind == "servers" else _loaded(frame)
        for case in cases:
            yield replace(
                case,
                folder=folder.name,
                table=path.stem,
                cores=record["machine"]["cores"],
                avx512="avx512" in folder.name,  # see provenance.machine_slug
            )


def _served(table: str, frame: pd.DataFrame) -> Iterator[Case]:
    name = next(n for n in full_scale.MODELS if table.startswith(f"servers-{n}-"))
    scheme = table.removeprefix(f"servers-{name}-").removesuffix("-repeating")
    facts = gguf_facts(name, scheme)
    reads_little = frame.bytes_per_token < _RESIDENT_BELOW * facts.touched_bytes
    unlimited = frame[frame.cap_share.isna() & reads_little].set_index("system").tokens_per_second
    speed = next((unlimited[system] for system in _UNLIMITED if system in unlimited), None)
    if speed is None:
        return
    for row in _rows(frame[frame.system.eq(_SERVED) & frame.cap_share.notna()]):
        share = row["slots_per_layer"] / facts.n_experts
        trace = f"{name} stand-in"
        yield _case(row, facts, trace, share, row["prompt_seconds"], 1 / speed, RESIDENT)


def _loaded(frame: pd.DataFrame) -> Iterator[Case]:
    for _, rows in frame[frame.system.isin(_ARITHMETIC)].groupby("system", sort=False):
        resident = rows[rows.hit_rate == 1]
        for row in _rows(rows[rows.hit_rate < 1]):
            facts, trace = checkpoint_facts(row["model"]), f"{row['model']} stand-in"
            if "expert_bytes" in row:
                count = facts.layers * facts.n_experts
                facts = replace(
                    facts,
                    weights=row["quant"] if row["quant"] != "none" else facts.weights,
                    experts_bytes=int(row["expert_bytes"]) * count,
                )
            if "routing" in row and not row["routing"].startswith(full_scale.SHIPPED):
                trace = row["routing"].partition(":")[0]
            if len(resident):
                seconds, told = 1 / resident.tokens_per_second.iloc[0], RESIDENT
            else:
                same = rows[rows.quant == row["quant"]] if "quant" in row else rows
                largest = same.loc[same.memory_bytes.idxmax()]
                seconds, told = sum(largest[part] for part in _PARTS_MS) / 1e3, PARTS
            share = min(1.0, row["memory_bytes"] / facts.experts_bytes)
            first = row["first_token_seconds"]
            yield _case(row, facts, trace, share, first, seconds, told)


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame[frame.drive_bytes_per_second.notna()].to_dict("records")  # type: ignore[return-value]


def _case(
    row: dict[str, Any],
    facts: ModelFacts,
    trace: str,
    share: float,
    first_token_seconds: float,
    arithmetic_seconds: float,
    arithmetic_from: str,
) -> Case:
    limit = row.get("read_limit_bytes_per_second")
    drive = row["drive_bytes_per_second"]
    model = trace.removesuffix(" stand-in")
    return Case(
        folder="",
        table="",
        system=row["system"],
        facts=facts,
        arithmetic=_ARITHMETIC[row["system"]],
        trace=_STAND_INS.get(model, trace),
        share=share,
        drive_bytes_per_second=min(drive, limit) if limit and limit == limit else drive,
        cores=0,
        avx512=False,
        hit_rate=row["hit_rate"],
        tokens_per_second=row["tokens_per_second"],
        first_token_seconds=first_token_seconds,
        arithmetic_seconds=arithmetic_seconds,
        arithmetic_from=arithmetic_from,
    )
