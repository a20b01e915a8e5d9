"""A program that runs to its end under a limit."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.errors import FlashMoEError
from harness.runs.memory_cap import Cap, memory_cap

LIMIT_SECONDS = 900


def start(command: Sequence[str], cap: Cap | None, **options: Any) -> subprocess.Popen[str]:
    """The program in the cap's cgroups, its errors piped as text.

    Raises FlashMoEError where there is no such program.
    """
    try:
        return subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=cap.enter if cap else None,
            **options,
        )
    except FileNotFoundError:
        raise FlashMoEError(f"there is no {Path(command[0]).name}") from None


def run(
    command: Sequence[str], cap_bytes: int | None
) -> tuple[str, subprocess.CompletedProcess[str], int | None]:
    """Outcome, what it printed, and the kernel's peak.

    To be killed by the limit, or not to end in LIMIT_SECONDS, is an outcome.
    Raises FlashMoEError with the program's last words when it fails otherwise.
    """
    with memory_cap(cap_bytes) as cap:
        process = start(command, cap, stdout=subprocess.PIPE, errors="replace")
        late = False
        try:
            output, errors = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            output, errors = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
        peak = cap.peak_bytes() if cap else None
    done = subprocess.CompletedProcess(list(command), process.returncode, output, errors)
    if late:
        return f"not done in {LIMIT_SECONDS} s", done, peak
    if process.returncode == -signal.SIGKILL and cap_bytes:
        return "out of memory", done, peak
    if process.returncode:
        last = (errors.strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise FlashMoEError(f"{command[0]} failed: {last}")
    return "ok", done, peak
