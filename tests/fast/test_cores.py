"""Threads are as many as the physical cores that this process may use."""

from __future__ import annotations

import os

import pytest

from flashmoe.util import cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 4 cores with 2 threads each, as processors 0-3 and 4-7."""
    for number in range(8):
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(f"{number % 4}\n")
        (topology / "physical_package_id").write_text("0\n")

    def available(allowed: set[int], *quotas: str) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
        root, own = tmp_path / "cgroup", tmp_path / "own"
        own.write_text("0::/a\n" if quotas else "")
        for folder, quota in zip((root, root / "a"), quotas, strict=False):
            folder.mkdir(exist_ok=True)
            (folder / "cpu.max").write_text(quota + "\n")
        return cores.available(tmp_path, root, own)

    return available


def test_two_threads_of_one_core_count_once(machine):
    assert machine(set(range(8))) == 4
    assert machine({0, 4}) == 1
    assert machine({1, 2, 6}) == 2
    assert machine({40, 41, 42}) == 3  # nobody says which cores those are


def test_a_cgroups_quota_bounds_them(machine):
    everything = set(range(8))
    assert machine(everything, "max 100000", "max 100000") == 4
    assert machine(everything, "max 100000", "250000 100000") == 2
    assert machine(everything, "300000 100000", "max 100000") == 3
    assert machine(everything, "50000 100000") == 1


def test_the_older_cgroups_quota_bounds_them(tmp_path):
    (tmp_path / "own").write_text("4:cpu,cpuacct:/\n")
    (tmp_path / "cpu").mkdir()
    for quota, expected in ((100_000, 1), (-1, None)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(str(quota))
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
        found = cores.available(root=tmp_path, membership=tmp_path / "own")
        assert found == (expected or cores.available(root=tmp_path / "none"))
