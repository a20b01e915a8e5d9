"""A command that is killed or interrupted leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

import flashmoe


def test_a_killed_replay_leaves_no_process_behind():
    main = replaying()
    workers = workers_of(main)
    time.sleep(1)
    main.kill()
    main.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]


@pytest.mark.parametrize("seconds", [0, 1])
def test_ctrl_c_ends_a_replay_and_its_workers_say_nothing(seconds):
    main = replaying()
    workers = workers_of(main)
    time.sleep(seconds)
    os.killpg(main.pid, signal.SIGINT)  # as a terminal does
    _, said = main.communicate(timeout=60)
    assert (main.returncode, said) == (130, "flashmoe: interrupted\n")
    assert not psutil.wait_procs(workers, timeout=20)[1]


def replaying() -> psutil.Popen:
    command = [sys.executable, "-m", "flashmoe", "simulate", flashmoe.demo_routing_path()]
    out = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return psutil.Popen(command, start_new_session=True, **out)


def workers_of(main: psutil.Popen) -> list[psutil.Process]:
    until = time.monotonic() + 60
    while len(workers := main.children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(workers) >= 2
    return workers
