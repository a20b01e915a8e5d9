"""Every file that FlashMoE writes: whole or not at all, through no link, with nothing left over."""

from __future__ import annotations

import numpy as np
import pytest
from whole_files import (  # noqa: F401 - they are this module's tests too
    test_a_failing_write_leaves_the_old_file_and_nothing_else,
    test_a_file_is_durable_before_it_has_its_name_and_has_usual_permissions,
    test_a_link_is_replaced_and_what_it_named_stays,
)

from flashmoe.disk import files, plain_npz
from flashmoe.errors import FlashMoEError
from flashmoe.policies.parts import policy_file
from flashmoe.trace import Trace

TRACE = Trace(np.zeros((1, 1, 1), np.uint8), np.zeros(1, np.int32), 1)
WRITERS = {
    "t.bin": lambda path: files.replace(path, lambda file: file.write(b"new")),
    "t.npz": lambda path: plain_npz.write(path, {"a": np.arange(3)}),
    "r.npz": lambda path: TRACE.save(path),
    "r.json": lambda path: TRACE.save(path.with_suffix(".npz")),
    "p.safetensors": lambda path: policy_file.save(path, "k", {"a": np.zeros(2, np.float32)}, {}),
}


@pytest.fixture(params=list(WRITERS))
def writing(request, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    return WRITERS[request.param], folder / request.param


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


@pytest.mark.parametrize(
    ("name", "complaint"), [("none/f", "does not exist"), ("", "is a directory")]
)
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, name, complaint):
    with pytest.raises(FlashMoEError, match=complaint):
        files.check_replaceable(tmp_path / name)
    with pytest.raises(FlashMoEError, match="cannot be written"):
        files.replace(tmp_path / name, lambda file: file.write(b""))
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
