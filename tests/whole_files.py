"""What every writer of a file keeps to; each folder's tests give the writers that it can import."""

from __future__ import annotations

import os
import stat

import pytest

from flashmoe.errors import FlashMoEError


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
