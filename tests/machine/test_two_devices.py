"""A store on two block devices: both are read, and one may fail in the midst of it."""

from __future__ import annotations

import shutil

import pytest
from tiny import budget, generate, prompt

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from harness.runs.loop_drives import loop_drives

DRIVE_BYTES = 128 << 20


@pytest.fixture
def drives(tmp_path):
    """Two devices, each with a file system; needs root."""
    if shutil.disk_usage(tmp_path).free < 3 * DRIVE_BYTES:
        pytest.skip("there is no room for two devices")
    made = loop_drives(tmp_path, 2, DRIVE_BYTES)
    try:
        two = made.__enter__()
    except FlashMoEError as error:
        pytest.skip(str(error))
    yield two
    made.__exit__(None, None, None)


def tokens(store) -> tuple[list[int], dict]:
    model = flashmoe.load(store, memory=budget(store, 2), policy="lru")
    try:
        return generate(model, prompt(5), 8), model.flashmoe.stats()
    finally:
        model.flashmoe.close()


@pytest.mark.parametrize("stripe", [False, True])
def test_the_devices_own_counts_say_that_both_are_read(checkpoints, stores, drives, stripe):
    folders = [drive.folder / "store" for drive in drives]
    pack(checkpoints(), folders[0], also=folders[1:], stripe=stripe)
    before = [drive.read_bytes() for drive in drives]
    output, stats = tokens(folders[0])
    assert output == tokens(stores())[0]
    reads = [drive.read_bytes() - b for drive, b in zip(drives, before, strict=True)]
    # the first device has the rest of the model too, and what the file system reads of itself
    for read_bytes, own_count in zip(reads, stats["bytes_by_drive"], strict=True):
        assert read_bytes >= own_count > 0.1 * stats["bytes_read"]


def test_a_device_that_fails_in_the_midst_leaves_a_mirrored_store_working(
    checkpoints, stores, drives, caplog
):
    folders = [drive.folder / "store" for drive in drives]
    pack(checkpoints(), folders[0], also=folders[1:])
    expected = tokens(stores())[0]
    model = flashmoe.load(folders[0], memory=budget(folders[0], 2), policy="lru")
    try:
        assert generate(model, prompt(5), 8) == expected
        drives[1].lose()
        assert generate(model, prompt(5), 8) == expected
    finally:
        model.flashmoe.close()
    said = [record.getMessage() for record in caplog.records if str(folders[1]) in record.message]
    assert len(said) == 2
    assert "a read failed ([Errno 5] Input/output error)" in said[0]


def test_a_device_that_fails_ends_a_striped_store_by_a_sentence(checkpoints, drives):
    folders = [drive.folder / "store" for drive in drives]
    pack(checkpoints(), folders[0], also=folders[1:], stripe=True)
    model = flashmoe.load(folders[0], memory=budget(folders[0], 2), policy="lru")
    try:
        drives[1].lose()
        with pytest.raises(FlashMoEError, match=rf"the read failed .*{folders[1]}"):
            generate(model, prompt(5), 8)
    finally:
        model.flashmoe.close()
