"""Models in forked processes, and models that are dropped without `close`."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import budget, generate, prompt
from torch.utils.data import DataLoader, Dataset

import flashmoe
from flashmoe.reading.read_queue import ReadQueue
from flashmoe.util import machine_code

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
HANGS_AFTER_SECONDS = 120


def in_child(work) -> bool:
    """Is `work()` true in a forked process? False too when that fails, or does not end."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    for _ in range(HANGS_AFTER_SECONDS * 100):
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            return ended[1] == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.fixture(params=["packed", "in place"])
def model(request, stores, checkpoints, many_guesses):
    """With three slots of eight, and guesses in flight most of the time."""
    path = stores() if request.param == "packed" else checkpoints()
    made = flashmoe.load(path, memory=budget(stores(), 3, 2), policy="lru")
    yield made
    made.flashmoe.close()


def test_a_child_generates_as_its_parent_does(model, reading):
    """Before the parent ever did, after it, and in a child of the child."""
    cold = in_child(lambda: len(generate(model, prompt(9), 6)[0]) == 15)
    expected = generate(model, prompt(9), 6)
    assert cold
    assert in_child(lambda: generate(model, prompt(9), 6) == expected)
    assert in_child(lambda: in_child(lambda: generate(model, prompt(9), 6) == expected))
    assert in_child(lambda: model.flashmoe.close() or True)
    assert generate(model, prompt(9), 6) == expected


def test_children_of_a_parent_that_generates_meanwhile(model, reading):
    """Whatever it is at: a layer, a read, a guess. And the parent does not notice."""
    expected = [generate(model, prompt(n), 12) for n in (5, 40)]
    with ThreadPoolExecutor(1) as pool:
        parent = pool.submit(lambda: [generate(model, prompt(n), 12) for n in (5, 40) * 6])
        children = []
        while not parent.done():
            children.append(in_child(lambda: generate(model, prompt(40), 12) == expected[1]))
        assert parent.result() == expected * 6
    assert children
    assert all(children)
    assert generate(model, prompt(5), 12) == expected[0]


def test_a_child_does_not_wait_for_openmps_threads(model):
    """Which do not outlive a fork either."""
    threads, large = torch.get_num_threads(), torch.ones(1 << 22)
    try:
        torch.set_num_threads(2)
        expected = large.add(1).sum()
        assert in_child(lambda: large.add(1).sum() == expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_child_resizes_resets_and_closes_without_its_parent(model):
    expected = generate(model, prompt(9), 6)
    before = model.flashmoe.stats()

    def work() -> bool:
        model.flashmoe.resize(model.flashmoe.residency.pools.memory_bytes * 2)
        same = generate(model, prompt(9), 6) == expected
        model.flashmoe.reset()
        same &= generate(model, prompt(9), 6) == expected
        model.flashmoe.close()
        return same

    assert in_child(work)
    assert model.flashmoe.stats()["memory_bytes"] == before["memory_bytes"]
    assert generate(model, prompt(9), 6) == expected


class Scored(Dataset):
    """Items that the model makes where they are asked for."""

    def __init__(self, model) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    @torch.inference_mode()
    def __getitem__(self, index: int) -> torch.Tensor:
        return self.model(prompt(index + 2)).logits[0, -1]


def test_workers_of_a_data_loader_hold_the_model(model):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as a worker has it: some processors' sums depend on it
        expected = [Scored(model)[n] for n in range(6)]
    finally:
        torch.set_num_threads(threads)
    loader = DataLoader(
        Scored(model),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=HANGS_AFTER_SECONDS,
    )
    given = [logits.clone() for logits in loader]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_a_lock_that_another_thread_has_is_free_in_the_child():
    """A policy is being compiled: the fork waits for it."""
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with machine_code.compiling:
            held.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    threading.Timer(0.2, leave.set).start()
    numbas_lock = machine_code.compiling._lock  # its own acquire waits without end
    assert in_child(lambda: numbas_lock.acquire(timeout=10))
    thread.join()


def test_a_queue_stands_still_once_all_was_read():
    queue, ran = ReadQueue(3, guesses_at_once=1), []
    gate = threading.Event()
    queue.demand([gate.wait, lambda: ran.append("demand")])
    queue.guess([lambda: ran.append("guess")] * 4)
    threading.Timer(0.1, gate.set).start()
    queue.stand_still()
    assert sorted(ran) == ["demand"] + ["guess"] * 4
    late = threading.Thread(target=queue.demand, args=([lambda: ran.append("late")],))
    late.start()
    assert "late" not in ran
    queue.go_on(in_child=False)
    late.join()
    queue.close()
    assert ran[-1] == "late"


def resources() -> tuple[list[str], int]:
    """The names of our threads (libraries start some whenever they like), and open files."""
    ours = sorted(t.name for t in threading.enumerate() if t.name.startswith("flashmoe"))
    return ours, len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", ["packed", "in place"])
def test_a_dropped_model_leaves_nothing(
    stores, checkpoints, monkeypatch, many_guesses, kind, used, reading
):
    """Not even where a guess is still being read: that ends first."""
    path = stores() if kind == "packed" else checkpoints()
    memory, read = budget(stores(), 3, 2), os.preadv
    if used:
        monkeypatch.setattr(os, "preadv", lambda *given: time.sleep(0.002) or read(*given))
    gc.collect()
    before = resources()
    model = flashmoe.load(path, memory=memory, policy="lru")
    if used:
        generate(model, prompt(9), 3)
    alive = weakref.ref(model.flashmoe.residency.pools.all[0].arena.slots[0].obj)
    del model
    gc.collect()
    assert resources() == before
    assert alive() is None


LEAVE = """
import atexit, sys, threading, torch, flashmoe
from flashmoe.reading.reader import ExtentReader
from flashmoe.residency import budget, prefetch
prefetch.PREFETCH_FROM_BYTES, budget.SPARE_SHARE = 1, 1 / 2
ExtentReader.extent_seconds = lambda *_: 1.0
torch.set_num_threads(1)
model = flashmoe.load(sys.argv[1], memory=int(sys.argv[2]), policy="lru")
atexit.register(model.flashmoe.close) if sys.argv[3] == "closed at exit" else None
with torch.inference_mode():
    model(torch.arange(3, 40)[None])
if sys.argv[3] == "failed":
    raise ValueError("the user's own")
print("left")
"""


@pytest.mark.parametrize("how", ["normal", "failed", "closed at exit"])
def test_leaving_without_close_is_clean(stores, how):
    done = subprocess.run(
        [sys.executable, "-c", LEAVE, stores(), str(budget(stores(), 3, 2)), how],
        capture_output=True, text=True, timeout=HANGS_AFTER_SECONDS,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == (how == "failed")
    assert done.stdout == ("" if how == "failed" else "left\n")
    assert ("the user's own" in done.stderr) == (how == "failed")
    assert "flashmoe/" not in done.stderr  # no traceback of ours
