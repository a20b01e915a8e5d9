"""What a server of a model is told, whichever engine runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmoe.engines.base import Engine

Watch = Callable[[Engine], None]  # told of the engine as soon as there is one


@dataclass(frozen=True)
class ServeSettings:
    """The arguments of `flashmoe serve`."""

    host: str
    port: int
    api_key: str | None
    """What a request must carry; None: any request is answered, and only loopback is bound."""
    memory: int | str
    """The budget for experts, as `load` takes it."""
    policy: str
    context: int | None
    """Tokens that a conversation may have; None: what the engine thinks right for the machine."""
    extra: Sequence[str] = ()
    """The server program's own flags, passed through."""
    also: Sequence[Path] = ()
    """The same model on other drives, as `load` takes it."""
    name: str | None = None
    """What requests may call the model; None: as the engine does, by its file or folder."""
