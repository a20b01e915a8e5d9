"""Where FlashMoE is not first: rows faster than it, policies that hit more, fio reading faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from harness.report import digests, report
from harness.report.page.speeds import Contest, Ranged, Row, contests, ratio


@dataclass(frozen=True)
class Slower:
    """`row` is faster than FlashMoE as it runs by default, or FlashMoE did not finish."""

    contest: Contest
    row: Row
    baseline: Row
    over: Ranged | None  # None: FlashMoE did not finish
    level: bool  # the rounds' range reaches 1


def faster_rows() -> tuple[list[Slower], list[Slower]]:
    """Of other systems; of FlashMoE itself with something switched on, off, or held otherwise."""
    found = [each for contest in contests() for each in _faster(contest)]
    return (
        [each for each in found if not each.row.ours],
        [each for each in found if each.row.ours],
    )


def _faster(contest: Contest) -> Iterator[Slower]:
    for row in contest.rows:
        baselines = [
            each for each in contest.rows
            if each.baseline and each.table == row.table and each.format == row.format
        ]  # fmt: skip
        # of its two engines the better one, where a table has both
        baseline = max(baselines, key=_speed, default=None)
        if baseline is None or row is baseline or not row.finished:
            continue
        if not baseline.finished:
            yield Slower(contest, row, baseline, None, False)
            continue
        over = ratio(row, baseline)
        if over.value > 1:
            yield Slower(
                contest, row, baseline, over, min(row.rounds, baseline.rounds) > 1 and over.low <= 1
            )


def _speed(row: Row) -> float:
    return row.tokens_per_second.value if row.finished else 0.0


def better_policies() -> pd.DataFrame:
    """Where an online policy hits more than `learned`, the default: a row a case."""
    parts = []
    for folder in report.folders():
        path = folder / "hit_rates.csv"
        if path.exists():
            rows = _better(report.read(folder, "hit_rates"))
            parts.append(rows.assign(folder=folder.name))
    columns = ["case", "capacity", "start", "policy", "hit_rate", "learned", "points", "folder"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def _better(rows: pd.DataFrame) -> pd.DataFrame:
    of = ["trace", "part", "start", "capacity"]
    learned = rows[rows.policy == "learned"].set_index(of).hit_rate.rename("learned")
    online = rows[~rows.policy.str.startswith("belady")]
    best = online.loc[online.groupby(of, sort=False).hit_rate.idxmax()].join(learned, on=of)
    best = best[(best.hit_rate > best.learned)]
    return best.assign(case=digests.case(best), points=(best.hit_rate - best.learned) * 100)


def slower_reads() -> pd.DataFrame:
    """Where the engine's reader read less than fio at the same size and depth."""
    parts = []
    for folder in report.folders():
        if (folder / "reader.csv").exists():
            rows = report.read(folder, "reader")
            parts.append(rows[rows.reader_over_fio < 1].assign(folder=folder.name))
    columns = ["extents_of", "depth", "reader_over_fio", "ratio_min", "ratio_max", "folder"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)
