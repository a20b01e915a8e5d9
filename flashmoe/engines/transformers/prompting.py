"""Turns prompts into token ids by a model directory's tokenizer, and never runs code of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from flashmoe.engines.session import check_prompt
from flashmoe.engines.transformers.checkpoints import backends
from flashmoe.engines.transformers.model import empty_model
from flashmoe.errors import FlashMoEError

# Patterns of the files that a tokenizer is loaded from.
_FILES = ("tokenizer*.json", "*.model", "*.tiktoken", "tekken*.json", "vocab*", "merges.txt",
          "added_tokens.json", "special_tokens_map.json", "chat_template*")  # fmt: skip
# Those of them that hold settings but no vocabulary.
_NO_VOCABULARY = {"tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
                  "chat_template.jinja", "chat_template.json"}  # fmt: skip
# Modules that transformers may need to read a vocabulary -> the packages that have them.
_LIBRARIES = {
    "google.protobuf": "protobuf",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
}
_LONGEST_REASON = 300  # characters of another library's message that are quoted


class Prompter:
    """Turns prompts into token ids as the model expects them, and its tokens into text.

    directory: a Hugging Face directory, or a store.
    raw: continue a prompt as it stands. By default a model that has a chat template (an instruct
        model) sees it as the first message of a chat, and is asked for the answer.
    Raises FlashMoEError when the directory has no model's configuration, or no tokenizer that can
    be loaded without running code of the checkpoint.
    """

    def __init__(self, directory: Path, *, raw: bool = False) -> None:
        backends.backend_for(directory)
        config = empty_model.read_config(directory)
        self.directory = directory
        self.vocabulary_size = getattr(config.get_text_config(), "vocab_size", None)
        self.tokenizer = _load_tokenizer(directory)
        self.chats = not raw and bool(getattr(self.tokenizer, "chat_template", None))

    def token_ids(self, prompt: str) -> torch.Tensor:
        """The token ids of one prompt: int64 [tokens], at least one token.

        Each is below the model's vocabulary size.

        Raises FlashMoEError for an empty prompt, one that is no valid text or that the tokenizer
        or its chat template cannot take, and for a tokenizer of another model.
        """
        check_prompt(prompt)
        text = self._as_chat(prompt) if self.chats else prompt
        with _refusing(lambda why: f"{self.directory}: its tokenizer cannot encode ({why})"):
            # a chat template writes the special tokens itself
            encoding = self.tokenizer(text, add_special_tokens=not self.chats)
            ids = torch.tensor(encoding["input_ids"], dtype=torch.int64)
        if not ids.numel():
            raise FlashMoEError(
                f"{self.directory}: its tokenizer makes no token of the prompt: give another one"
            )
        if self.vocabulary_size and int(ids.max()) >= self.vocabulary_size:
            raise FlashMoEError(
                f"{self.directory}: its tokenizer gives the token {int(ids.max())}, but the model "
                f"knows {self.vocabulary_size} (0..{self.vocabulary_size - 1}), so it is another "
                "model's: copy the tokenizer's files from where the weights came from"
            )
        return ids

    def decode(self, token_ids: Any, **options: Any) -> str:
        """The text of token ids, with the tokenizer's own options; a streamer calls this too.

        Raises FlashMoEError when the tokenizer cannot decode them.
        """
        with _refusing(lambda why: f"{self.directory}: its tokenizer cannot decode ({why})"):
            return str(self.tokenizer.decode(token_ids, **options))

    def streamer(self) -> transformers.TextStreamer:
        """Prints the text of a model's tokens as they come; of a chat, the answer only."""
        return transformers.TextStreamer(
            self, skip_prompt=self.chats, skip_special_tokens=self.chats
        )

    def _as_chat(self, prompt: str) -> str:
        """The chat as the template writes it, up to where the answer begins."""

        def refusal(why: str) -> str:
            return (
                f"{self.directory}: its chat template cannot take the prompt ({why}): "
                "mend the template, or go without it by --raw"
            )

        failures = []
        for content in (_as_text, _as_parts):
            try:
                with _refusing(refusal):
                    text = self._render(content(prompt))
                    if text == self._render(content(prompt + "x")):
                        raise ValueError("it leaves the prompt out")
                return text
            except FlashMoEError as failure:
                failures.append(failure)
        raise failures[0]

    def _render(self, content: object) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text


def _as_text(prompt: str) -> object:
    """The content of a message as most templates take it."""
    return prompt


def _as_parts(prompt: str) -> object:
    """The content of a message as the templates of some multimodal models take it."""
    return [{"type": "text", "text": prompt}]


def _load_tokenizer(directory: Path) -> Any:
    """Raises FlashMoEError where there is none, or none that transformers reads without code."""
    with _refusing(lambda why: _no_tokenizer(directory, why)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        words = len(tokenizer.get_vocab().keys() - special)
    if words < 2:  # where it finds no vocabulary, transformers makes one of special tokens
        raise FlashMoEError(_no_tokenizer(directory, "they hold no vocabulary"))
    return tokenizer


def _no_tokenizer(directory: Path, why: str) -> str:
    """The sentence for a directory without a usable tokenizer: what is there, and what to do."""
    paths = {path for pattern in _FILES for path in directory.glob(pattern) if path.is_file()}
    names = sorted(path.name for path in paths)
    # a tokenizer.json can be read without code of the checkpoint and without other libraries
    needs_more = "tokenizer.json" not in names
    if needs_more and (code := _tokenizer_code(directory)):
        return (
            f"{directory}: its tokenizer is code of the checkpoint's own ({code}), which is never "
            "run; add the tokenizer.json that `save_pretrained` writes where that code may run"
        )
    if not set(names) - _NO_VOCABULARY:
        return (
            f"{directory} holds no tokenizer; copy its files (tokenizer.json, "
            "tokenizer_config.json) there from where the weights came"
        )
    missing = [name for module, name in _LIBRARIES.items() if not _is_installed(module)]
    libraries_read = any(name.endswith((".model", ".tiktoken")) for name in names)
    if needs_more and libraries_read and missing:
        remedy = f"`pip install {' '.join(missing)}` to read what is there, or add a tokenizer.json"
    else:
        remedy = "copy them anew from where the weights came"
    return f"{directory}: no tokenizer can be loaded from {', '.join(names)} ({why}); {remedy}"


def _tokenizer_code(directory: Path) -> str:
    """The name of the tokenizer class that the checkpoint brings as code; "" for none."""
    with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
        classes = config["auto_map"]
        classes = classes["AutoTokenizer"] if isinstance(classes, dict) else classes
        classes = [classes] if isinstance(classes, str) else classes
        return next(name for name in [*reversed(classes), ""] if isinstance(name, str))
    return ""


def _is_installed(module: str) -> bool:
    with suppress(ModuleNotFoundError):  # raised where the module's package is missing
        return find_spec(module) is not None
    return False


@contextmanager
def _refusing(sentence: Callable[[str], str]) -> Iterator[None]:
    """Any error raised within becomes a FlashMoEError: `sentence` of its message's first line."""
    try:
        yield
    except (FlashMoEError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust is no Exception
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FlashMoEError(sentence(lines[0][:_LONGEST_REASON].rstrip(" :"))) from None
