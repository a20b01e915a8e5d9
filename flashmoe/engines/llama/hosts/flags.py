"""Arguments of llama.cpp's programs that would bring every expert into memory."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.errors import FlashMoEError

_COPYING_MODES = {"none", "mlock", "dio"}
_MODE = ("-lm", "--load-mode")
_REFUSED = {
    "--no-mmap": "it reads the whole model into memory",
    "--models-dir": "a router starts copies of the program that FlashMoE is not in",
    "--models-preset": "a router starts copies of the program that FlashMoE is not in",
}


def check(arguments: Sequence[str]) -> None:
    """Raises FlashMoEError for an argument that FlashMoE cannot make harmless."""
    for number, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name in _REFUSED:
            raise FlashMoEError(f"leave out {name} under FlashMoE: {_REFUSED[name]}")
        following = arguments[number + 1] if number + 1 < len(arguments) else ""
        if name in _MODE and (mode := value or following) in _COPYING_MODES:
            raise FlashMoEError(
                f"leave out {name} {mode} under FlashMoE: it reads the whole model into memory"
            )
