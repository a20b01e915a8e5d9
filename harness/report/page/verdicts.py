"""Advice, and rows in which FlashMoE is not first, as tables."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from harness.report.page.advice import Verdict, times
from harness.report.page.behind import Slower, better_policies, slower_reads
from harness.report.page.columns import Cell, Table, number, text
from harness.report.page.filters import BANDS, band, machine_name, marks
from harness.report.page.speeds import Contest, Ranged, Row, machine_of

_OUTCOME_LETTERS = 60


def of_glance(verdicts: list[Verdict]) -> Table:
    """Who is first in each band of memory: a row for each machine, model and format of weights."""
    kinds = groupby(
        verdicts,
        key=lambda each: (each.contest.machine, each.contest.model, _weights(each.contest)),
    )
    rows, row_marks = [], []
    for (machine, model, weights), group in kinds:
        in_band: dict[str, list[Verdict]] = {}
        for verdict in group:
            in_band.setdefault(band(verdict.contest.share), []).append(verdict)
        cells = [text(machine_name(machine)), text(model), text(weights)]
        rows.append(cells + [text(_firsts(in_band.get(name, []))) for name in BANDS])
        row_marks.append(marks(machine, model))
    return Table(["Machine", "Model", "Weights", *BANDS.values()], rows, row_marks)


def _firsts(verdicts: list[Verdict]) -> str:
    """`A, 3 to 5 ×`: who is first, by how much over the next; nothing where nothing was run."""
    if not verdicts:
        return "not measured"
    leads: dict[str, list[float]] = {}
    for verdict in verdicts:
        who = verdict.first.name
        if verdict.level and verdict.next:
            who = " and ".join(sorted((who, verdict.next.name))) + ", level"
        leads.setdefault(who, []).extend(
            [] if verdict.level or not verdict.lead else [verdict.lead.value]
        )
    return "; ".join(f"{who}, {times(of)} times" if of else who for who, of in leads.items())


def of_advice(verdicts: list[Verdict]) -> Table:
    """Which system is first, by how much, and how FlashMoE and the best other compare."""
    headers = ["Weights", "Memory cap", "First", "Its token/s", "Next", "First over next, times",
               "FlashMoE over the best other, times", "Tables"]  # fmt: skip
    rows = [
        [
            text(_weights(verdict.contest)),
            _memory(verdict.contest),
            text(verdict.first.name + (" (level)" if verdict.level else "")),
            _speed(verdict.first),
            text(verdict.next.name if verdict.next else _failed(verdict.failed)),
            _ranged(verdict.lead, verdict.rounds),
            _against(verdict),
            _links(*((name, folder, name) for folder, name in verdict.tables)),
        ]
        for verdict in verdicts
    ]  # fmt: skip
    return Table(headers, rows, [_marks(verdict.contest) for verdict in verdicts])


def of_faster(found: list[Slower]) -> Table:
    """Rows faster than FlashMoE's."""
    headers = ["Machine", "Model, weights", "Memory cap", "Faster than FlashMoE", "Its token/s",
               "FlashMoE's token/s", "Times as fast", "Table"]  # fmt: skip
    rows = [
        [
            text(machine_name(each.contest.machine)),
            text(f"{each.contest.model}, {_weights(each.contest)}"),
            _memory(each.contest),
            text(each.row.name + (" (level)" if each.level else "")),
            _speed(each.row),
            _speed(each.baseline),
            _ranged(each.over, min(each.row.rounds, each.baseline.rounds)),
            _links((each.row.table, each.row.folder, each.row.table)),
        ]
        for each in found
    ]  # fmt: skip
    return Table(headers, rows, [_marks(each.contest) for each in found])


def of_policies() -> Table:
    """Cases in which an online policy hits more than `learned`."""
    found = better_policies()
    headers = ["Routing", "Resident, %", "Start", "Policy that hits more", "Its hit rate, %",
               "learned, %", "Points", "Table"]  # fmt: skip
    rows = [
        [
            text(row["case"]), number(row["capacity"] * 100), text(row["start"]),
            text(row["policy"]), number(row["hit_rate"] * 100),
            number(row["learned"] * 100), number(row["points"], 2),
            _links((machine_of(row["folder"]), row["folder"], "hit_rates")),
        ]
        for row in found.to_dict("records")
    ]  # fmt: skip
    return Table(headers, rows, [marks(machine_of(name), "") for name in found.folder])


def of_reads() -> Table:
    """Sizes and depths at which the engine's reader is slower than fio."""
    found = slower_reads()
    headers = ["Reads of", "Depth", "Reader over fio, times", "Table"]
    rows = [
        [
            text(row["extents_of"]), number(row["depth"]),
            _ranged(Ranged(row["reader_over_fio"], row["ratio_min"], row["ratio_max"]), 2),
            _links((machine_of(row["folder"]), row["folder"], "reader")),
        ]
        for row in found.to_dict("records")
    ]  # fmt: skip
    return Table(headers, rows, [marks(machine_of(name), "") for name in found.folder])


def _links(*to: tuple[str, str, str]) -> Cell:
    """To figures of the page: the words, the folder and the table of each."""
    found = tuple((words, f"#{anchor(folder, name)}") for words, folder, name in to)
    return Cell("", found[0][0], links=found)


def anchor(folder: str, table: str) -> str:
    """The id of a table's figure on the page."""
    return f"{folder}--{table}"


def _weights(contest: Contest) -> str:
    return contest.weights + (f", {contest.conditions}" if contest.conditions else "")


def _memory(contest: Contest) -> Cell:
    share = contest.share
    return Cell(contest.memory, "1000" if share != share else f"{share:.4f}")


def _marks(contest: Contest) -> dict[str, str]:
    return marks(contest.machine, contest.model, contest.share)


def _ranged(value: Ranged | None, rounds: int) -> Cell:
    if value is None:
        return Cell("", "", True)
    said = f"{value.value:.3g}"
    said += f" ({value.low:.3g} to {value.high:.3g})" if rounds > 1 else " (one round)"
    return Cell(said, f"{value.value:.6g}", True)


def _speed(row: Row) -> Cell:
    if not row.finished:
        return text(_outcome(row))
    cell = _ranged(row.tokens_per_second, row.rounds)
    return replace(cell, text=f"{cell.text}, disturbed") if row.disturbed else cell


def _outcome(row: Row) -> str:
    """Why it did not finish; a log's line is long."""
    return row.outcome[:_OUTCOME_LETTERS]


def _against(verdict: Verdict) -> Cell:
    if not (verdict.ours and verdict.other and verdict.against):
        return Cell("", "", True)
    value = verdict.against.value
    return Cell(f"{value:.3g}, {verdict.other.name}", f"{value:.6g}")


def _failed(rows: tuple[Row, ...]) -> str:
    return "; ".join(f"{row.name}: {_outcome(row)}" for row in rows)
