"""Models of the Python packages `llama_cpp` and `ik_llama_cpp`, with the cache under them."""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashmoe.engines.llama.attachment import Attachment
from flashmoe.engines.llama.hooks import Hooks
from flashmoe.engines.llama.redirect import loaded
from flashmoe.errors import FlashMoEError

# Each package's class of models, and its methods that compute; the first one wanted first.
CLASSES = {
    "llama_cpp": ("Llama", ("eval", "embed")),
    "ik_llama_cpp": ("IkLlama", ("generate", "embed")),
}
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_mmap": (lambda value: not value, "use_mmap=False reads the whole model into memory"),
    "lora_path": (lambda value: value is not None, "with a LoRA the package maps no file"),
    "vocab_only": (bool, "vocab_only=True loads no experts"),
}
_open: weakref.WeakSet[Any] = weakref.WeakSet()  # models, until they are closed
_loading = threading.Lock()
_hooks_left: list[Hooks] = []  # a model without experts may still call them


def load(
    path: Path,
    *,
    memory: int | str,
    policy: str = "learned",
    prefetch: bool = True,
    warm: Path | None = None,
    package: str | None = None,
    also: Sequence[str | os.PathLike[str]] = (),
    **arguments: Any,
) -> Any:
    """A `llama_cpp.Llama` whose experts stay on the SSD; `.flashmoe` is its engine.

    memory, policy, prefetch, warm: see `Attachment`. package: llama_cpp or ik_llama_cpp (whose
        class is IkLlama); default: the first that is installed. also: the same file on other
        drives (docs/drives.md). arguments: the class's own.
    One model at a time. Raises FlashMoEError when no package is installed, another model is open,
    the file has no experts or cannot be streamed, or an argument would read every expert.
    """
    name = _choose(package)
    _check(_streamed(name), arguments)
    with _loading:
        options = {"memory": memory, "policy": policy, "prefetch": prefetch, "warm": warm}
        copies = [Path(copy) for copy in also]
        return _load(path, name, arguments, **options, also=copies)


def _load(path: Path, name: str, arguments: dict[str, Any], **options: Any) -> Any:
    """options: of `Attachment`."""
    if _open:
        gc.collect()  # a model that nothing refers to but itself is no hindrance
    for model in _open:
        raise FlashMoEError(f"close {model.flashmoe.path} before you load another file")
    folder = Path(importlib.import_module(name).__file__ or "").parent
    llama = loaded(f"{folder}/lib/libllama") or loaded("/libllama.so")
    beside = llama.parent if llama else folder
    places = (f"{beside}/libggml-base", f"{beside}/libggml", f"/{name}_python.libs/libggml")
    ggml = next(filter(None, map(loaded, places)), None)  # the functions of tensors
    if llama is None or ggml is None:
        raise FlashMoEError(f"{name} is installed without its libraries: install it again")
    said: list[str] = []
    attachment = Attachment(llama, ggml, **options, tell=said.append)
    try:
        if not attachment.add_file(path):
            raise FlashMoEError(f"{path} has no experts to stream: load it with {name} itself")
    except BaseException:
        _detach(attachment)
        raise
    return _streamed(name)(attachment, said, str(path), arguments)


def _choose(package: str | None) -> str:
    """Raises FlashMoEError where no package is installed, or not the one that is asked for."""
    if package is not None and package not in CLASSES:
        raise FlashMoEError(f"package={package!r}: choose one of {', '.join(CLASSES)}")
    for name in [package] if package else CLASSES:
        if find_spec(name):
            return name
    wanted = "ik-llama-cpp-python" if package == "ik_llama_cpp" else "'flashmoe-ssd[llama]'"
    raise FlashMoEError(
        f"{package or 'llama_cpp'}, which computes GGUF files, is not installed: "
        f"pip install {wanted}"
    )


def _check(model_class: Any, arguments: Mapping[str, Any]) -> None:
    """Raises FlashMoEError for arguments that the class does not have or FlashMoE cannot bear."""
    known = inspect.signature(model_class.__base__).parameters
    for name, value in arguments.items():
        if name not in known:
            raise FlashMoEError(f"{model_class.__name__} has no argument {name!r}: leave it out")
        if name in _REFUSED and _REFUSED[name][0](value):
            raise FlashMoEError(f"leave out {name} under FlashMoE: {_REFUSED[name][1]}")


def _detach(attachment: Attachment) -> None:
    attachment.detach()
    _hooks_left.append(attachment.hooks)


@cache
def _streamed(package: str) -> Any:
    """The package's class of models, of which each has its experts streamed."""
    class_name, computing = CLASSES[package]
    base: Any = getattr(importlib.import_module(package), class_name)

    class Streamed(base):
        """A model that fails with FlashMoE's sentence, and takes the cache with it in the end."""

        def __init__(
            self, attachment: Attachment, said: list[str], path: str, arguments: dict[str, Any]
        ) -> None:
            self._attachment: Attachment | None = attachment
            try:
                super().__init__(path, **arguments)
                scored = arguments.get("logits_all") or arguments.get("draft_model")
                attachment.start(self.scores.nbytes if scored else 0)  # else they stay empty
            except (ValueError, RuntimeError) as error:  # a file that the package cannot load
                raise FlashMoEError(said[-1] if said else f"{path}: {error}") from None
            finally:
                self.flashmoe = attachment.engine
                if attachment.engine is None:
                    self.close()
            _open.add(self)

        def close(self) -> None:
            """End the model and its engine."""
            with suppress(AttributeError):  # of a model that was never built
                super().close()
            attachment, self._attachment = getattr(self, "_attachment", None), None
            if attachment:
                _detach(attachment)
                _open.discard(self)

        def __del__(self) -> None:
            self.close()

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise FlashMoEError("a model whose experts are streamed cannot be pickled or copied")

    for method in computing:
        setattr(Streamed, method, _telling(getattr(base, method)))
    Streamed.__name__ = Streamed.__qualname__ = class_name
    return Streamed


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, raising FlashMoEError where experts could not be read."""

    @wraps(method)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        attachment = self._attachment
        if attachment is None:
            raise FlashMoEError("this model was closed: load it again")
        attachment.failure = ""
        try:
            result = method(self, *arguments, **options)
        except RuntimeError:
            if not attachment.failure:
                raise
        if attachment.failure:  # of which the package may take no notice
            raise FlashMoEError(attachment.failure) from None
        return result

    return run


@atexit.register
def _close_all() -> None:
    """Before Python takes its own modules apart."""
    for model in list(_open):
        model.close()
