"""Each table under results/ as a figure: charts, rows, where it comes from, its CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.report import charts, report
from harness.report.charts import theme
from harness.report.page import columns
from harness.report.page.filters import machine_name, marks
from harness.report.page.speeds import KINDS, machine_of, subject
from harness.report.page.verdicts import anchor

TITLES = {
    "speedups": "Decode speed under memory caps, transformers",
    "compare": "Every engine on the same weights",
    "servers": "llama-server with FlashMoE and without, and BigMoeOnEdge",
    "published": "Experts in the format that they are published in",
    "quant": "Quantised experts",
    "tiers": "What Fiddler and DAOP pin",
    "drives": "Two drives beside one",
    "storage": "Storage classes, by read limits",
    "generation": "Where a token's time goes",
    "timeline": "One token, read by read",
    "hit_rates": "Hit rates and the gap to Belady, by policy and cache size",
    "gap_by_layer": "The gap closed, layer by layer",
    "policy_cost": "What policies cost",
    "policy_scale": "What policies cost with many experts",
    "ceiling": "How much of the gap can be known",
    "paper": "The paper's figures beside ours",
    "paper_rates": "Hit rates of the paper's policy",
    "paper_training": "Training the paper's policy",
    "plan": "Predicted speeds beside measured ones",
    "prompt_experts": "Experts that a prompt needs",
    "ssd": "The drive by fio",
    "reader": "The engine's reader beside fio",
    "server_tests": "llama.cpp's own server tests",
    "quality": "What other output costs in quality",
    "packing": "Packing a store",
    "faults": "Faults",
    "mutations": "Damaged checkpoints",
    "soak": "Running for long",
    "served": "Serving over HTTP",
    "long_prompts": "Memory of long prompts",
    "warm": "Starting warm",
    "text": "Generated text",
}


@dataclass(frozen=True)
class Figure:
    """One table of one machine."""

    id: str
    title: str
    badges: list[str]  # how its numbers came about
    charts: dict[str, dict[str, Any]]  # Vega-Lite by the id of its place
    table: columns.Table
    provenance: list[tuple[str, str]]
    files: list[str]  # relative to results/
    marks: dict[str, str]


@dataclass(frozen=True)
class Kind:
    """All figures of one kind, with what a reader must know of them."""

    id: str
    title: str
    note: str
    figures: list[Figure]


def kinds() -> list[Kind]:
    found: dict[str, list[Figure]] = {}
    for folder in report.folders():
        for path in sorted(folder.glob("*.csv")):
            kind = report.kind_of(path.stem)
            if kind in columns.COLUMNS:
                found.setdefault(kind, []).append(_figure(folder, path.stem))
    return [
        Kind(kind, TITLES[kind], report.note(kind), found[kind])
        for kind in columns.COLUMNS
        if kind in found
    ]


def _figure(folder: Path, name: str) -> Figure:
    frame = report.read(folder, name)
    machine, kind = machine_of(folder.name), report.kind_of(name)
    model = subject(folder, name)[0] if kind in KINDS and name != "quant-quality" else ""
    place = anchor(folder.name, name)
    specs = [theme.specification(chart) for chart in charts.of(folder, name)]
    what = name.removeprefix(kind).lstrip("-").replace("-", " ", 0)
    title = f"{what}, {machine_name(machine)}" if what else machine_name(machine)
    badges = [report.evidence(name)]
    if "read_limit_bytes_per_second" in frame:
        limits = frame.read_limit_bytes_per_second.dropna().unique()
        badges += [f"throttled to {limit / 1e6:.0f} MB/s" for limit in limits]
    return Figure(
        place, title, badges,
        {f"{place}--{number}": spec for number, spec in enumerate(specs)},
        columns.shown(name, frame), _provenance(folder, name),
        [
            f"{folder.name}/{each}.csv"
            for each in (name, f"tokens-{name}")
            if (folder / f"{each}.csv").exists()
        ],
        marks(machine, model),
    )  # fmt: skip


def _provenance(folder: Path, name: str) -> list[tuple[str, str]]:
    record = report.records(folder).get(report.record_of(name))
    if record is None:
        return [("Provenance", "not recorded")]
    commit = record["commit"] or "unknown"
    if record["uncommitted_changes"]:
        commit += ", with uncommitted changes"
    told = [
        ("Command", record["command"]), ("Date", record["date"]), ("Commit", commit),
        ("Machine", _listed(record["machine"])), ("Versions", _listed(record["versions"])),
    ]  # fmt: skip
    known = {"command", "date", "commit", "uncommitted_changes", "machine", "versions"}
    rest = {key: value for key, value in record.items() if key not in known and value is not None}
    return [*told, ("Also", _listed(rest))] if rest else told


def _listed(values: dict[str, Any]) -> str:
    said = []
    for key, value in values.items():
        words = ", ".join(map(str, value)) if isinstance(value, list) else value
        if words not in ("", None):
            said.append(f"{key.replace('_', ' ')} {words}")
    return "; ".join(said)
