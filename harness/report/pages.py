"""A page for each folder of results/: every table's note, picture and most telling columns.

Pages and their pictures are drawn from the committed CSV alone, and are not committed: `python -m
harness draw`. The exceptions are the pictures that README.md and docs/ show (figures.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from flashmoe.errors import FlashMoEError
from harness.report import digests, plots, report

# Of each kind, in the order of a page; at most eight fit it. None: its picture says it all.
COLUMNS: dict[str, tuple[str, ...] | None] = {
    "ssd": ("pattern", "block_bytes", "depth", "bytes_per_second", "latency_p50_ms",
            "latency_p99_ms"),
    "reader": ("extents_of", "depth", "reader_bytes_per_second", "fio_bytes_per_second",
               "reader_over_fio", "ratio_min", "ratio_max"),
    "hit_rates": None,
    "gap_by_layer": None,
    "policy_cost": None,
    "policy_scale": ("geometry", "policy", "slots", "hit_rate", "microseconds_per_event",
                     "milliseconds_per_token", "share_of_token"),
    "ceiling": ("trace", "capacity", "lru_hit_rate", "learned_hit_rate", "predictor_hit_rate",
                "belady_hit_rate", "learned_gap_closed", "predictor_gap_closed"),
    "paper": ("figure", "the_paper", "here_least", "here_most", "verdict", "cases",
              "cases_that_hold"),
    "paper_rates": None,
    "paper_training": None,
    "generation": ("system", "slots", "hit_rate", "tokens_per_second", "share_of_roofline",
                   "wait_ms", "experts_ms", "same_output"),
    "speedups": ("cap_share", "system", "slots", "hit_rate", "bytes_per_token",
                 "tokens_per_second", "share_of_roofline", "flashmoe_speedup"),
    "peers": ("cap_share", "system", "slots", "hit_rate", "tokens_per_second",
              "share_of_roofline", "flashmoe_speedup", "tokens_differing"),
    "servers": ("cap_share", "system", "outcome", "slots_per_layer", "hit_rate",
                "tokens_per_second", "prompt_seconds", "flashmoe_speedup"),
    "server_tests": ("test", "plain", "flashmoe", "same"),
    "quant": ("cap_share", "quant", "slots", "hit_rate", "bytes_per_token", "tokens_per_second",
              "share_of_roofline", "over_bf16"),
    "published": ("experts_share", "quant", "system", "hit_rate", "bytes_per_token",
                  "tokens_per_second", "share_of_roofline", "over_bf16"),
    "plan": ("of_table", "system", "resident_share", "hit_rate", "predicted_hit_rate",
             "tokens_per_second", "predicted_tokens_per_second", "uncalibrated_tokens_per_second"),
    "prompt_experts": ("trace", "tokens", "sequences", "needed_share"),
    "timeline": None,
    "quality": ("system", "slots", "perplexity", "perplexity_of_the_model", "tokens_differing",
                "prediction_accuracy"),
    "tiers": ("trace", "system", "pins", "pinned_share", "hit_rate_per_token",
              "hit_rate_per_event", "tokens_per_second", "first_token_seconds"),
    "packing": ("model", "store_bytes", "seconds", "peak_rss_bytes", "page_cache_bytes"),
    "faults": ("fault", "injected", "runs", "right", "refused", "wrong", "hangs", "other"),
    "mutations": ("mutation", "mutants", "equal", "refused", "alike", "more", "different",
                  "traceback"),
    "soak": ("seconds", "rounds", "tokens", "rss_bytes", "descriptors", "threads"),
    "served": ("engine", "requests", "equal", "different", "second_turn_share", "whole_of_plain",
               "streamed_of_plain", "watched_of_whole"),
    "long_prompts": ("tokens", "system", "peak_beside_bytes", "experts_beside_bytes",
                     "hidden_bytes", "busiest_expert_tokens"),
    "warm": ("kind", "first_token_cold", "first_token_warm", "first_100_cold", "first_100_warm"),
    "text": ("kind", "same_output", "hit_rate_8_slots", "hit_rate_24_slots", "text"),
}  # fmt: skip
# Tables whose names say more than their kind.
SPECIAL_COLUMNS = {
    "quant-quality": ("quant", "kind", "expert_bytes", "tokens", "perplexity", "change",
                      "same_as_held"),
    "faults-llama-reads": (
        "fault", "injected", "requests", "right", "refused", "wrong", "hangs", "other",
    ),
    "faults-llama-files": ("file", "requests", "right", "refused", "wrong", "hangs", "other"),
    "faults-llama-kills": ("kills", "kept", "right", "wrong", "hangs", "other"),
    "soak-neighbour": (
        "engine", "seconds", "answers", "neighbour_bytes", "least_budget_bytes",
        "most_budget_bytes", "grew", "shrank",
    ),
    "faults-kills": ("before", "kills", "steps", "no store", "whole store", "damaged"),
}  # fmt: skip
DIGESTS = {
    "hit_rates": digests.hit_rates,
    "policy_cost": digests.policy_cost,
    "paper_rates": digests.paper_rates,
}


def draw(folder: Path, out: Path | None = None) -> Path:
    """Write the page of `folder` and its pictures into `out`, its `pages/` if None.

    Returns the page's path. Raises FlashMoEError where no run was finished.
    """
    if not report.records(folder):
        raise FlashMoEError(f"{folder} has no {report.RECORDS}: no results lie there")
    out = out or folder / "pages"
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# {folder.name}\n\nDrawn by `python -m harness draw` from the CSV files.\n"]
    kind = None
    for name in tables(folder):
        if kind != (kind := report.kind_of(name)):
            parts.append(f"## {kind.replace('_', ' ')}\n\n{report.note(name)}")
        if name != kind:
            parts.append(f"### {name}\n")
        parts.append(_origin(folder, name))
        if plots.draw(folder, name, out):
            parts.append(f"![{name}]({name}.png)\n")
        if body := _body(name, report.read(folder, name)):
            parts.append(f"{body}\n")
        parts.append(f"All columns and rows: {_links(folder, name, out)}.\n")
    page = out / "README.md"
    page.write_text("\n".join(parts))
    return page


def tables(folder: Path) -> list[str]:
    """Names of the tables in `folder` that a page shows, in its order."""
    names = {path.stem for path in folder.glob("*.csv")}
    return [name for kind in COLUMNS for name in sorted(names) if report.kind_of(name) == kind]


def _body(name: str, frame: pd.DataFrame) -> str:
    kind = report.kind_of(name)
    if kind in DIGESTS:
        return DIGESTS[kind](frame)
    columns = SPECIAL_COLUMNS.get(name, COLUMNS[kind])
    if columns is None:
        return ""
    shown = frame[[column for column in columns if column in frame]]
    if "outcome" in frame and "tokens_per_second" in shown:  # of a run that was killed
        speeds = [
            outcome if outcome != "ok" else f"{speed:.4g}"
            for outcome, speed in zip(frame.outcome, frame.tokens_per_second, strict=True)
        ]
        shown = shown.assign(tokens_per_second=speeds)
    return markdown(shown)


def _origin(folder: Path, name: str) -> str:
    """Which command wrote the table, when and where."""
    record = report.records(folder).get(report.record_of(name))
    if record is None:
        return ""
    machine = record["machine"]
    return (
        f"`{record['command']}`, {record['date']}, commit {(record['commit'] or 'unknown')[:12]}"
        f"{' with uncommitted changes' if record['uncommitted_changes'] else ''}, "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['file_system']}, torch {record['versions']['torch']}.\n"
    )


def _links(folder: Path, name: str, out: Path) -> str:
    names = [name, f"tokens-{name}"]
    home = os.path.relpath(folder, out)
    present = [f"{each}.csv" for each in names if (folder / f"{each}.csv").exists()]
    return ", ".join(f"[{each}]({home}/{each})" for each in present)


def markdown(frame: pd.DataFrame) -> str:
    """Units a person reads in place of bytes; an empty cell for what is absent."""
    shown = {}
    for column in frame.columns:
        values = frame[column]
        if column.endswith("bytes_per_second"):
            shown[column.replace("bytes_per_second", "GB/s")] = values / 1e9
        elif column == "block_bytes":  # powers of two
            shown["block_KiB"] = values / 1024
        elif column.endswith("_bytes") or column == "bytes_per_token":
            unit, size = _unit(values.max())
            shown[column.replace("bytes", unit)] = values / size
        elif column == "text":
            shown[column] = values.map(_cell)
        else:
            shown[column] = values
    return digests.table(pd.DataFrame(shown), ".4g")


def _unit(most_bytes: float) -> tuple[str, float]:
    """The unit in which four digits say a column's sizes."""
    if 0 < most_bytes < 1e5:
        return "kB", 1e3
    return ("MB", 1e6) if most_bytes < 1e10 else ("GB", 1e9)


def _cell(text: object) -> str:
    return str(text).replace("\n", "⏎").replace("|", "\\|")
