"""Prompts, and the llama_cpp model that continues them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from flashmoe.engines.llama.hosts import llama_cpp as host
from flashmoe.engines.session import Continuation, Session, check_prompt
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace


class LlamaSession(Session):
    """A `Session` of a GGUF file."""

    def __init__(
        self,
        path: Path,
        prompts: Sequence[str],
        *,
        memory: int | str,
        max_new_tokens: int,
        raw: bool,
        policy: str,
        prefetch: bool,
        also: Sequence[Path] = (),
    ) -> None:
        """memory, policy, prefetch, also: see `host.load`.

        Raises FlashMoEError as it does, and for a prompt that the file's own chat template or
        vocabulary cannot take.
        """
        self.max_new_tokens = max_new_tokens
        self.token_ids = _tokens(path, prompts, raw=raw)
        longest = max(map(len, self.token_ids))
        n_ctx = longest + max_new_tokens + 1
        self.model = host.load(
            path,
            memory=memory,
            policy=policy,
            prefetch=prefetch,
            also=also,
            n_ctx=n_ctx,
            verbose=False,
        )
        self.engine = self.model.flashmoe
        self._shows_prompt = raw or not _template(self.model)

    def restore(self, path: Path) -> None:
        self.engine.restore(path)  # type: ignore[attr-defined]

    def generate(self, *, show: bool, count: Callable[[], object]) -> Continuation:
        prompt, answer = self.token_ids[0], []
        text = _Text(self.model, show)
        if self._shows_prompt:
            text.add(prompt)
        for token in self._continue(prompt):
            answer.append(token)
            text.add([token])
            count()
        text.end()
        whole = self.model.detokenize(prompt + answer).decode(errors="replace")
        return Continuation(whole, prompt + answer, len(answer))

    def _continue(self, prompt: list[int]) -> Iterator[int]:
        """Each token after the prompt, until the model ends or enough have come."""
        self.model.reset()
        if not self.max_new_tokens:
            self.model.eval(prompt)
            return
        vocabulary = llama_cpp.llama_model_get_vocab(self.model.model)
        tokens = self.model.generate(prompt, temp=0.0)
        for _ in range(self.max_new_tokens):
            token = next(tokens)
            yield token
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                return

    def record(self, *, probabilities: bool, guesses: bool, info: Mapping[str, Any]) -> Trace:
        if probabilities or guesses:
            raise FlashMoEError(
                "of a GGUF file only the chosen experts are recorded: leave out --probabilities "
                "and --guesses"
            )
        self.engine.record()  # type: ignore[attr-defined]
        for prompt in self.token_ids:
            self.engine.next_sequence()  # type: ignore[attr-defined]
            for _ in self._continue(prompt):
                pass
        trace: Trace = self.engine.trace(**info)  # type: ignore[attr-defined]
        return trace

    def close(self) -> None:
        self.model.close()


class _Text:
    """Tokens as text, printed when whole characters have come."""

    def __init__(self, model: Any, show: bool) -> None:
        self._model, self._show = model, show
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: list[int]) -> None:
        if self._show:
            print(self._decoder.decode(self._model.detokenize(tokens)), end="", flush=True)

    def end(self) -> None:
        if self._show:
            print(self._decoder.decode(b"", final=True))


def _tokens(path: Path, prompts: Sequence[str], *, raw: bool) -> list[list[int]]:
    """Each prompt as the model expects it, by the file's vocabulary; no weight is read.

    Raises FlashMoEError for a file that cannot be loaded and a prompt that cannot be taken.
    """
    try:
        vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False, n_ctx=8)
    except (ValueError, RuntimeError) as error:
        raise FlashMoEError(f"{path}: {error}") from None
    try:
        template = "" if raw else _template(vocabulary)
        special = ("" if i < 0 else _text(vocabulary, i) for i in
                   (vocabulary.token_eos(), vocabulary.token_bos()))  # fmt: skip
        chat = Jinja2ChatFormatter(template, *special) if template else None
        return [_encode(path, vocabulary, chat, prompt) for prompt in prompts]
    finally:
        vocabulary.close()


def _encode(path: Path, vocabulary: Any, chat: Any, prompt: str) -> list[int]:
    check_prompt(prompt)
    if chat:
        try:
            prompt = chat(messages=[{"role": "user", "content": prompt}]).prompt
        except Exception as error:  # whatever a template does
            raise FlashMoEError(
                f"{path}: its chat template cannot take the prompt ({error}): leave it out by --raw"
            ) from None
    tokens: list[int] = vocabulary.tokenize(
        prompt.encode(), add_bos=chat is None, special=chat is not None
    )
    return tokens


def _template(model: Any) -> str:
    return str(model.metadata.get("tokenizer.chat_template", ""))


def _text(model: Any, token: int) -> str:
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    return llama_cpp.llama_vocab_get_text(vocabulary, token).decode(errors="replace")
