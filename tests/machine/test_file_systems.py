"""File systems that cannot do what ext4 does, and limits on open files: it works, or says so."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
from tiny import budget, generate, prompt

import flashmoe
from flashmoe.disk import direct_io
from flashmoe.engines.transformers.checkpoints import synth
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.reading.verify import verify
from flashmoe.store import manifest


def refuse(code: int):
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_store_is_packed_where_no_room_can_be_reserved(checkpoints, tmp_path, monkeypatch, code):
    """glibc writes a byte a block in place of it, which O_DIRECT refuses; musl does not."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: refuse(code))
    pack(checkpoints(), tmp_path / "store")
    verify(tmp_path / "store")


def test_a_store_is_packed_where_direct_writes_are_refused(checkpoints, tmp_path, monkeypatch):
    write, refused = os.pwrite, []

    def buffered_only(descriptor, data, offset):
        if direct_io._direct_flag(descriptor):
            refused.append(descriptor)
            refuse(errno.EINVAL)
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", buffered_only)
    pack(checkpoints(), tmp_path / "store")
    assert len(refused) == 1
    verify(tmp_path / "store")


def test_a_store_is_packed_where_a_refused_file_is_left_behind(checkpoints, tmp_path, monkeypatch):
    """Some file systems have made the file when they find that it cannot be direct."""
    real = os.open

    def refusing(path, flags, *rest, **more):
        descriptor = real(path, flags & ~os.O_DIRECT, *rest, **more)
        if flags & os.O_DIRECT:
            os.close(descriptor)
            refuse(errno.EINVAL)
        return descriptor

    monkeypatch.setattr(os, "open", refusing)
    pack(checkpoints(), tmp_path / "store")
    verify(tmp_path / "store")


def test_a_store_is_packed_where_directories_cannot_be_synced(checkpoints, tmp_path, monkeypatch):
    sync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse(errno.EINVAL)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    pack(checkpoints(), tmp_path / "store")
    verify(tmp_path / "store")


def test_where_nothing_may_be_written_packing_says_so(checkpoints, tmp_path, monkeypatch):
    checkpoint = checkpoints()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: refuse(errno.EROFS))
    with pytest.raises(FlashMoEError, match=r"packing stopped \(Read-only file system\)"):
        pack(checkpoint, tmp_path / "store")
    with pytest.raises(FlashMoEError, match=r"writing stopped \(Read-only file system\)"):
        synth.synthesise("olmoe-quarter", tmp_path / "model")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("kind", ["store", "checkpoint"])
def test_no_more_open_files_is_not_no_direct_io(
    checkpoints, stores, monkeypatch, caplog, code, kind
):
    path, real = stores() if kind == "store" else checkpoints(), os.open

    def full(file, flags, *rest, **more):
        return refuse(code) if flags & os.O_DIRECT else real(file, flags, *rest, **more)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(FlashMoEError, match=r"cannot be opened: too many files.*`ulimit -n`"):
        flashmoe.load(path, memory="1MiB", policy="lru")
    assert "direct I/O" not in caplog.text


@pytest.mark.parametrize("kind", ["store", "checkpoint"])
def test_a_soft_limit_on_open_files_is_raised_when_it_is_met(checkpoints, stores, kind):
    path = stores() if kind == "store" else checkpoints()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    expected = flashmoe.load(path, memory="1MiB", policy="lru")
    tokens = generate(expected, prompt(5), 4)
    expected.flashmoe.close()
    spare = os.dup(0)  # the lowest number that is free
    os.close(spare)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 2, hard))
        model = flashmoe.load(path, memory="1MiB", policy="lru")
        assert model.flashmoe.stats()["direct_io"] == direct_io_works(path)
        assert generate(model, prompt(5), 4) == tokens
        model.flashmoe.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def direct_io_works(path: Path) -> bool:
    file = next(file for file in path.iterdir() if file.suffix in (".bin", ".safetensors"))
    descriptor, direct = direct_io.open_direct(file, os.O_RDONLY)
    os.close(descriptor)
    return direct


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("kind", ["store", "checkpoint"])
def test_files_that_cannot_be_opened_are_named(checkpoints, stores, monkeypatch, code, kind):
    path, real = stores() if kind == "store" else checkpoints(), os.open

    def failing(file, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code), str(file))
        return real(file, flags, *rest, **more)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(FlashMoEError, match=rf"{path}/.*cannot be read \({os.strerror(code)}\)"):
        flashmoe.load(path, memory=budget(stores(), 3), policy="lru")


def test_a_directory_that_may_not_be_looked_into_is_named(checkpoints, tmp_path, monkeypatch):
    private, checkpoint = tmp_path / "private", checkpoints()
    private.mkdir()

    def closed(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    monkeypatch.setattr(manifest, "is_store", closed)
    refused = rf"{private} cannot be read \(Permission denied\)"
    with pytest.raises(FlashMoEError, match=refused):
        pack(checkpoint, private)
    with pytest.raises(FlashMoEError, match=refused):
        synth.synthesise("olmoe-quarter", private)
    with pytest.raises(FlashMoEError, match=refused):
        flashmoe.load(private, memory="1MiB")
