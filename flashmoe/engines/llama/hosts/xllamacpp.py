"""llama-server as the xllamacpp wheel holds it, which needs no compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xllamacpp

from flashmoe.engines.llama.attachment import Attachment
from flashmoe.engines.llama.expert_tensors import parts_of
from flashmoe.engines.llama.hooks import ON, PYTHON
from flashmoe.engines.llama.hosts.accept import connections_wait
from flashmoe.errors import FlashMoEError, reading


def serve(
    model: Path,
    *,
    memory: int | str,
    policy: str = "learned",
    warm: Path | None = None,
    record: bool = False,
    **parameters: Any,
) -> tuple[Any, Attachment]:
    """A running `xllamacpp.Server` of this model, and what streams its experts.

    memory, policy, warm, record: see `Attachment`. parameters: attributes of xllamacpp's
        CommonParams, such as n_ctx and n_parallel.
    A model without experts runs as without FlashMoE. Raises FlashMoEError when the file cannot be
    read, or its experts not be streamed.
    """
    library = Path(xllamacpp.xllamacpp.__file__).resolve()
    attachment = Attachment(
        library, library, memory=memory, policy=policy, warm=warm, record=record
    )
    # all parts of a split file, because the constructor maps them where we cannot be asked
    with reading(model):
        streams = [attachment.add_file(part) for part in parts_of(attachment.ggml, model)]
    common = xllamacpp.CommonParams()
    common.model.path = str(model)
    common.fit_params = False
    for name, value in parameters.items():
        setattr(common, name, value)
    # The constructor keeps Python's lock while its threads load the model and decode one token to
    # see what their memory can do; what is computed then is thrown away.
    switches = attachment.hooks.switches
    switches[[ON, PYTHON]] = 0
    try:
        with connections_wait(library):
            server = xllamacpp.Server(common)
            switches[[ON, PYTHON]] = any(streams)
    except RuntimeError as error:
        raise FlashMoEError(f"{model} was not loaded ({error}): llama.cpp says above why") from None
    return server, attachment
