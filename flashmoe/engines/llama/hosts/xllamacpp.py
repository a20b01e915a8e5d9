"""llama-server as the xllamacpp wheel holds it, which needs no compiler."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xllamacpp

from flashmoe.engines.llama.attachment import Attachment
from flashmoe.engines.llama.expert_tensors import parts_of
from flashmoe.engines.llama.hooks import ON, PYTHON
from flashmoe.engines.llama.hosts.accept import connections_wait
from flashmoe.errors import FlashMoEError, reading

LIBRARY = Path(xllamacpp.xllamacpp.__file__).resolve()
# bool common_params_parse(int, char **, common_params &, llama_example, print_usage), as C++ names
# it, and which of llama_example is the server.
_PARSE = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
_SERVER = 12
_OBJECT_BYTES = object.__basicsize__


def serve(
    model: Path,
    *,
    memory: int | str,
    policy: str = "learned",
    warm: Path | None = None,
    record: bool = False,
    also: Sequence[Path] = (),
    **parameters: Any,
) -> tuple[Any, Attachment]:
    """A running `xllamacpp.Server` of this model, and what streams its experts.

    memory, policy, warm, record, also: see `Attachment`. parameters: attributes of xllamacpp's
        CommonParams, such as n_ctx and n_parallel.
    A model without experts runs as without FlashMoE. Raises FlashMoEError when the file cannot be
    read, or its experts not be streamed.
    """
    attachment = Attachment(
        LIBRARY, LIBRARY, memory=memory, policy=policy, warm=warm, record=record, also=also
    )
    common = xllamacpp.CommonParams()
    common.model.path = str(model)
    for name, value in parameters.items():
        setattr(common, name, value)
    return _start(model, common, attachment), attachment


def run(model: Path, arguments: Sequence[str], attach: Callable[[Path, Path], Attachment]) -> int:
    """Serve `model` with llama-server's own arguments and variables; the exit status at its end.

    SIGINT or SIGTERM ends it; a second one at once. attach: called before the arguments are read.
    Raises FlashMoEError where they are not understood, and as `serve`.
    """
    ended = threading.Event()
    _handle(signal.SIG_DFL)  # while it loads, no handler of Python's would be called
    attachment = attach(LIBRARY, LIBRARY)
    handle = partial(_handle, lambda *_: ended.set())
    server = _start(model, _parse(arguments), attachment, handle)
    ended.wait()
    _handle(signal.SIG_DFL)
    attachment.hooks.end()  # because the next line keeps Python's lock
    del server  # waits for its threads
    return 0


def _handle(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _start(
    model: Path, common: Any, attachment: Attachment, before: Callable[[], object] | None = None
) -> Any:
    """The server, once it answers; its engine is there, and `before` called, before a request."""
    # all parts of a split file, because the constructor maps them where we cannot be asked
    with reading(model):
        streams = [attachment.add_file(part) for part in parts_of(attachment.ggml, model)]
    common.fit_params = False
    # The constructor keeps Python's lock while its threads load the model and decode one token to
    # see what their memory can do; what is computed then is thrown away.
    switches = attachment.hooks.switches
    switches[[ON, PYTHON]] = 0
    try:
        with connections_wait(LIBRARY):
            server = xllamacpp.Server(common)
            if any(streams):
                attachment.start()
            switches[[ON, PYTHON]] = any(streams)
            if before:
                before()
    except RuntimeError as error:
        raise FlashMoEError(f"{model} was not loaded ({error}): llama.cpp says above why") from None
    return server


def _parse(arguments: Sequence[str]) -> Any:
    """CommonParams as llama-server's own parser makes them, of `arguments` and its variables.

    Raises FlashMoEError where it does not understand them; what is wrong it says itself.
    """
    common = xllamacpp.CommonParams()
    parse = getattr(ctypes.CDLL(str(LIBRARY)), _PARSE, None)
    if parse is None or not _is_in_place(common):
        raise FlashMoEError(
            f"{LIBRARY} lays out its settings in a way that FlashMoE does not understand: use "
            "another version of xllamacpp"
        )
    parse.restype = ctypes.c_bool
    words = [os.fsencode(word) for word in ("llama-server", *arguments)]
    begin = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    sys.stdout.flush()
    if not parse(len(words), begin, ctypes.c_void_p(id(common) + _OBJECT_BYTES), _SERVER, None):
        raise FlashMoEError("llama-server does not understand its arguments: it says above why")
    return common


def _is_in_place(common: Any) -> bool:
    """Does the C++ object begin right after Python's own fields, as its first numbers tell?"""
    common.n_predict, common.n_ctx = 1234567, 7654321
    first = list((ctypes.c_int32 * 2).from_address(id(common) + _OBJECT_BYTES))
    common.n_predict, common.n_ctx = -1, 0
    return first == [1234567, 7654321]
