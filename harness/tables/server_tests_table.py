"""llama.cpp's own server tests, with FlashMoE under the server and without."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flashmoe.errors import FlashMoEError
from harness import tiny_gguf
from harness.progress import say
from harness.report import report
from harness.runs import upstream_server_tests

TITLE = "server_tests"


def server_tests_table(
    folder: Path,
    command: str,
    program: Path,
    *,
    model: Path | None = None,
    memory: str | None = None,
    names: Sequence[str] = upstream_server_tests.FILES,
) -> None:
    """Run the suite twice and write what became of each test.

    model, memory: a GGUF file with experts, and the budget; None: a tiny one, a third of it.
    Raises FlashMoEError, after the table is written, where a test ends otherwise with FlashMoE.
    """
    tests = upstream_server_tests.suite(program)
    plain = [str(program), "--no-repack"]  # repacked weights are multiplied by other kernels
    with TemporaryDirectory(prefix="flashmoe-") as scratch:
        if model is None:
            model = tiny_gguf.write(Path(scratch, "tiny.gguf"), max_position_embeddings=4096)
            memory = memory or str(model.stat().st_size // 3)  # they are read again and again
        ours = [
            *(sys.executable, "-m", "flashmoe", "run", "--memory", memory or "auto"),
            str(program),
        ]
        outcomes = []
        for called, server in (("llama-server", plain), ("flashmoe run llama-server", ours)):
            say(f"llama.cpp's server tests: {called}")
            outcomes.append(upstream_server_tests.run(tests, server, model, names))
            say(", ".join(f"{n} {kind}" for kind, n in _counts(outcomes[-1]).items()))
    rows = _rows(*outcomes)
    report.write(folder, TITLE, rows)
    report.record(folder, TITLE, command)
    if different := [str(row["test"]) for row in rows if not row["same"]]:
        raise FlashMoEError(
            "llama.cpp's tests end otherwise with FlashMoE:\n  " + "\n  ".join(different)
        )


def _counts(outcomes: dict[str, upstream_server_tests.Outcome]) -> Counter[str]:
    return Counter(outcome.outcome for outcome in outcomes.values())


def _rows(
    plain: dict[str, upstream_server_tests.Outcome], ours: dict[str, upstream_server_tests.Outcome]
) -> list[dict[str, Any]]:
    missing = upstream_server_tests.Outcome("not run")
    return [
        {
            "test": name,
            "plain": plain.get(name, missing).outcome,
            "flashmoe": ours.get(name, missing).outcome,
            "same": plain.get(name, missing).outcome == ours.get(name, missing).outcome,
            "plain_words": plain.get(name, missing).words,
            "flashmoe_words": ours.get(name, missing).words,
        }
        for name in dict.fromkeys((*plain, *ours))
    ]
