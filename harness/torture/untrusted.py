"""The files that FlashMoE reads and that may come from anywhere: a valid one of each to damage.

Whatever becomes of it, the reader accepts it or raises FlashMoEError; nothing else gets out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

import flashmoe
from flashmoe import policies, trace
from flashmoe.disk.shards import Shard
from flashmoe.engines.transformers.checkpoints.checkpoint import Checkpoint
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.checkpoints.weight_files import INDEX_NAME
from flashmoe.engines.transformers.prompting import Prompter
from flashmoe.errors import FlashMoEError
from flashmoe.policies import learned
from flashmoe.policies.base import Scope
from flashmoe.store import manifest as manifests
from flashmoe.trace import Trace
from harness import tiny_models


class Input(NamedTuple):
    """A kind of file: makes a valid one in a folder and returns its path; reads what is there."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def _checkpoint(folder: Path) -> Path:
    tiny_models.make("olmoe").save_pretrained(folder / "checkpoint", max_shard_size="100KB")
    return folder / "checkpoint" / INDEX_NAME


def _read_checkpoint(index: Path) -> None:
    with Checkpoint(index.parent) as checkpoint:
        name = next(iter(checkpoint.experts))
        checkpoint.expert(name, 0)


def _store(folder: Path) -> Path:
    tiny_models.make("olmoe").save_pretrained(folder / "plain")
    pack(folder / "plain", folder / "store")
    return folder / "store" / manifests.FILE_NAME


def _trace(folder: Path) -> Path:
    every = np.tile(np.arange(8, dtype=np.uint8), (12, 2, 1))
    experts = np.random.default_rng(0).permuted(every, axis=2)
    recorded = Trace(experts[..., :2], np.repeat(np.arange(3, dtype=np.int32), 4), 8)
    recorded.save(folder / "trace.npz")
    return folder / "trace.npz"


def _description(folder: Path) -> Path:
    return _trace(folder).with_suffix(".json")


def _policy(folder: Path) -> Path:
    shipped = Path(flashmoe.__file__).parent / "policies" / "learned.safetensors"
    return Path(shutil.copy(shipped, folder / "policy.safetensors"))


def _read_policy(path: Path) -> None:
    learned.load.cache_clear()
    policies.get(f"learned:{path}")(Scope(8, 2), 4)


def _shard(folder: Path) -> Path:
    tensors = {"a": torch.arange(24.0).view(2, 3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def _read_shard(path: Path) -> None:
    shard = Shard(path)
    try:
        for name in shard.tensors:
            shard.read(name)
    finally:
        shard.close()


def _tokenizer(folder: Path) -> Path:
    """The demo model's, but for its merges and what they make: a token a byte."""
    source = flashmoe.demo_path()
    shutil.copy(source / "config.json", folder)
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {t: n for t, n in vocabulary.items() if len(t) == 1}
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


def _read_tokenizer(path: Path) -> None:
    prompter = Prompter(path.parent)
    prompter.decode(prompter.token_ids("In the beginning"))


INPUTS = {
    "manifest": Input(_store, lambda path: manifests.load(path.parent)),
    "checkpoint index": Input(_checkpoint, _read_checkpoint),
    "safetensors": Input(_shard, _read_shard),
    "trace": Input(_trace, trace.load),
    "trace description": Input(_description, lambda path: trace.load(path.with_suffix(".npz"))),
    "policy": Input(_policy, _read_policy),
    "tokenizer": Input(_tokenizer, _read_tokenizer),
    "tokenizer settings": Input(
        lambda folder: _tokenizer(folder).with_name("tokenizer_config.json"), _read_tokenizer
    ),
}


def survives(what: Input, path: Path, content: bytes) -> bool:
    """Put `content` at `path` and read it: accepted? Anything but FlashMoEError gets out."""
    path.write_bytes(content)
    try:
        what.read(path)
    except FlashMoEError:
        return False
    return True
