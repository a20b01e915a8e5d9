"""Runs a program of this folder that loads llama.cpp, which each needs a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run(program: str, **job: object) -> dict:
    """What the program prints of `job`, and `stderr`."""
    done = subprocess.run(
        [sys.executable, str(TESTS / program), json.dumps(job)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}
