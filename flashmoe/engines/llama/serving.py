"""Serves a GGUF file by llama-server, the user's own or the xllamacpp wheel's."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from flashmoe.engines.llama import context_size
from flashmoe.engines.llama.attachment import Attachment
from flashmoe.engines.llama.expert_tensors import expert_tensors, heads_of
from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.llama.gguf_head import GGUFHead
from flashmoe.engines.llama.hosts import flags, program
from flashmoe.engines.serving import ServeSettings, Watch
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.util import cores
from flashmoe.util.sizes import format_bytes, parse_bytes

PROGRAM = "llama-server"
SLOTS = 4  # conversations at once, as llama-server itself has them
# Points of a conversation that can be gone back to, of models that keep a state.
_CHECKPOINTS = 8
_MIB = 1 << 20


def serve(path: Path, settings: ServeSettings, watch: Watch) -> int:
    """Answer requests until a signal ends it; the exit status.

    Settings reach llama-server as its own variables: it knows no more of them than its version
    does, flags win over them, and nobody reads the key in the list of processes.
    Raises FlashMoEError where no server can be had, or the model cannot be served.
    """
    flags.check_passed(settings.extra)
    flags.check(PROGRAM, ["-m", str(path), *settings.extra])
    run = _host(path, settings)

    def attach(llama: Path, ggml: Path) -> Attachment:
        attachment = Attachment(
            llama,
            ggml,
            memory=settings.memory,
            policy=settings.policy,
            watch=watch,
            also=settings.also,
        )
        _settle(attachment, path, settings)
        return attachment

    if status := run(attach):
        raise FlashMoEError(f"{PROGRAM} did not serve {path} (status {status}): it says above why")
    return 0


def _host(
    path: Path, settings: ServeSettings
) -> Callable[[Callable[[Path, Path], Attachment]], int]:
    """Runs the user's own llama-server where it can be hosted, else the wheel's.

    Raises FlashMoEError where there is neither.
    """
    try:
        library = program.find(PROGRAM)
    except FlashMoEError as error:
        if not find_spec("xllamacpp"):
            raise FlashMoEError(f"{error}; or pip install 'flashmoe-ssd[server]'") from None
        from flashmoe.engines.llama.hosts import xllamacpp

        return lambda attach: xllamacpp.run(path, settings.extra, attach)
    return lambda attach: program.run(library, settings.extra, attach)


def _settle(attachment: Attachment, path: Path, settings: ServeSettings) -> None:
    """Choose what the user leaves open, and tell it. Raises FlashMoEError for an unfit model."""
    heads = _heads(attachment.ggml, path)
    memory_bytes = 0 if settings.memory == "auto" else parse_bytes(settings.memory)
    dense_bytes = context_size.dense_bytes(heads)
    free_bytes = free_memory.available_bytes() - dense_bytes - memory_bytes
    asked = settings.context
    if asked is None:
        asked = flags.number_of(("-c", "--ctx-size"), "LLAMA_ARG_CTX_SIZE", settings.extra)
    room = context_size.choose(heads, free_bytes, asked)
    fixed: dict[str, object] = {
        "LLAMA_ARG_MODEL": path, "LLAMA_ARG_HOST": settings.host, "LLAMA_ARG_PORT": settings.port,
    }  # fmt: skip
    if settings.api_key:
        fixed["LLAMA_API_KEY"] = settings.api_key
    if settings.context:
        fixed["LLAMA_ARG_CTX_SIZE"] = settings.context
    chosen: dict[str, object] = {
        "LLAMA_ARG_CTX_SIZE": room.tokens,
        "LLAMA_ARG_CACHE_RAM": max(1, room.prefix_bytes // _MIB),
        "LLAMA_ARG_CTX_CHECKPOINTS": _CHECKPOINTS,
        "LLAMA_ARG_N_PARALLEL": SLOTS,
        "LLAMA_ARG_KV_UNIFIED": 1,
        "LLAMA_ARG_THREADS": cores.available(),
        "LLAMA_ARG_ALIAS": settings.name or path.name,
    }
    for name in flags.OTHER_MODELS:
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in fixed.items()})
    for name, value in chosen.items():
        os.environ.setdefault(name, str(value))
    kept = flags.number_of(("-cram", "--cache-ram"), "LLAMA_ARG_CACHE_RAM", settings.extra)
    attachment.beside_bytes = max(0, kept or 0) * _MIB
    attachment.tell(
        f"context of {room.tokens} tokens in at most {format_bytes(room.context_bytes)} (--context "
        f"chooses), {format_bytes(attachment.beside_bytes)} for prefixes of other conversations"
    )


def _heads(ggml: GGML, path: Path) -> list[GGUFHead]:
    """Of every part. Raises FlashMoEError where llama.cpp cannot read one, or none has experts."""
    heads = list(heads_of(ggml, path).values())
    if not any(expert_tensors(path, head) for head in heads):
        raise FlashMoEError(
            f"{path} is no Mixture-of-Experts model ({heads[0].architecture}): serve it by "
            f"{PROGRAM} itself"
        )
    return heads
