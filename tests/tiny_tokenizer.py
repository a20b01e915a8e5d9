"""A tokenizer of the tiny models' 128 tokens: one a character of ASCII, `<s>` before a prompt."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ["<pad>", "<s>", "</s>"]
CHAT = "{{ bos_token }}[{{ messages[0]['content'] }}]{% if add_generation_prompt %}>{% endif %}"


def ids_of(text: str) -> list[int]:
    """What it makes of printable text without special tokens."""
    return [ord(character) - ord(" ") + len(SPECIAL) for character in text]


def give(folder: Path, **config: object) -> Path:
    """Write it beside a model's weights, with these settings in tokenizer_config.json."""
    characters = [*SPECIAL, *map(chr, range(ord(" "), 127))]
    vocabulary = {token: number for number, token in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
