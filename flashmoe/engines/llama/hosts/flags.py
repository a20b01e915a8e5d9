"""Arguments of llama.cpp's programs that would bring every expert into memory, or lose the cache.

Releases differ in the names; those of 2026 and the ones that they replaced are known here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from flashmoe.errors import FlashMoEError

_READS_ALL = "it reads the whole model into memory"
ROUTER = "a router starts copies of the program that FlashMoE is not in"
_COPYING_MODES = {"none", "mlock", "dio"}
_REFUSED = {
    "--no-mmap": _READS_ALL,
    "-dio": _READS_ALL,
    "--direct-io": _READS_ALL,
    "--check-tensors": "experts are not in memory when it looks at them, so it would check nothing",
    "--models-dir": ROUTER,
    "--models-preset": ROUTER,
}
# Which a program reads where the option is not given.
_VARIABLES = {
    "LLAMA_ARG_LOAD_MODE": "--load-mode",
    "LLAMA_ARG_MMAP": "--mmap",
    "LLAMA_ARG_MODELS_DIR": "--models-dir",
    "LLAMA_ARG_MODELS_PRESET": "--models-preset",
}
_OFF = {"0", "false", "off", "disabled"}
_SERVER = "llama-server"
# Not --model-url: with that alone, llama-server of b11434 begins as a router.
_MODELS = {"-m", "--model", "-dr", "--docker-repo", "-hf", "-hfr", "--hf-repo"}
_MODEL_VARIABLES = ("LLAMA_ARG_MODEL", "LLAMA_ARG_DOCKER_REPO", "LLAMA_ARG_HF_REPO")
OTHER_MODELS = (*_MODEL_VARIABLES[1:], "LLAMA_ARG_HF_FILE", "LLAMA_ARG_MODEL_URL")
# What `flashmoe serve` itself says, so that no flag behind its back says another.
_SERVED = {
    "--host": "--host", "--port": "--port",
    **dict.fromkeys([*_MODELS, "-mu", "--model-url"], "MODEL"),
}  # fmt: skip
_PRESETS = ("-default", "-spec")  # endings of options that name a model to fetch
_NO_PRESET = {"--spec-default"}
_INFORMS = {"-h", "--help", "--usage", "--version", "--completion-bash", "-cl", "--cache-list"}
_INFORMS |= {"--list-devices"}


def check(
    program: str, arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> None:
    """Raises FlashMoEError for what FlashMoE cannot make harmless.

    program: its name without a folder; environment: where it finds options that are not given.
    """
    for name, value in _options(arguments):
        _check_option(name, value, name)
    for variable, name in _VARIABLES.items():
        if variable in environment:
            _check_option(name, environment[variable], variable)
    if "LLAMA_ARG_NO_MMAP" in environment:  # any value turns it off
        _check_option("--no-mmap", "", "LLAMA_ARG_NO_MMAP")
    if program == _SERVER and _is_router(arguments, environment):
        raise FlashMoEError(
            f"give {_SERVER} its model under FlashMoE (-m FILE, beside -mu too, or -hf "
            f"REPOSITORY): without one it is a router, and {ROUTER}"
        )


def check_passed(arguments: Sequence[str]) -> None:
    """Raises FlashMoEError where what follows `flashmoe serve ... --` says what comes before it."""
    for name, _ in _options(arguments):
        if name in _SERVED:
            raise FlashMoEError(f"leave out {name} after --: give {_SERVED[name]} before it")


def number_of(
    names: Sequence[str],
    variable: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> int | None:
    """What the user gives an option: the last of its names in `arguments`, else its variable.

    None where neither is there, or what is given is no number, which the program refuses itself.
    """
    given = [value for name, value in _options(arguments) if name in names]
    text = given[-1] if given else environment.get(variable, "")
    return int(text) if re.fullmatch(r"-?\d{1,15}", text) else None


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word as if it were an option, with what may be its value."""
    for number, word in enumerate(arguments):
        name, _, value = word.partition("=")
        yield name, value or (arguments[number + 1] if number + 1 < len(arguments) else "")


def _check_option(name: str, value: str, said: str) -> None:
    """said: how the user wrote it, an option or a variable."""
    values = set(value.split(","))  # llama-bench takes several
    if name in _REFUSED:
        raise FlashMoEError(f"leave out {said} under FlashMoE: {_REFUSED[name]}")
    copies = name in ("-lm", "--load-mode") and values & _COPYING_MODES
    if copies or (name in ("-mmp", "--mmap") and values & _OFF):
        raise FlashMoEError(f"leave out {said} {value} under FlashMoE: {_READS_ALL}")


def _is_router(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Does this server begin without a model of its own?"""
    names = {name for name, value in _options(arguments) if value or name not in _MODELS}
    if names & (_MODELS | _INFORMS) or any(name.endswith(_PRESETS) for name in names - _NO_PRESET):
        return False
    return not any(environment.get(name) for name in _MODEL_VARIABLES)
