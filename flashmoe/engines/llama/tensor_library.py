"""Finds a library with ggml's functions for what needs no program: an installed package's."""

from __future__ import annotations

import importlib
import shutil
from importlib.util import find_spec
from pathlib import Path

from flashmoe.engines.llama.ggml import GGML
from flashmoe.errors import FlashMoEError

_IN_PACKAGES = {"llama_cpp": "lib/libggml-base.so", "xllamacpp": "xllamacpp*.so"}


def find() -> GGML:
    """The functions of llama_cpp's library, else of xllamacpp's, else of a llama-server's on PATH.

    Raises FlashMoEError where there is none.
    """
    for package, pattern in _IN_PACKAGES.items():
        spec = find_spec(package)
        for place in spec.submodule_search_locations or [] if spec else []:
            if paths := sorted(Path(place).glob(pattern)):
                if package == "xllamacpp":  # it needs its own libraries, which the import loads
                    importlib.import_module(package)
                return GGML(str(paths[0]))
    if program := shutil.which("llama-server"):
        folder = Path(program).resolve().parent
        for path in (folder / "libggml-base.so", folder.parent / "lib" / "libggml-base.so"):
            if path.is_file():
                return GGML(str(path))
    raise FlashMoEError(
        "no library of llama.cpp is here to read a GGUF file with: pip install "
        "'flashmoe-ssd[server]' (no compiler needed) or 'flashmoe-ssd[llama]'"
    )
