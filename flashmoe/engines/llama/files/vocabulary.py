"""A vocabulary with a token for each byte, so that a server can talk."""

from __future__ import annotations

import gguf


def add_to(writer: gguf.GGUFWriter, size: int) -> None:
    """Describe `size` tokens; a prompt names those beyond the bytes as <|1000|>.

    GPT-2's way of naming bytes: printable ones stand for themselves, others for 256 and on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    tokens = [names[byte] for byte in range(256)][:size]
    tokens += [f"<|{number}|>" for number in range(len(tokens), size)]
    normal, named = gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([normal if number < 256 else named for number in range(size)])
    writer.add_token_merges([f"{names[101]} {names[32]}"])  # llama.cpp wants at least one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)
