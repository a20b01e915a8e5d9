"""Processes that work for this one: never left behind when it ends, however it does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

# Forked from a process that has imported much and run nothing: ready in milliseconds, where a new
# interpreter takes 5 seconds for torch and transformers on two cores. It imports what it is told
# to (`CONTEXT.set_forkserver_preload`) at its first fork.
CONTEXT = multiprocessing.get_context("forkserver")


def obey() -> None:
    """To be called first in a worker: its parent alone handles Ctrl-C, and its end is the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def hush() -> None:
    """Libraries' warnings go nowhere; what fails, fails in the parent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)
