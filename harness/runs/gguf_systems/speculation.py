"""llama-server where it guesses tokens by what the prompt said, and verifies a group at once.

They suit a prompt that says before what the answer will be (`servers --repeating`): else no guess
comes true, and nothing is verified.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from harness.runs.gguf_systems import System, Work
from harness.runs.gguf_systems.llama_server import OURS, PLAIN
from harness.runs.gguf_systems.server_process import measure

GUESSED = (3, 7, 15)  # tokens beside the one that is sure
# So many must have been there before, in this order; fewer are not guessed from them.
_LIKE_TOKENS = 3


def _run(work: Work, guessed: int, *arguments: str, memory: str | None = None) -> dict[str, Any]:
    return measure(
        replace(work, trace=None),  # the trace of this limit is that of tokens one by one
        work.programs / "llama-server",
        *("--spec-type", "ngram-simple"),
        *("--spec-ngram-simple-size-n", str(_LIKE_TOKENS)),
        *("--spec-ngram-simple-size-m", str(guessed)),
        *arguments,
        memory=memory,
    )


def _plain(guessed: int, work: Work) -> dict[str, Any]:
    return _run(work, guessed, "--no-repack")


def _ours(guessed: int, work: Work) -> dict[str, Any]:
    return _run(work, guessed, memory="auto")


SYSTEMS = tuple(
    system
    for guessed in GUESSED
    for system in (
        System(f"{PLAIN}, {guessed} guessed", partial(_plain, guessed), usual=False),
        System(f"{OURS}, {guessed} guessed", partial(_ours, guessed), is_ours=True, usual=False),
    )
)
