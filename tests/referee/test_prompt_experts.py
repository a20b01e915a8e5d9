"""A prompt's experts are counted once each, of sequences that are long enough."""

from __future__ import annotations

import numpy as np
import pytest

from flashmoe.trace import Trace
from harness.tables import prompt_experts
from harness.tables.hit_rates import Case


def test_a_prompt_s_experts_count_once():
    first, second = [[0, 1], [2, 3]], [[1, 2], [2, 3]]  # of two layers, by two tokens
    experts = np.array([first, second, second, second, first], np.uint8)
    info = {"names": ["long", "python-1"]}  # the latter is a row's own
    routing = Trace(experts, np.array([0, 0, 0, 0, 1], np.int32), 8, info=info)
    rows = prompt_experts.table([Case("a", "part", routing, None)])
    assert [row["tokens"] for row in rows] == [1, 4]
    assert [row["sequences"] for row in rows] == [1, 1]
    # three of eight in one layer, two in the other
    assert [row["needed_share"] for row in rows] == pytest.approx([2 / 8, 2.5 / 8])
