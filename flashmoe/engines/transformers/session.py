"""Prompts, and the transformers model that continues them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flashmoe.engines.session import Continuation, Session
from flashmoe.engines.transformers import loading
from flashmoe.engines.transformers.prompting import Prompter
from flashmoe.engines.transformers.recorder import record
from flashmoe.trace import Trace


class _TokenCounter:
    """A streamer that counts tokens and passes them on to another streamer, if there is one."""

    def __init__(self, streamer: Any, count: Callable[[], object]) -> None:
        self.streamer = streamer
        self.count = count
        self.prompt_passed = False

    def put(self, value: Any) -> None:
        if self.prompt_passed:
            self.count()
        self.prompt_passed = True
        if self.streamer:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer:
            self.streamer.end()


class TransformersSession(Session):
    """A `Session` of a Hugging Face directory or a store."""

    def __init__(
        self,
        path: Path,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        raw: bool,
        **options: Any,
    ) -> None:
        """options: see `loading.load`. Raises FlashMoEError as `Prompter` and `load` do."""
        self.prompter = Prompter(path, raw=raw)
        self.token_ids = [self.prompter.token_ids(prompt) for prompt in prompts]
        self.max_new_tokens = max_new_tokens
        self.model = loading.load(path, **options)
        self.engine = self.model.flashmoe  # type: ignore[assignment]

    def generate(self, *, show: bool, count: Callable[[], object]) -> Continuation:
        ids = self.token_ids[0][None].to(self.model.device)
        streamer = _TokenCounter(self.prompter.streamer() if show else None, count)
        with torch.inference_mode():
            output = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                streamer=streamer,
            )
        text = self.prompter.decode(output[0], skip_special_tokens=True)
        return Continuation(text, output[0].tolist(), output.shape[1] - ids.shape[1])

    def record(self, *, probabilities: bool, guesses: bool, info: Mapping[str, Any]) -> Trace:
        return record(
            self.model,
            self.token_ids,
            max_new_tokens=self.max_new_tokens,
            probabilities=probabilities,
            guesses=guesses,
            info=info,
        )

    def close(self) -> None:
        self.engine.close()
