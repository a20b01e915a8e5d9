"""Processes that work for this one and end with it, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
import threading
from contextlib import suppress

# Workers fork from a server that has imported much and run nothing, because a new interpreter would
# take seconds for these imports. `CONTEXT.set_forkserver_preload` says what the server imports.
CONTEXT = multiprocessing.get_context("forkserver")


def end_with_parent() -> None:
    """Call this first in a worker: it ends when its parent does, which alone handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_await_parents_end, daemon=True).start()


def silence_stderr() -> None:
    """Discard what libraries warn of; the parent reports failures."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _await_parents_end() -> None:
    parent = multiprocessing.parent_process()
    if parent and parent.pid:
        # not `parent.join()`, for which only multiprocessing's own processes have what they need
        with suppress(ProcessLookupError):
            select.select([os.pidfd_open(parent.pid)], [], [])
    os._exit(1)
