"""An event: the experts that one forward step needs at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Event(NamedTuple):
    """Distinct keys of one layer and step, in the order of their last use within the step.

    A decoded token makes an event of top_k keys; a prefill of T tokens makes one event of
    the union of their experts. A key is requested once per event, however many tokens use it.
    """

    keys: tuple[int, ...]
    counts: tuple[int, ...]  # tokens of the event that use the key
    last: tuple[int, ...]  # index within the event of the last token that does, 0..tokens-1
    tokens: int

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], offset: int = 0) -> Event:
        """The event of `rows` [tokens][top_k] of expert indices, as keys `offset` + index."""
        if len(rows) == 1:
            keys = tuple(offset + expert for expert in rows[0])
            if len(set(keys)) == len(keys):
                return cls(keys, (1,) * len(keys), (0,) * len(keys), 1)
        counts: dict[int, int] = {}
        last: dict[int, int] = {}
        for token, row in enumerate(rows):
            for expert in row:
                key = offset + expert
                counts[key] = counts.get(key, 0) + 1
                last.pop(key, None)  # re-insert, so that the order is that of last use
                last[key] = token
        return cls(tuple(last), tuple(counts[key] for key in last), tuple(last.values()), len(rows))
