"""Every file that FlashMoE writes: whole or not at all, through no link, with nothing left over."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest

from flashmoe.disk import files, plain_npz
from flashmoe.errors import FlashMoEError
from flashmoe.policies.parts import policy_file
from flashmoe.store.manifest import FILE_NAME, Manifest
from flashmoe.trace import Trace

TRACE = Trace(np.zeros((1, 1, 1), np.uint8), np.zeros(1, np.int32), 1)
WRITERS = {
    "t.bin": lambda path: files.replace(path, lambda file: file.write(b"new")),
    "t.npz": lambda path: plain_npz.write(path, {"a": np.arange(3)}),
    "r.npz": lambda path: TRACE.save(path),
    "r.json": lambda path: TRACE.save(path.with_suffix(".npz")),
    "p.safetensors": lambda path: policy_file.save(path, "k", {"a": np.zeros(2, np.float32)}, {}),
    FILE_NAME: lambda path: Manifest("a", "b", 1, "c", "d", 1, ()).save(path.parent),
}


@pytest.fixture(params=list(WRITERS))
def writing(request, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    return WRITERS[request.param], folder / request.param


def test_a_link_is_replaced_and_what_it_named_stays(writing, tmp_path):
    write, path = writing
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    for suffix in (".partial", ".partial.npz", ".partial.json", f".{os.getpid()}.partial"):
        path.with_name(path.name + suffix).symlink_to(victim)
    write(path)
    assert victim.read_text() == "precious"
    assert path.is_file() and not path.is_symlink()


def test_a_failing_write_leaves_the_old_file_and_nothing_else(writing, monkeypatch):
    write, path = writing
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FlashMoEError, match=r"cannot be written \(No space left on device\)"):
        write(path)
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_writer_that_stops_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def stops(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, stops)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_durable_before_it_has_its_name_and_has_usual_permissions(writing, monkeypatch):
    write, path = writing
    steps, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def named(source, target) -> None:
        steps.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    write(path)
    assert steps == ["file", "name", "directory"] * (len(steps) // 3)
    (path.parent / "plain").touch()
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "complaint"), [("none/f", "does not exist"), ("", "is a directory")]
)
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, name, complaint):
    with pytest.raises(FlashMoEError, match=complaint):
        files.check_replaceable(tmp_path / name)
    with pytest.raises(FlashMoEError, match="cannot be written"):
        files.replace(tmp_path / name, lambda file: file.write(b""))
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
