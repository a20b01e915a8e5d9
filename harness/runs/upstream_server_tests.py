"""Runs llama.cpp's own tests of its server against a server program, on a file of ours."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmoe.errors import FlashMoEError
from harness.runs.upstream_server_plugin import MODEL

ROOT = Path(__file__).parents[2]
PLUGIN = "harness.runs.upstream_server_plugin"
# The files whose tests a text model can serve.
FILES = (
    "basic", "completion", "chat_completion", "tokenize", "slot_save", "ctx_shift", "ignore_eos",
    "kv_keep_only_active", "metrics", "infill", "security",
)  # fmt: skip
_PASSED = "passed"


@dataclass(frozen=True)
class Outcome:
    """What became of a test: passed, failed or skipped, and in what words."""

    outcome: str
    words: str = ""


def suite(program: Path) -> Path:
    """The tests in the source tree that `program` was built in.

    Raises FlashMoEError where there is none.
    """
    for folder in program.resolve().parents:
        if (tests := folder / "tools" / "server" / "tests" / "utils.py").is_file():
            return tests.parent
    raise FlashMoEError(
        f"{program} does not lie in llama.cpp's source tree, whose tests are to be run: "
        "give a llama-server that was built there"
    )


def run(
    tests: Path, command: Sequence[str], model: Path, names: Sequence[str] = FILES
) -> dict[str, Outcome]:
    """Outcomes by the tests' names. `command`: the server's, to which the suite adds its own.

    Raises FlashMoEError where pytest gives no result.
    """
    paths = [tests / "unit" / f"test_{name}.py" for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FlashMoEError(f"{tests} has no {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="flashmoe-server-tests-") as folder:
        script, results = Path(folder, "llama-server"), Path(folder, "results.xml")
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        Path(folder, "tmp").mkdir()  # where the suite keeps slots
        environment = os.environ | {
            "LLAMA_SERVER_BIN_PATH": str(script),
            "LLAMA_CACHE": str(Path(folder, "tmp")),
            "PORT": str(_free_port()),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            MODEL: str(model.resolve()),
        }
        pytest = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider",
                "-c", str(tests / "pytest.ini"), "--rootdir", str(tests), "-m", "not slow",
                "--continue-on-collection-errors", f"--junitxml={results}", *map(str, paths),
            ],
            cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if not results.exists():
            last = (pytest.stderr or pytest.stdout).strip().splitlines() or ["nothing"]
            raise FlashMoEError(f"llama.cpp's server tests did not run: {last[-1]}")
        return _outcomes(results)


def _outcomes(results: Path) -> dict[str, Outcome]:
    outcomes = {}
    for case in ET.parse(results).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('unit.')}::{case.get('name')}"
        bad = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        if bad is None:
            outcomes[name] = Outcome(_PASSED)
        else:
            kind = "skipped" if bad.tag == "skipped" else "failed"
            outcomes[name] = Outcome(kind, (bad.get("message") or "").split("\n")[0])
    return outcomes


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
