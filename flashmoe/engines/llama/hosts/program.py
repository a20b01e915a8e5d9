"""Runs a program of a llama.cpp release inside this process."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flashmoe.engines.llama.hosts import flags
from flashmoe.engines.llama.redirect import loaded, redirect
from flashmoe.errors import FlashMoEError

# Functions of the programs' own library, as C++ names them: whether what -hf names is a list of
# models for a router, the log, and its flushing.
_IS_PRESET = "_Z36common_models_handler_is_preset_repoRK21common_models_handler"
_LOG_AND_FLUSH = "_Z15common_log_mainv", "_Z16common_log_flushP10common_log"
_IsPreset = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


def find(name: str) -> Path:
    """The library that holds the program called `name`, on PATH or by path.

    Raises FlashMoEError where there is no such program, or it is not built of shared libraries.
    """
    path = shutil.which(name)
    if path is None:
        raise FlashMoEError(f"no program is called {name!r}: give its path, or install llama.cpp")
    program = Path(path).resolve()
    names = f"lib{program.name}-impl.so"
    for folder in (program.parent, program.parent.parent / "lib"):
        if (folder / names).is_file():
            return folder / names
    raise FlashMoEError(
        f"{program} is not of a llama.cpp in shared libraries (there is no {names} beside it): "
        "use a release of 2026, or build with -DBUILD_SHARED_LIBS=ON"
    )


def run(
    library: Path,
    arguments: Sequence[str],
    attach: Callable[[Path, Path], object],
) -> int:
    """Run the program with these arguments; its exit status.

    attach: called with the loaded llama and ggml libraries before the program begins.
    Raises FlashMoEError where the library holds no program that is known here.
    """
    name = library.name.removeprefix("lib").removesuffix("-impl.so")
    try:
        code = ctypes.CDLL(str(library))
    except OSError as error:
        raise FlashMoEError(f"{library} cannot be loaded ({error})") from None
    llama, ggml = loaded("/libllama.so"), loaded("/libggml-base.so")
    function = name.replace("-", "_")  # int llama_server(int, char **), as C++ names it
    entry = getattr(code, f"_Z{len(function)}{function}iPPc", None)
    if llama is None or ggml is None or entry is None:
        raise FlashMoEError(f"{library} is not a program of llama.cpp that FlashMoE knows")
    attach(llama, ggml)
    _kept = _refuse_presets(library, code)  # until the program ends
    words = [os.fsencode(word) for word in (name, *arguments)]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the program's own handlers come later
    sys.stdout.flush()
    status = int(entry(len(words), (ctypes.c_char_p * (len(words) + 1))(*words, None)))
    _flush_log(code)
    return status


def _flush_log(code: ctypes.CDLL) -> None:
    """Let the program's own thread write what it still has to, so that no line of ours is torn."""
    log, flush = (getattr(code, name, None) for name in _LOG_AND_FLUSH)
    if log and flush:
        log.restype, flush.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        flush(log())


def _refuse_presets(library: Path, code: ctypes.CDLL) -> object:
    """End the program, before it loads anything, where what -hf names makes it a router."""
    if (found := getattr(code, _IS_PRESET, None)) is None:
        return None
    ask = ctypes.cast(found, _IsPreset)

    def answer(handler: int) -> bool:
        if ask(handler):
            print(
                "flashmoe: name a repository of one model by -hf: this one lists models for a "
                f"router, and {flags.ROUTER}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(1)
        return False

    function = _IsPreset(answer)
    redirect(library.resolve(), {_IS_PRESET: ctypes.cast(function, ctypes.c_void_p).value or 0})
    return function
