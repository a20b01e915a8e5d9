"""Users without a home, little memory, few threads: it works, or says so in a sentence."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import budget, generate, prompt

import flashmoe
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.residency import budget as budgets

MIB = 1 << 20


AS_NOBODY = """
import sys, torch, flashmoe
torch.set_num_threads(1)
model = flashmoe.load(sys.argv[1], memory="1MiB", policy="lru")
print(model(torch.arange(3, 9)[None]).logits.sum().item())
model.flashmoe.close()
"""


@pytest.mark.parametrize("kind", ["store", "checkpoint"])
def test_a_user_without_home_reads_a_folder_that_it_may_not_write(
    checkpoints, stores, tmp_path, kind
):
    path = shutil.copytree(stores() if kind == "store" else checkpoints(), tmp_path / "model")
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment |= {"XDG_CACHE_HOME": str(path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, path], capture_output=True, text=True, env=environment
    )
    path.chmod(0o755)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout)


@pytest.mark.parametrize("free_mib", [0, 100, 768, 769])
def test_auto_says_what_is_free_and_what_is_needed(stores, monkeypatch, free_mib):
    monkeypatch.setattr(free_memory, "available_bytes", lambda: free_mib * MIB)
    monkeypatch.setattr(budgets, "least_bytes", lambda manifest: 30 * MIB)
    with pytest.raises(FlashMoEError) as refused:
        flashmoe.load(stores(), memory="auto", policy="lru")
    message = str(refused.value)
    assert "too little memory is free on cpu" in message
    assert "768.0 MiB of which stay reserved" in message
    assert "needs 30.6 MiB at least" in message
    assert "give memory= a size" in message
    assert "-" not in message


def test_resizing_to_auto_where_little_is_free_leaves_all_as_it_was(loaded, monkeypatch):
    model = loaded(slots=4)
    expected, before = generate(model, prompt(9), 4), model.flashmoe.stats()
    monkeypatch.setattr(free_memory, "available_bytes", lambda: 700 * MIB)
    with pytest.raises(FlashMoEError, match=r"too little memory is free.*of its experts"):
        model.flashmoe.resize("auto")
    assert model.flashmoe.stats() == before
    assert generate(model, prompt(9), 4) == expected


def test_what_the_experts_hold_is_theirs_again(monkeypatch):
    monkeypatch.setattr(free_memory, "available_bytes", lambda: 700 * MIB)
    assert free_memory.budget_bytes(0, "cpu", MIB, 100 * MIB) == 32 * MIB


@pytest.mark.parametrize("content", [None, "", "MemFree: 1 kB\n", "MemAvailable: many kB\n"])
def test_auto_without_meminfo_is_what_nobody_uses(tmp_path, monkeypatch, content):
    meminfo = tmp_path / "meminfo"
    if content is not None:
        meminfo.write_text(content)
    assert 0 < free_memory._machine(meminfo) <= torch.iinfo(torch.int64).max
    monkeypatch.setattr(os, "sysconf", lambda name: -1)
    with pytest.raises(FlashMoEError, match="does not say how much memory is free"):
        free_memory._machine(meminfo)


@pytest.mark.parametrize("content", ["", "nothing that makes sense\n", "0::/a\nbroken"])
def test_auto_bears_cgroup_files_that_make_no_sense(tmp_path, content):
    (tmp_path / "own").write_text(content)
    assert list(free_memory._cgroups(tmp_path / "cgroup", tmp_path / "own")) == []


def test_a_limit_counts_where_the_cgroups_statistics_cannot_be_read(tmp_path):
    (tmp_path / "memory.max").write_text(str(500 * MIB))
    (tmp_path / "memory.current").write_text(str(300 * MIB))
    (tmp_path / "own").write_text("0::/\n")
    assert list(free_memory._cgroups(tmp_path, tmp_path / "own")) == [200 * MIB]


def test_slots_that_may_not_be_had_are_refused_in_a_sentence(stores, large_store):
    """The kernel refuses them, as under `ulimit -v` or without overcommitment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * MIB, hard))
        with pytest.raises(FlashMoEError, match=r"no memory for \d+ experts of .*ulimit -v"):
            flashmoe.load(large_store, memory="190MiB", policy="lru")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


def test_a_process_that_may_start_no_thread_is_told_so(stores, monkeypatch):
    model = flashmoe.load(stores(), memory=budget(stores(), 3), policy="lru")
    start = threading.Thread.start

    def refused(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        with pytest.raises(FlashMoEError, match=r"no thread can be started.*ulimit -u"):
            generate(model, prompt(5), 2)
    started = []

    def once(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", once)
        tokens = generate(model, prompt(5), 2)  # slower, but right
    assert generate(model, prompt(5), 2) == tokens
    model.flashmoe.close()
