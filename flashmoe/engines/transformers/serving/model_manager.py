"""The one model that a server answers with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import transformers
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality

from flashmoe.engines.transformers.prompting import Prompter

# For models that were never taught to chat: the messages, one below the other.
_PLAIN_CHAT = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


class OneModel(ModelManager):
    """Has one model loaded, and gives it to whoever asks for any model."""

    def __init__(
        self, model: transformers.PreTrainedModel, prompter: Prompter, name: str | None = None
    ) -> None:
        self.name = name or _name(prompter.directory)
        self.model = model
        self.tokenizer = prompter.tokenizer
        self.force_model = None
        if not self.tokenizer.chat_template:
            self.tokenizer.chat_template = _first_token(self.tokenizer) + _PLAIN_CHAT

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.model, self.tokenizer

    async def load_model_streaming(self, *_: Any, **__: Any) -> AsyncIterator[str]:
        """What `transformers chat` waits for."""
        yield f"data: {json.dumps({'status': 'ready', 'model': self.name, 'cached': True})}\n\n"

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "local"}]

    def get_model_modality(self, *_: Any, **__: Any) -> Modality:
        return Modality.LLM

    def shutdown(self) -> None:
        """The model is closed by whoever loaded it."""


def _name(directory: Path) -> str:
    """org/name of what lies in the hub's cache, otherwise the directory's name."""
    directory = directory.resolve()
    for folder in directory.parts:
        if folder.startswith("models--"):
            return folder.removeprefix("models--").replace("--", "/")
    return directory.name


def _first_token(tokenizer: Any) -> str:
    """What a tokenizer writes before a text, if anything."""
    ids = tokenizer("x")["input_ids"]
    return str(tokenizer.bos_token) if ids[0] == tokenizer.bos_token_id else ""
