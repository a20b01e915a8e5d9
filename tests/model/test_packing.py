"""Packing into a directory that holds a store: replaced whole, or left as it was."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest
import transformers

from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.reading.verify import verify
from flashmoe.store import manifest


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_the_previous_store_usable(checkpoints, own_store, monkeypatch, call):
    before = sorted(path.name for path in own_store.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(FlashMoEError, match="No space left"):
            pack(checkpoints(), own_store)
    verify(own_store)
    assert sorted(path.name for path in own_store.iterdir()) == before


def test_packing_again_replaces_and_cleans_up(checkpoints, own_store):
    first = manifest.load(own_store)
    second = pack(checkpoints(), own_store)
    assert first.experts_file != second.experts_file
    assert not (own_store / first.experts_file).exists()
    assert verify(own_store).manifest.layers == first.layers


def test_a_store_is_not_overwritten_by_another_model(checkpoints, own_store):
    before = manifest.load(own_store)
    with pytest.raises(FlashMoEError, match="a store of another model than"):
        pack(checkpoints("mixtral"), own_store)
    assert verify(own_store).manifest == before


def test_two_packs_into_one_directory_do_not_meet(checkpoints, own_store):
    with open(own_store / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FlashMoEError, match="under way"):
            pack(checkpoints(), own_store)
    verify(own_store)


def test_a_dense_model_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(FlashMoEError, match="Mixture-of-Experts models only"):
        pack(tmp_path / "llama", tmp_path / "store")
