"""A command that is killed leaves nothing running."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

import flashmoe


def test_a_killed_replay_leaves_no_process_behind():
    command = [sys.executable, "-m", "flashmoe", "simulate", flashmoe.demo_routing_path()]
    main = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(workers := main.children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(workers) >= 2  # who forks, and whom it forked
    time.sleep(1)
    main.kill()
    main.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]
