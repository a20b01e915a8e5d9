"""How disturbed a machine was: what is counted, when it is measured again, what a row says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.page import columns
from harness.runs import disturbance
from harness.runs.disturbance import OTHERS_SHARE, SLOWDOWN, Repeater, Watch
from harness.runs.job import Job
from harness.tables import speedups

CORES = sorted(os.sched_getaffinity(0))
TICKS = os.sysconf("SC_CLK_TCK")


class FakeKernel:
    """A /proc of its own, and a clock that goes on by one second each time it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 0.0
        self.busy = self.stolen = self.kernel = self.waited = 0.0  # seconds, of each core
        (folder / "pressure").mkdir(parents=True)
        (folder / "77").mkdir()
        self.write()

    def write(self) -> None:
        line = [0, 0, self.busy * TICKS, 1, 1, 5, 5, self.stolen * TICKS, 0, 0]
        numbers = " ".join(str(int(n)) for n in line)
        cores = "".join(f"cpu{core} {numbers}\n" for core in CORES)
        (self.folder / "stat").write_text(f"cpu {numbers}\n{cores}intr 1\n")
        ticks = int(self.kernel * TICKS * len(CORES))
        of_kthreadd = f"77 (kworker/0:1 (x) S) S 2 0 0 0 -1 0 0 0 0 0 0 {ticks} 0 0 20\n"
        (self.folder / "77" / "stat").write_text(of_kthreadd)
        total = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={int(self.waited * 1e6)}\n"
        (self.folder / "pressure" / "cpu").write_text(total)

    def clock(self) -> float:
        self.now += 1.0
        return self.now


@given(
    others=st.floats(0.2, 0.5), stolen=st.floats(0, 0.3), kernel=st.floats(0, 0.2),
    waited=st.floats(0, 1),
)  # fmt: skip
def test_what_others_had_is_all_that_is_not_the_runs_own(
    tmp_path_factory, others, stolen, kernel, waited
):
    proc = FakeKernel(tmp_path_factory.mktemp("proc") / "proc")
    watch = Watch(proc.folder, proc.clock, lambda who: Used())
    proc.busy, proc.stolen, proc.kernel, proc.waited = others + kernel, stolen, kernel, waited
    proc.write()
    told = watch.since()
    assert told["others_share"] == pytest.approx(others + stolen, abs=0.03)
    assert told["stolen_share"] == pytest.approx(stolen, abs=0.02)
    assert told["waiting_share"] == pytest.approx(waited, abs=1e-3)
    assert told["involuntary_switches_per_second"] == 0


class Used:
    ru_utime = ru_stime = 0.0
    ru_nivcsw = 3


def test_the_runs_own_time_and_a_few_ticks_are_no_disturbance(tmp_path):
    proc, own = FakeKernel(tmp_path / "proc"), Used()
    watch = Watch(proc.folder, proc.clock, lambda who: own)
    proc.busy = 1.0
    own.ru_utime = len(CORES) * 0.5 - 0.04 / 2  # counted twice: itself and its children
    proc.write()
    assert watch.since()["others_share"] == 0


@pytest.mark.parametrize("lost", ["pressure/cpu", "stat"])
def test_what_a_kernel_does_not_tell_is_left_out(tmp_path, lost):
    proc = FakeKernel(tmp_path / "proc")
    (proc.folder / lost).unlink()
    told = Watch(proc.folder, proc.clock).since()
    assert told == {} if lost == "stat" else told["waiting_share"] is None
    assert not disturbance.disturbed(told)


SPIN = "print(flush=True)\nwhile True: pass"


def test_programs_that_take_all_cores_are_noticed():
    """Really: one spins on each core, until the kernel has counted half a second of it."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE) for _ in CORES
    ]
    try:
        for process in spinning:
            process.stdout.readline()  # it spins from here on
        watch = Watch()
        counted = Path(f"/proc/{spinning[0].pid}/stat")
        first = _ticks(counted)
        while _ticks(counted) < first + TICKS // 2:
            time.sleep(0.01)
        told = watch.since()
    finally:
        for process in spinning:
            process.kill()
            process.communicate()
    assert told["others_share"] > OTHERS_SHARE
    assert disturbance.disturbed(told)


def _ticks(path: Path) -> int:
    return int(path.read_text().rpartition(")")[2].split()[11])


def quiet(speed: float = 1.0, outcome: str = "ok") -> dict[str, object]:
    return {"outcome": outcome, "others_share": 0.0, "tokens_per_second": speed}


def busy(share: float, speed: float = 0.2) -> dict[str, object]:
    return {"outcome": "ok", "others_share": share, "tokens_per_second": speed}


def repeater(again_seconds: float = 100.0, products: Iterator[float] | None = None) -> Repeater:
    """Whose product takes a second unless told, and whose clock goes on by 5 seconds a run."""
    now = iter(range(0, 10**6, 5))
    return Repeater(
        again_seconds, str, product=lambda: next(products) if products else 1.0,
        clock=lambda: float(next(now)),
    )  # fmt: skip


def test_a_disturbed_run_is_measured_again_and_the_quiet_one_kept():
    runs = iter([busy(0.8), quiet(7.3), quiet(9.9)])
    kept = repeater().least_disturbed(lambda: next(runs))
    assert (kept["tokens_per_second"], kept["disturbed"]) == (7.3, False)
    assert next(runs)["tokens_per_second"] == 9.9  # which nobody asked for


def test_a_row_that_stays_disturbed_says_so_with_its_best_run():
    runs = iter([busy(0.8, 1), busy(0.3, 2), busy(0.5, 3), quiet()])
    kept = repeater().least_disturbed(lambda: next(runs))
    assert (kept["tokens_per_second"], kept["disturbed"]) == (2, True)
    assert next(runs) == quiet()  # no more than AGAIN repeats
    assert disturbance.columns([quiet() | {"disturbed": False}, kept])["disturbed"] is True
    assert disturbance.columns([quiet()])["disturbed"] is None  # a run of an earlier journal


@given(shares=st.lists(st.floats(0, 1), min_size=200, max_size=200), allowed=st.floats(0, 60))
def test_repeats_take_no_more_time_than_they_may(shares, allowed):
    """Each run takes five seconds here, so the last repeat begins five seconds before the end."""
    asked = []
    runs = iter(shares)

    def attempt():
        asked.append(1)
        return busy(next(runs))

    measuring = repeater(allowed)
    for _ in range(50):
        kept = measuring.least_disturbed(attempt)
        assert kept["disturbed"] == (kept["others_share"] > OTHERS_SHARE)
    assert 5 * (len(asked) - 50) <= allowed


def test_a_slow_product_beside_a_run_counts_though_no_program_shows():
    products = iter([1.0, 1.0, 8.0, 1.0, 1.0])
    runs = iter([quiet(1.9), quiet(7.3), quiet(7.2)])
    kept = repeater(products=products).least_disturbed(lambda: next(runs))
    # the first was slow after it, the second before it
    assert (kept["tokens_per_second"], kept["product_slowdown"]) == (7.2, 1.0)
    calm = repeater(products=iter([1.0, 1.1, 0.99 * SLOWDOWN]))
    assert not calm.least_disturbed(quiet)["disturbed"]


def test_a_run_that_was_killed_is_an_outcome_and_not_repeated():
    runs = iter([busy(0.9) | {"outcome": "out of memory"}, quiet()])
    assert repeater().least_disturbed(lambda: next(runs))["outcome"] == "out of memory"
    runs = iter([busy(0.9), quiet(outcome="out of memory"), busy(0.8)])
    kept = repeater().least_disturbed(lambda: next(runs))
    assert (kept["outcome"], kept["others_share"], kept["disturbed"]) == ("ok", 0.8, True)


def test_a_page_shows_which_speed_was_disturbed():
    rows = [
        {"system": "flashmoe", "outcome": "ok", "tokens_per_second": 1.9, "disturbed": True},
        {"system": "fiddler", "outcome": "ok", "tokens_per_second": 1.0, "disturbed": False},
        {"system": "daop", "outcome": "out of memory"},
    ]
    frame = pd.DataFrame(rows)
    assert _speeds(frame) == ["1.9, disturbed", "1", "out of memory"]
    assert _speeds(frame.drop(columns="disturbed"))[0] == "1.9"


def _speeds(frame):
    table = columns.shown("speedups-some-model", frame)
    place = next(i for i, header in enumerate(table.headers) if "token/s" in header)
    return [cells[place].text for cells in table.rows]


def table_run(job: Job, **figures: object) -> dict[str, object]:
    """What `run_alone` gives of a system without counts of its own."""
    return {
        "system": job.system, "outcome": "ok", "cap_bytes": None, "memory_bytes": None,
        "read_limit_bytes_per_second": None, "peak_memory_bytes": 1, "slots": None, "shared": None,
        "tokens_per_second": 1.0, "tokens": 1, "token_ids": [1, 2], "prompt_tokens": 1,
    } | figures  # fmt: skip


def test_a_table_keeps_and_notes_one_run_of_each_round(tmp_path, monkeypatch):
    """And an interrupted one takes the kept run from there, with what it says of it."""
    speeds = iter([(0.9, 1.0), (0.0, 7.0), (0.9, 2.0), (0.5, 3.0), (0.7, 1.0)])

    def run_alone(job):
        share, speed = next(speeds)
        return table_run(job, others_share=share, tokens_per_second=speed)

    monkeypatch.setattr(speedups, "run_alone", run_alone)
    jobs = [Job(name, Path("c"), Path("s"), 0, "", 1) for name in ("flashmoe", "fiddler")]
    journal = tmp_path / "kept.jsonl"
    for _ in range(2):
        rows = speedups.table(jobs, 1, None, str, repeater(), journal)
        assert [row["tokens_per_second"] for row in rows] == [7.0, 3.0]
        assert [row["disturbed"] for row in rows] == [False, True]
        assert [row["others_share"] for row in rows] == [0.0, 0.5]
        assert len(journal.read_text().splitlines()) == 2


@pytest.mark.parametrize(("until", "rounds"), [(None, 3), (100.0, 2), (60.0, 1), (15.0, 1)])
def test_no_run_begins_when_the_time_is_over(monkeypatch, until, rounds):
    """Each run takes 20 seconds here: two of them are a round."""
    now = [0.0]

    def run_alone(job):
        now[0] += 20
        return table_run(job)

    monkeypatch.setattr(speedups, "run_alone", run_alone)
    monkeypatch.setattr(speedups.time, "monotonic", lambda: now[0])
    jobs = [Job(name, Path("c"), Path("s"), 0, "", 1) for name in ("flashmoe", "fiddler")]
    rows = speedups.table(jobs, 3, None, str, repeater(), until=until)
    assert len(rows) == (1 if until == 15 else 2)
    assert {row["rounds"] for row in rows} == {rounds}
