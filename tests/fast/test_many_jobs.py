"""Many jobs: the same from this machine's processes and from a cluster, and failures a sentence."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time

import dask
import pytest
from command_line import refused, run
from distributed import LocalCluster

import flashmoe
from flashmoe import trace
from flashmoe.cache import simulate
from flashmoe.errors import FlashMoEError
from flashmoe.train.decisions import gather
from flashmoe.util import dask_cluster, many_jobs

LATER_FIRST = [(0.2, "first"), (0.0, "second"), (0.1, "third"), (0.0, "fourth")]


@pytest.fixture(scope="module")
def cluster():
    """Two workers on the loopback interface; a job that ends its worker fails at once."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), local_cluster(2) as local:
        yield local


def local_cluster(workers: int) -> LocalCluster:
    return LocalCluster(
        n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
    )  # fmt: skip


@pytest.fixture(params=["processes", "cluster"])
def place(request):
    """Where jobs run: None, or a cluster's address."""
    if request.param == "processes":
        return None
    return request.getfixturevalue("cluster").scheduler_address


@pytest.fixture(scope="module")
def short_trace():
    return trace.load(flashmoe.demo_routing_path()).first(600)


def say_after(seconds: float, word: str) -> str:
    time.sleep(seconds)
    return word


def test_processes_and_a_cluster_print_the_same_rows(capfd, tmp_path, short_trace, cluster):
    path = tmp_path / "part.npz"
    short_trace.save(path)
    what = ("simulate", path, "--json", "--capacity", 0.25, 0.5, "--policy", "lru", "learned")
    tables = []
    for where in ((), ("--cluster", cluster.scheduler_address)):
        status, out, _ = run(capfd, *what, *where)
        assert status == 0
        tables.append([{**row, "policy_seconds": 0} for row in json.loads(out)])
    assert tables[0] == tables[1]
    alone = [
        simulate.replay(short_trace, policy, capacity).row() | {"policy_seconds": 0}
        for capacity in (0.25, 0.5)
        for policy in ("lru", "learned")
    ]
    assert tables[0] == alone


def test_a_cluster_gathers_the_same_decisions(short_trace, cluster):
    here = gather(short_trace, 500, 1)
    with many_jobs.on(cluster.scheduler_address):
        there = gather(short_trace, 500, 1)
    assert len(here.features) > 100
    assert (here.features == there.features).all()
    assert (here.waits == there.waits).all()


def test_jobs_run_on_the_clusters_workers(cluster):
    with many_jobs.on(f"dask://{cluster.scheduler_address.removeprefix('tcp://')}"):
        found = set(many_jobs.outcomes(os.getpid, [()] * 8))
    assert found <= {worker.pid for worker in cluster.workers.values()}
    assert os.getpid() not in set(many_jobs.outcomes(os.getpid, [()] * 2))


def test_outcomes_come_in_the_order_of_their_jobs(place):
    with many_jobs.on(place):
        said = list(many_jobs.outcomes(say_after, LATER_FIRST))
    assert said == ["first", "second", "third", "fourth"]


def test_no_jobs_have_no_outcomes(place):
    with many_jobs.on(place):
        assert list(many_jobs.outcomes(say_after, [])) == []


class Counted(trace.Trace):
    """Counts how often it is pickled."""

    pickled = 0

    def __reduce_ex__(self, protocol):
        Counted.pickled += 1
        return super().__reduce_ex__(protocol)


def test_a_cluster_is_sent_a_trace_once(short_trace, cluster):
    counted = Counted(short_trace.experts, short_trace.sequence, short_trace.n_experts)
    Counted.pickled = 0
    with many_jobs.on(cluster.scheduler_address):
        slots = list(many_jobs.outcomes(simulate.slots_for, [(counted, 0.5)] * 16))
    assert slots == [32] * 16
    assert Counted.pickled == 1


def test_a_jobs_error_comes_through_as_it_was(place, short_trace):
    jobs = [(short_trace, 0.5), (short_trace, 2.0), (short_trace, 0.25)]
    with many_jobs.on(place), pytest.raises(FlashMoEError, match=r"^capacity 2\.0 must be"):
        list(many_jobs.outcomes(simulate.slots_for, jobs))


def test_a_worker_that_ends_is_one_sentence(place):
    said = "a process that computed was killed" if place is None else f"^cluster {place}: "
    with many_jobs.on(place), pytest.raises(FlashMoEError, match=said):
        list(many_jobs.outcomes(os._exit, [(1,), (1,)]))
    with many_jobs.on(place):  # and what comes after it runs
        assert list(many_jobs.outcomes(max, [(1, 2), (3, 4)])) == [2, 4]


def test_a_cluster_that_cannot_be_had_is_one_sentence(capfd, monkeypatch):
    monkeypatch.setattr(many_jobs, "ANSWER_SECONDS", 0.2)
    what = ("simulate", flashmoe.demo_routing_path(), "--policy", "lru", "--cluster")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        assert "no scheduler answers there" in refused(capfd, *what, f"dask://127.0.0.1:{port}")
    assert "no scheduler answers there" in refused(capfd, *what, f"tcp://127.0.0.1:{port}")
    for address in ("127.0.0.1:8786", "dask://", "dask://host", "ray://host:port", "ftp://h:1"):
        assert "write dask://HOST:PORT" in refused(capfd, *what, address)


def test_a_cluster_without_workers_is_one_sentence(capfd, monkeypatch):
    monkeypatch.setattr(dask_cluster, "ANSWER_SECONDS", 0.5)
    what = ("simulate", flashmoe.demo_routing_path(), "--policy", "lru", "--cluster")
    with local_cluster(0) as empty:
        assert "it has no worker" in refused(capfd, *what, empty.scheduler_address)


@pytest.mark.parametrize(("scheme", "library"), [("dask", "distributed"), ("ray", "ray")])
def test_a_cluster_whose_library_is_not_installed_is_one_sentence(
    scheme, library, capfd, monkeypatch
):
    monkeypatch.setitem(sys.modules, library, None)
    ours, theirs = socket.socketpair()
    theirs.send(b"a greeting")
    monkeypatch.setattr(socket, "create_connection", lambda *_: ours)
    what = ("simulate", flashmoe.demo_routing_path(), "--policy", "lru", "--cluster")
    said = refused(capfd, *what, f"{scheme}://127.0.0.1:1")
    assert f"{library} is not installed: pip install 'flashmoe-ssd[" in said
