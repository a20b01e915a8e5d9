"""Which columns of a table people see, under which names and in which units."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd

from harness.report import digests, names, report

# Of each kind, in the order of the page; at most eight fit it.
COLUMNS: dict[str, tuple[str, ...]] = {
    "speedups": ("cap_share", "system", "slots", "hit_rate", "bytes_per_token",
                 "tokens_per_second", "share_of_roofline", "flashmoe_speedup"),
    "compare": ("weights", "cap_share", "system", "tokens_per_second", "share_of_roofline",
                "first_token_160_seconds", "first_token_2000_seconds", "same_output"),
    "servers": ("cap_share", "system", "outcome", "slots_per_layer", "hit_rate",
                "tokens_per_second", "prompt_seconds", "flashmoe_speedup"),
    "published": ("experts_share", "quant", "system", "hit_rate", "bytes_per_token",
                  "tokens_per_second", "share_of_roofline", "over_bf16"),
    "tiers": ("trace", "system", "pins", "pinned_share", "hit_rate_per_token",
              "hit_rate_per_event", "tokens_per_second", "first_token_seconds"),
    "drives": ("what", "layout", "bytes_per_second", "tokens_per_second", "over_one_drive",
               "over_one_drive_min", "second_drive_share", "same_output"),
    "storage": ("storage", "cap_share", "system", "hit_rate", "bytes_per_token",
                "tokens_per_second", "share_of_roofline", "flashmoe_speedup"),
    "quant": ("cap_share", "quant", "slots", "hit_rate", "bytes_per_token", "tokens_per_second",
              "share_of_roofline", "over_bf16"),
    "generation": ("system", "slots", "hit_rate", "tokens_per_second", "share_of_roofline",
                   "wait_ms", "experts_ms", "same_output"),
    "timeline": (),
    "hit_rates": (),
    "gap_by_layer": (),
    "policy_cost": (),
    "policy_scale": ("geometry", "policy", "slots", "hit_rate", "microseconds_per_event",
                     "milliseconds_per_token", "share_of_token"),
    "ceiling": ("trace", "capacity", "lru_hit_rate", "learned_hit_rate", "predictor_hit_rate",
                "belady_hit_rate", "learned_gap_closed", "predictor_gap_closed"),
    "paper": ("figure", "the_paper", "here_least", "here_most", "verdict", "cases",
              "cases_that_hold"),
    "paper_rates": (),
    "paper_training": ("trace", "replay", "reading", "slots", "epochs", "training_error",
                       "held_out_error"),
    "plan": ("of_table", "system", "resident_share", "hit_rate", "predicted_hit_rate",
             "tokens_per_second", "predicted_tokens_per_second", "uncalibrated_tokens_per_second"),
    "prompt_experts": ("trace", "tokens", "sequences", "needed_share"),
    "ssd": ("pattern", "block_bytes", "depth", "bytes_per_second", "latency_p50_ms",
            "latency_p99_ms"),
    "reader": ("extents_of", "depth", "reader_bytes_per_second", "fio_bytes_per_second",
               "reader_over_fio", "ratio_min", "ratio_max"),
    "server_tests": ("test", "plain", "flashmoe", "same"),
    "quality": ("system", "slots", "perplexity", "perplexity_of_the_model", "tokens_differing",
                "prediction_accuracy"),
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
# Tables too long to be read, or not made to be: what is shown in their place.
DIGESTS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "hit_rates": digests.rates_by_start,
    "gap_by_layer": digests.gap_by_case,
    "policy_cost": digests.policy_cost,
    "paper_rates": digests.paper_rates,
    "timeline": digests.time_by_work,
}
# Where the words of a column's name are not those that a reader knows.
_HEADERS = {
    "cap_share": "Memory cap, % of the model",
    "experts_share": "Memory, % of the experts",
    "slots": "Slots a layer",
    "slots_per_layer": "Slots a layer",
    "hit_rate": "Hit rate, %",
    "predicted_hit_rate": "Predicted hit rate, %",
    "hit_rate_per_token": "Hit rate a token, %",
    "hit_rate_per_event": "Hit rate an event, %",
    "pinned_share": "Pinned, % of the experts",
    "first_token_160_seconds": "First of 160, s",
    "first_token_2000_seconds": "First of 2,000, s",
    "second_drive_share": "From the second drive, %",
    "bytes_per_token": "Read a token",
    "bytes_per_second": "Read, GB/s",
    "tokens_per_second": "Decode, token/s",
    "predicted_tokens_per_second": "Predicted, token/s",
    "uncalibrated_tokens_per_second": "Predicted unmeasured, token/s",
    "share_of_roofline": "Of the roofline, %",
    "flashmoe_speedup": "FlashMoE's speed over it, times",
    "over_bf16": "Over bf16's speed, times",
    "tokens_differing": "Tokens that differ, %",
    "prompt_seconds": "Prompt, s",
    "quant": "Experts",
    "of_table": "Table",
    "resident_share": "Resident, % of the experts",
    "needed_share": "Experts needed, %",
    "prediction_accuracy": "Right predictions, %",
    "perplexity_of_the_model": "Perplexity of the model",
    "reader_over_fio": "Reader over fio, times",
    "here_least": "Here, least",
    "here_most": "Here, most",
    "same_as_held": "Same as in memory",
    "second_turn_share": "Second turn, % of the first",
    "whole_of_plain": "Whole answers, % of plain",
    "streamed_of_plain": "Streamed, % of plain",
    "watched_of_whole": "Watched, % of whole",
    "hit_rate_8_slots": "Hit rate, 8 slots, %",
    "hit_rate_24_slots": "Hit rate, 24 slots, %",
    "change": "Change, %",
    "capacity": "Resident, %",
    "lru_hit_rate": "LRU's hit rate, %",
    "learned_hit_rate": "learned's, %",
    "predictor_hit_rate": "The predictor's, %",
    "belady_hit_rate": "Belady's, %",
    "learned_gap_closed": "Gap closed by learned, %",
    "predictor_gap_closed": "By the predictor, %",
    "share_of_token": "Of a token, %",
    "microseconds_per_event": "Token and layer, µs",
    "milliseconds_per_token": "Whole token, ms",
}


@dataclass(frozen=True)
class Cell:
    """What a reader sees, and by what a column is sorted."""

    text: str
    sort: str
    number: bool = False
    links: tuple[tuple[str, str], ...] = ()  # text and address, relative to results/


_NO_LIMIT = Cell("no limit", "1000", number=True)


@dataclass(frozen=True)
class Table:
    headers: list[str]
    rows: list[list[Cell]]
    marks: list[dict[str, str]] | None = None  # of each row, by which a reader filters


def shown(folder_table: str, frame: pd.DataFrame) -> Table:
    """The table as people read it. `folder_table`: its file's name without `.csv`."""
    kind = report.kind_of(folder_table)
    if kind in DIGESTS:
        return table(DIGESTS[kind](frame))
    columns = SPECIAL_COLUMNS.get(folder_table, COLUMNS[kind])
    part = frame[[column for column in columns if column in frame]]
    if "system" in part:
        part = part.assign(system=part.system.map(names.system))
    made = table(part)
    if "outcome" in frame and "tokens_per_second" in part:
        _tell_outcomes(made.rows, frame, list(part.columns))
    return made


def _tell_outcomes(rows: list[list[Cell]], frame: pd.DataFrame, shown: list[str]) -> None:
    """In place of the speed of a run that was killed, and beside that of a disturbed one."""
    place = shown.index("tokens_per_second")
    disturbed = frame.disturbed.eq(True) if "disturbed" in frame else [False] * len(frame)
    for cells, outcome, was_disturbed in zip(rows, frame.outcome, disturbed, strict=True):
        if outcome != "ok" and "outcome" not in shown:
            cells[place] = Cell(str(outcome), "")
        elif was_disturbed:
            cells[place] = replace(cells[place], text=f"{cells[place].text}, disturbed")


def table(frame: pd.DataFrame) -> Table:
    """Every column of `frame`, in units that people read."""
    pairs = [column(str(name), frame[name]) for name in frame.columns]
    rows = [list(cells) for cells in zip(*(cells for _, cells in pairs), strict=True)]
    return Table([header for header, _ in pairs], rows)


def column(name: str, values: pd.Series) -> tuple[str, list[Cell]]:
    """Its header and cells."""
    if not pd.api.types.is_numeric_dtype(values) or values.dtype == bool:
        return _header(name, ""), [text(value) for value in values]
    unit, size = _unit(name, values)
    cells = [number(value / size) for value in values]
    if name == "cap_share":
        cells = [cell if cell.text else _NO_LIMIT for cell in cells]
    return _header(name, unit), cells


def text(value: object) -> Cell:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return Cell("", "")
    said = {True: "yes", False: "no"}.get(value) if isinstance(value, bool) else str(value)
    return Cell(str(said), str(said))


def number(in_unit: float, digits: int = 4) -> Cell:
    if pd.isna(in_unit):
        return Cell("", "", number=True)
    if abs(in_unit) < 1e4:
        said = f"{in_unit:.{digits}g}"
        return Cell(said, said, number=True)
    return Cell(f"{in_unit:,.0f}", f"{in_unit:.9g}", number=True)


def _unit(name: str, values: pd.Series) -> tuple[str, float]:
    """What a number of the column is divided by, and the unit that it then has."""
    if name.endswith("bytes_per_second"):
        return "GB/s", 1e9
    if name == "block_bytes":  # powers of two
        return "KiB", 1024
    if name.endswith("_bytes") or name == "bytes_per_token":
        most = values.max()
        if 0 < most < 1e5:
            return "kB", 1e3
        return ("MB", 1e6) if most < 1e10 else ("GB", 1e9)
    if "%" in _HEADERS.get(name, ""):
        return "", 0.01
    return next(((unit, 1.0) for end, unit in _ENDS.items() if name.endswith(end)), ("", 1.0))


_ENDS = {"_ms": "ms", "_seconds": "s", "bytes_per_second": "GB/s", "_bytes": "MB"}


def _header(name: str, unit: str) -> str:
    words = _HEADERS.get(name)
    if words is None:
        for end in ("_bytes_per_second", *_ENDS):
            name = name.removesuffix(end)
        words = name.replace("_", " ")
        words = words[:1].upper() + words[1:]
    return f"{words}, {unit}" if unit and not words.endswith((f" {unit}", "%")) else words
