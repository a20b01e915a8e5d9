"""Loads a model and answers requests until it is told to end."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from flashmoe.engines.serving import ServeSettings, Watch
from flashmoe.engines.transformers import loading
from flashmoe.engines.transformers.prompting import Prompter
from flashmoe.engines.transformers.serving import cache_memory, options
from flashmoe.engines.transformers.serving.cache_memory import CacheMemory
from flashmoe.engines.transformers.serving.kept_prefixes import KeptPrefixes
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.util.sizes import format_bytes, parse_bytes

_LIBRARIES = ("fastapi", "openai", "pydantic", "uvicorn")  # transformers' handlers import them
_CACHES_SHARE = 8  # of the free memory, one part in so many is for the caches of conversations


def serve(path: str | os.PathLike[str], settings: ServeSettings, watch: Watch) -> int:
    """Answer until Ctrl-C or SIGTERM; return the exit status.

    settings.extra: see `options`. Raises FlashMoEError where a library is missing, the address
    is taken, the model cannot be loaded, or there is no memory for the context.
    """
    with opened(path, settings, watch) as server:
        print(
            f"flashmoe: http://{settings.host}:{server.port}/v1 answers, up to "
            f"{server.generations.context} tokens a conversation",
            file=sys.stderr,
        )
        server.run()
    return 0


@contextmanager
def opened(path: str | os.PathLike[str], settings: ServeSettings, watch: Watch) -> Iterator[Any]:
    """A server whose `run` answers; the model ends with it. Raises FlashMoEError as `serve`."""
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise FlashMoEError(
            f"serving needs {', '.join(missing)}: pip install 'flashmoe-ssd[server]'"
        )
    from flashmoe.engines.transformers.serving import app
    from flashmoe.engines.transformers.serving.generations import Generations
    from flashmoe.engines.transformers.serving.model_manager import OneModel
    from flashmoe.engines.transformers.serving.uvicorn_server import Server

    flags = options.parse(settings.extra)
    if flags.kept_memory:
        caches_bytes = parse_bytes(flags.kept_memory)
    else:
        caches_bytes = free_memory.budget_bytes(0, flags.device) // _CACHES_SHARE
    with ExitStack() as until_end:
        bound = until_end.enter_context(_bound(settings.host, settings.port))
        prompter = Prompter(Path(path))
        # OpenMP's threads sleep between operations where two threads of a process have teams of
        # them: so the thread that generates is the only one that ever computes
        thread = until_end.enter_context(ThreadPoolExecutor(1, "flashmoe-generate"))
        model = thread.submit(
            loading.load,
            path,
            memory=settings.memory,
            policy=settings.policy,
            device=flags.device,
            prefetch=not flags.no_prefetch,
            arithmetic=flags.arithmetic,
            also=settings.also,
        ).result()
        engine: Any = model.flashmoe
        until_end.enter_context(closing(engine))
        memory = thread.submit(cache_memory.measure, model).result()
        context = _context(model, settings.context, memory, caches_bytes)
        prefixes = KeptPrefixes(
            lambda: cache_memory.new_cache(model), memory, max(caches_bytes, memory.at(context))
        )
        if settings.memory == "auto":
            engine.beside_bytes += prefixes.budget_bytes
            engine.resize("auto")
        engine.reset_counts()
        watch(engine)
        generations = Generations(model, prefixes, context, thread)
        until_end.enter_context(closing(generations))
        engine.waiting_requests = generations.waiting
        asgi = app.build(OneModel(model, prompter, settings.name), generations, settings.api_key)
        yield Server(asgi, bound, generations)


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound to the address; who connects before the server runs is refused."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise FlashMoEError(
            f"cannot listen at {host}:{port} ({error}): choose another --port or --host"
        ) from None
    return bound


def _context(
    model: transformers.PreTrainedModel,
    asked: int | None,
    memory: CacheMemory,
    caches_bytes: int,
) -> int:
    """The tokens of a conversation: as many as the model knows, and the caches' memory holds.

    Raises FlashMoEError for more than the model knows, and where not one token fits.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is not None:
        if asked < 2 or (known and asked > known):
            raise FlashMoEError(
                f"--context {asked}: this model's conversations have 2 to {known} tokens"
            )
        return asked
    bounds = [bound for bound in (known, memory.fitting(caches_bytes)) if bound is not None]
    if (context := min(bounds, default=sys.maxsize)) < 2:
        raise FlashMoEError(
            f"{format_bytes(caches_bytes)} hold no conversation with this model: give more "
            "after `-- --kept-memory`, or free memory"
        )
    return context
