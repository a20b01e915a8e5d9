"""Models that llama.cpp computes, in its own programs and with its own kernels: GGUF files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.errors import FlashMoEError

if TYPE_CHECKING:
    from flashmoe.engines.llama.session import LlamaSession
    from flashmoe.engines.model_facts import ModelFacts
    from flashmoe.engines.serving import ServeSettings, Watch


def accepts(path: str | os.PathLike[str]) -> bool:
    """A file that begins as GGUF does, whatever its name; or the name, whatever lies there."""
    if str(path).endswith(".gguf"):
        return True
    with suppress(OSError):
        if os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises without permission)
            with open(path, "rb") as file:
                return file.read(4) == b"GGUF"
    return False


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """As `hosts.llama_cpp.load`: a `llama_cpp.Llama`, or an `ik_llama_cpp.IkLlama`."""
    with _installed(path):
        from flashmoe.engines.llama.hosts import llama_cpp
    return llama_cpp.load(Path(path), **options)


def open_session(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    *,
    device: str = "cpu",
    prefetch: bool = True,
    arithmetic: str = "exact",
    **options: Any,
) -> LlamaSession:
    """As `session.LlamaSession`."""
    if arithmetic != "exact":
        raise FlashMoEError(
            f"arithmetic {arithmetic!r}: llama.cpp's own kernels compute a GGUF file"
        )
    if device != "cpu":
        raise FlashMoEError(f"device {device!r}: a GGUF file's experts are computed on the CPU")
    with _installed(path):
        from flashmoe.engines.llama.session import LlamaSession
    return LlamaSession(Path(path), prompts, prefetch=prefetch, **options)


def verify(
    path: str | os.PathLike[str], progress: Callable[[int, int], object], also: Sequence[Path] = ()
) -> str:
    """As `file_check.check`, by whichever library of llama.cpp is installed."""
    with _installed(path):
        from flashmoe.engines.llama import tensor_library
        from flashmoe.engines.llama.file_check import check
    return check(tensor_library.find(), Path(path), progress, also)


def serve(path: str | os.PathLike[str], settings: ServeSettings, watch: Watch) -> int:
    """As `serving.serve`."""
    with _installed(path, "server"):
        from flashmoe.engines.llama import serving
    return serving.serve(Path(path), settings, watch)


def describe(path: str | os.PathLike[str]) -> ModelFacts:
    """As `description.describe`, by whichever library of llama.cpp is installed."""
    with _installed(path):
        from flashmoe.engines.llama import tensor_library
        from flashmoe.engines.llama.description import describe as describe_file
    return describe_file(tensor_library.find(), Path(path))


@contextmanager
def _installed(path: str | os.PathLike[str], extra: str = "llama") -> Iterator[None]:
    """Imports within raise FlashMoEError where a package is missing; so does a missing file.

    extra: of ours, which has the package.
    """
    if not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises without permission)
        raise FlashMoEError(f"{path}: no such file")
    try:
        yield
    except ImportError as error:
        raise FlashMoEError(
            f"{error.name} is not installed: pip install 'flashmoe-ssd[{extra}]'"
        ) from None
