"""memory="auto" under a real limit that another program fills: it gives back, lives, and grows."""

from __future__ import annotations

import time

import pytest

from harness.runs.memory_cap import memory_cap
from harness.torture.neighbour import Neighbour
from harness.torture.neighbour_soak import MIB, WARM_UP, transformers_model

LIMIT_BYTES = 1792 * MIB
EXPERTS_BYTES = 192 * MIB
SPARE_BYTES = 128 * MIB  # what the neighbour leaves: code must fit, and it is less than the experts
WITHIN_SECONDS = 30.0


def test_a_model_lives_beside_a_program_that_takes_all_memory(large_store):
    with memory_cap(LIMIT_BYTES) as cap:
        if cap is None:
            pytest.skip("no memory cgroup can be made here")
        with (
            transformers_model(large_store, cap, calm_seconds=0.5) as ask,
            Neighbour(cap.enter) as neighbour,
        ):
            first = [ask() for _ in range(WARM_UP)][-1]
            assert first["resident_bytes"] > SPARE_BYTES
            others = first["anonymous_bytes"] - first["resident_bytes"]
            # more than there is without what the experts give back
            neighbour.hold(LIMIT_BYTES - others - SPARE_BYTES, bytes_per_second=1e9)
            answers = [ask()]
            while not neighbour.has_it():
                answers.append(ask())
            answers.append(least := ask())
            assert answers[-1]["resident_bytes"] < EXPERTS_BYTES // 8
            assert answers[-1]["shrank"] >= 1
            neighbour.hold(0)
            until = time.monotonic() + WITHIN_SECONDS
            while not answers[-1]["grew"] and time.monotonic() < until:
                answers.append(ask())
            assert answers[-1]["grew"]
            assert answers[-1]["memory_bytes"] > least["memory_bytes"]
            assert {tuple(one["tokens"]) for one in answers} == {tuple(first["tokens"])}
