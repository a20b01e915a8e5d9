"""Drives that are there and cannot be read: the other copy is used, or one sentence says which."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from tiny import budget, generate, prompt

import flashmoe
from flashmoe.engines.llama.model_file import ModelFile
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.reading.verify import verify
from flashmoe.store import manifest as manifests


@pytest.fixture
def pair(checkpoints, tmp_path):
    """A store and its mirror."""
    store, other = tmp_path / "store", tmp_path / "other"
    pack(checkpoints(), store, also=[other])
    return store, other


@contextmanager
def unreadable(folder: Path, kind: str = "error"):
    """Its files have their names and sizes, and reads fail, or bring nothing."""
    read = os.preadv

    def preadv(descriptor, buffers, offset):
        place = Path(f"/proc/self/fd/{descriptor}").readlink().parent
        if place == folder.resolve():
            if kind == "end":
                return 0
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, offset)

    with patch.object(os, "preadv", preadv):
        yield


def tokens(store: Path, **options) -> list[int]:
    model = flashmoe.load(store, memory=budget(store, 2), policy="lru", **options)
    try:
        return generate(model, prompt(5), 4)
    finally:
        model.flashmoe.close()


@pytest.mark.parametrize("which", [0, 1])
def test_a_new_load_reads_the_copy_that_can_be_read(pair, stores, caplog, which):
    with unreadable(pair[which]):
        assert tokens(pair[1 - which]) == tokens(stores())
    assert f"{pair[which] / manifests.load(pair[0]).experts_file} cannot be read" in caplog.text
    assert "its copy is left out" in caplog.text


def test_a_copy_that_is_asked_for_must_be_readable(pair, own_store):
    with unreadable(pair[1]), pytest.raises(FlashMoEError, match=rf"{pair[1]}/experts.* cannot be"):
        tokens(pair[0], also=[pair[1]])
    with unreadable(own_store), pytest.raises(FlashMoEError, match=rf"{own_store}/experts"):
        tokens(own_store)


def test_verify_looks_at_what_a_mirror_needs_to_be_loaded_alone(pair):
    assert verify(pair[0]).n_copies == 2
    os.truncate(pair[1] / manifests.load(pair[1]).dense_file, 100)
    with pytest.raises(FlashMoEError, match=rf"{pair[1]}: dense-.* has 100 bytes"):
        verify(pair[0])


def test_a_folder_with_another_model_is_left_alone(checkpoints, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "mixtral"}')
    (other / ".notes.partial").write_text("mine")
    for folders in ((tmp_path / "store", [other]), (other, [])):
        with pytest.raises(FlashMoEError, match=rf"{other} is a folder of another model"):
            pack(checkpoints(), folders[0], also=folders[1])
    assert {path.name for path in other.iterdir()} == {"config.json", ".notes.partial"}


def test_a_pack_removes_only_partial_files_of_its_own(checkpoints, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for name in (".notes.partial", ".0123456789abcdef.partial"):
        (store / name).write_text("text")
    pack(checkpoints(), store)
    assert [path.name for path in store.glob(".*.partial")] == [".notes.partial"]


@pytest.mark.parametrize(("kind", "why"), [("error", "cannot be read"), ("end", "cut short")])
def test_a_model_file_that_cannot_be_read_is_one_sentence(tmp_path, kind, why):
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(100_000))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with unreadable(tmp_path, kind), pytest.raises(FlashMoEError, match=rf"m\.gguf .*{why}"):
        ModelFile(path, ())
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
