"""Loads models by `flashmoe.load` in a process of its own: `python llama_loader.py CASE MODEL`.

Prints a JSON object. A process, since llama.cpp's libraries of two packages share their names.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import flashmoe
from flashmoe.reading.pread import read_through

PROMPT = "hello world, this is a prompt. " * 8
OPTIONS = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


def tokens_of(model: Any, package: str = "llama_cpp") -> list[int]:
    if package == "ik_llama_cpp":
        return model.generate(model.tokenize(PROMPT), max_tokens=12)
    model.reset()
    made = model.generate(model.tokenize(PROMPT.encode()), temp=0)
    return [token for token, _ in zip(made, range(12), strict=False)]


def load(path: Path, share: float = 0.5, **options: Any) -> Any:
    memory = int(path.stat().st_size * share)
    return flashmoe.load(path, memory=memory, policy="lru", **(OPTIONS | options))


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except flashmoe.FlashMoEError as error:
        return str(error)
    return ""


def plain_tokens(path: Path) -> list[int]:
    import llama_cpp

    model = llama_cpp.Llama(str(path), **OPTIONS)
    try:
        return tokens_of(model)
    finally:
        model.close()


def tokens(path: Path) -> dict[str, Any]:
    """At several budgets, one model after the other; the budget changes while one is loaded."""
    import llama_cpp

    result: dict[str, Any] = {"plain": plain_tokens(path), "made": [], "slots": []}
    for share in (0.4, 0.6, 2.0):
        model = load(path, share)
        assert isinstance(model, llama_cpp.Llama)
        result["slots"].append(model.flashmoe.stats()["slots_per_layer"])
        result["made"].append(tokens_of(model))
        stats = model.flashmoe.snapshot()
        assert stats.requests > stats.hits > 0
        assert stats.resident_bytes <= path.stat().st_size * share
        model.flashmoe.resize(path.stat().st_size // 2)
        result["made"].append(tokens_of(model))
        model.flashmoe.reset()
        result["made"].append(tokens_of(model))
        assert str(path) not in Path("/proc/self/maps").read_text()
        model.close()
    result["made"].append(plain_tokens(path))  # nothing of ours is left
    return result


def endings(path: Path) -> dict[str, Any]:
    """Closed in either order, dropped, and left open at the exit."""
    result: dict[str, Any] = {}
    model = load(path)
    expected = tokens_of(model)
    result["second"] = refusal(load, path)
    model.flashmoe.close()
    result["engine closed"] = refusal(tokens_of, model)
    model.close()
    result["closed"] = refusal(model.eval, [1])
    model = load(path)
    model.close()
    model.flashmoe.close()
    model = load(path)
    model.itself = model
    del model
    gc.collect()
    last = load(path)
    result["same"] = tokens_of(last) == expected
    result["pickled"] = refusal(pickle.dumps, last)
    globals()["last"] = last
    return result


def refusals(path: Path) -> dict[str, Any]:
    result = {
        "mapped": refusal(load, path, use_mmap=False),
        "lora": refusal(load, path, lora_path="x"),
        "unknown": refusal(load, path, device="cuda"),
        "package": refusal(load, path, package="other"),
        "small": refusal(load, path, 0.01),
        "smaller": refusal(load, path, 0.145),
        "context": refusal(load, path, type_v=2),  # which needs flash attention
    }
    damaged = path.with_name("damaged.gguf")
    damaged.write_bytes(path.read_bytes()[:3_000_000])
    result["cut"] = refusal(load, damaged, 1.0)
    result["none"] = refusal(flashmoe.load, path.with_name("none.gguf"), memory="1GiB")
    result["after"] = tokens_of(load(path))
    return result


def automatic(path: Path) -> dict[str, Any]:
    """All but what the model is still to touch: its scores, if it keeps those of all tokens."""
    from flashmoe.memory import free_memory

    free_memory.available_bytes = lambda: 1 << 30
    made = {}
    for name, options in (("last", {}), ("all", {"logits_all": True})):
        model = flashmoe.load(path, memory="auto", **(OPTIONS | options))
        made[name] = [model.flashmoe.snapshot().memory_bytes, model.scores.nbytes]
        model.close()
    return made


def failure(path: Path) -> dict[str, Any]:
    """A read fails; the model goes on."""
    model = load(path, 0.5)
    read, broken = os.preadv, [True]

    def preadv(*arguments: Any) -> int:
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    os.preadv = preadv
    read_through(preadv)
    said = refusal(tokens_of, model)
    broken.clear()
    return {"said": said, "made": tokens_of(model), "plain": plain_tokens_of_another(path, model)}


def plain_tokens_of_another(path: Path, model: Any) -> list[int]:
    model.close()
    return plain_tokens(path)


def ik(path: Path) -> dict[str, Any]:
    import ik_llama_cpp

    options = {"n_ctx": 1024, "n_threads": 1}
    made = []
    for _ in range(2):
        model = flashmoe.load(
            path, memory=path.stat().st_size * 3 // 4, policy="lru", package="ik_llama_cpp",
            **options,
        )  # fmt: skip
        made.append(tokens_of(model, "ik_llama_cpp"))
        assert model.flashmoe.snapshot().hits > 0
        model.flashmoe.close()
        closed = refusal(tokens_of, model, "ik_llama_cpp")
        model.close()
    plain = ik_llama_cpp.IkLlama(str(path), **options)
    return {"made": made, "plain": tokens_of(plain, "ik_llama_cpp"), "engine closed": closed}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))), flush=True)
