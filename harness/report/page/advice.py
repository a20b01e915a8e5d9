"""What to run on which machine: who is first at which share of memory, and by how much.

Nothing here knows a result; sentences are made of the rows that speeds.py compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from harness.report.page.speeds import Contest, Ranged, Row, contests, ratio

# A lead below this in a single round says nothing: so far apart are rounds of one row.
_LEAD_OF_ONE_ROUND = 1.1


@dataclass(frozen=True)
class Verdict:
    """One contest decided."""

    contest: Contest
    first: Row
    next: Row | None  # None where nothing else finished
    lead: Ranged | None  # of the first over the next
    level: bool  # the rounds cannot tell the two apart
    failed: tuple[Row, ...]
    ours: Row | None  # the best of FlashMoE, if it finished
    other: Row | None  # the best of all others
    against: Ranged | None  # `ours` over `other`

    @property
    def rounds(self) -> int:
        """Of the first two, the fewer."""
        return min(row.rounds for row in (self.first, self.next) if row)

    @property
    def tables(self) -> list[tuple[str, str]]:
        return sorted({(row.folder, row.table) for row in self.contest.rows})


@dataclass(frozen=True)
class Sentence:
    """With this memory (`where`), run `who`: `why`."""

    where: str
    who: str
    why: str


@dataclass(frozen=True)
class Advice:
    """All verdicts of one model on one machine, and what they come to in words."""

    machine: str
    model: str
    sentences: list[Sentence]
    verdicts: list[Verdict]


def advice() -> list[Advice]:
    decided = [verdict for contest in contests() if (verdict := decide(contest))]
    return [
        Advice(machine, model, list(_sentences(verdicts)), verdicts)
        for (machine, model), group in groupby(
            decided, key=lambda each: (each.contest.machine, each.contest.model)
        )
        for verdicts in [list(group)]
    ]


def decide(contest: Contest) -> Verdict | None:
    """None where there was nothing to compare: a system alone."""
    ranked = [row for row in contest.ranked() if not row.variant]
    failed = tuple(row for row in contest.rows if not row.finished)
    if not ranked or len(ranked) + len(failed) < 2:
        return None
    first, following = ranked[0], ranked[1] if len(ranked) > 1 else None
    lead = ratio(first, following) if following else None
    ours = next((row for row in ranked if row.ours), None)
    other = next((row for row in ranked if not row.ours), None)
    return Verdict(
        contest, first, following, lead, bool(following and lead and _level(first, following)),
        failed, ours, other, ratio(ours, other) if ours and other else None,
    )  # fmt: skip


def _level(first: Row, other: Row) -> bool:
    lead = ratio(first, other)
    if min(first.rounds, other.rounds) > 1:
        return lead.low <= 1
    return lead.value < _LEAD_OF_ONE_ROUND


def _sentences(verdicts: list[Verdict]) -> Iterator[Sentence]:
    """One for each stretch of shares with the same outcome, for each format and condition."""
    kinds = groupby(verdicts, key=lambda each: (each.contest.weights, each.contest.conditions))
    for (weights, conditions), group in kinds:
        of = f"{weights} weights" + (f", {conditions}" if conditions else "")
        for names, stretch in groupby(group, key=_winners):
            part = list(stretch)
            yield Sentence(f"{of}, {_memory(part)}", " or ".join(names), _why(names, part))


def _winners(verdict: Verdict) -> tuple[str, ...]:
    """The first, or the two that are level."""
    level = verdict.next if verdict.level else None
    return tuple(sorted(row.name for row in (verdict.first, level) if row))


def _why(names: tuple[str, ...], part: list[Verdict]) -> str:
    if len(names) > 1:
        why = "the rounds cannot tell the two apart"
    elif leads := [verdict.lead.value for verdict in part if verdict.lead]:
        nexts = list(dict.fromkeys(verdict.next.name for verdict in part if verdict.next))
        why = f"{times(leads)} times as fast as the next, {' or '.join(nexts)}"
    else:
        return "nothing else finished"
    # where first and next are both FlashMoE's, or both others', the other side is not yet told
    one_side = all(verdict.next and verdict.first.ours == verdict.next.ours for verdict in part)
    against = [verdict.against.value for verdict in part if verdict.against]
    if one_side and against:
        rivals = " or ".join(dict.fromkeys(v.other.name for v in part if v.other))
        ours = " or ".join(dict.fromkeys(v.ours.name for v in part if v.ours))
        why += f"; {ours} is {times(against)} times as fast as {rivals}"
    return why + ("; measured in a single round" if all(v.rounds == 1 for v in part) else "")


def _memory(part: list[Verdict]) -> str:
    shares = [verdict.contest.share for verdict in part]
    capped = [f"{share * 100:.0f}" for share in shares if not math.isnan(share)]
    whole = part[0].contest.share_of
    ends = list(dict.fromkeys((capped[0], capped[-1]))) if capped else []
    limited = f"memory for {' to '.join(ends)} % of the {whole}" if ends else ""
    free = "no limit" if any(math.isnan(share) for share in shares) else ""
    return " and ".join(filter(None, (limited, free)))


def times(values: list[float]) -> str:
    """The least and the most of some ratios."""
    return " to ".join(dict.fromkeys(f"{value:.3g}" for value in (min(values), max(values))))
