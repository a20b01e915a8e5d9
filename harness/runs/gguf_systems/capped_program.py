"""A program that runs to its end under a limit."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from flashmoe.errors import FlashMoEError
from harness.runs.memory_cap import memory_cap

LIMIT_SECONDS = 900


def run(
    command: Sequence[str], cap_bytes: int | None
) -> tuple[str, subprocess.CompletedProcess[str], int | None]:
    """Outcome, what it printed, and the kernel's peak.

    To be killed by the limit, or not to end in LIMIT_SECONDS, is an outcome.
    Raises FlashMoEError with the program's last words when it fails otherwise.
    """
    with memory_cap(cap_bytes) as cap:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=cap.enter if cap else None,
        )
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
