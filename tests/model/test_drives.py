"""A store on several drives: every byte comes once and right, whatever drive fails."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import budget, generate, prompt

import flashmoe
from flashmoe.disk.direct_io import ALIGNMENT_BYTES, aligned_memory
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.reading import reader as reading
from flashmoe.reading.drives import MOST_ERRORS
from flashmoe.reading.packed import PackedExperts
from flashmoe.reading.reader import ExtentReader
from flashmoe.reading.verify import verify
from flashmoe.store import manifest as manifests
from flashmoe.store.manifest import Manifest, lay_out
from flashmoe.store.shares import Shares, parts


@pytest.fixture
def pair(checkpoints, tmp_path):
    """A store on two drives, mirrored or striped: the store's folder and the other one."""

    def get(*, stripe: bool) -> tuple[Path, Path]:
        store, other = tmp_path / "store", tmp_path / "other"
        pack(checkpoints(), store, also=[other], stripe=stripe)
        return store, other

    return get


@contextmanager
def failing(folder: Path, kind: str = "error"):
    """Reads of files in `folder` fail, or bring wrong bytes; gives counts by folder."""
    read, counts = os.preadv, Counter()

    def preadv(descriptor, buffers, offset):
        place = Path(f"/proc/self/fd/{descriptor}").readlink().parent
        counts[place] += 1
        if place != folder:
            return read(descriptor, buffers, offset)
        if kind == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if kind == "end":
            return 0
        count = read(descriptor, buffers, offset)
        memoryview(buffers[0]).cast("B")[count // 2] ^= 1
        return count

    with patch.object(os, "preadv", preadv):
        yield counts


def tokens(store: Path, **options) -> tuple[list[int], dict]:
    model = flashmoe.load(store, memory=budget(store, 2), policy="lru", **options)
    try:
        return generate(model, prompt(5), 6), model.flashmoe.stats()
    finally:
        model.flashmoe.close()


@given(st.integers(0, 40 * ALIGNMENT_BYTES), st.integers(1, 7))
def test_an_extents_parts_hold_each_byte_once(extent_bytes, count):
    ranges = parts(extent_bytes, count)
    assert len(ranges) == count
    assert [n for start, end in ranges for n in (start, end)][1:-1:2] == [s for s, _ in ranges[1:]]
    assert ranges[0][0] == 0 and ranges[-1][1] == extent_bytes
    assert all(start % ALIGNMENT_BYTES == 0 or start == extent_bytes for start, _ in ranges)


def layers_of(extents: list[tuple[int, int]]) -> list:
    layers, end = [], 0
    for number, (blocks, n_experts) in enumerate(extents):
        layer = lay_out(f"{number}", n_experts, end, [("w", "uint8", (blocks * ALIGNMENT_BYTES,))])
        layers, end = [*layers, layer], layer.end_bytes
    return layers


extents_of_layers = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=3
)


@given(extents_of_layers, st.integers(1, 5), st.data())
def test_shares_hold_each_byte_of_each_extent_once(extents, count, data):
    layers = layers_of(extents)
    shares = Shares(layers, count)
    taken = [bytearray(shares.file_bytes(share)) for share in range(count)]
    assert sum(map(len, taken)) == layers[-1].end_bytes
    for number, layer in enumerate(layers):
        cut = data.draw(st.integers(0, layer.extent_bytes))
        for expert in range(layer.n_experts):
            position = 0
            for piece in ((0, cut), (cut, layer.extent_bytes)):
                for share, offset, start, end in shares.ranges(number, expert, *piece):
                    assert start == position
                    position = end
                    for at in range(offset, offset + end - start, ALIGNMENT_BYTES):
                        assert not taken[share][at]
                        taken[share][at] = 1
            assert position == layer.extent_bytes


class Written:
    """Random experts in files of as many copies or shares as there are."""

    def __init__(self, folder: Path, extents, copies: int, shares: int) -> None:
        layers, content = layers_of(extents), []
        split = Shares(layers, shares)
        files = [[folder / f"{c}-{s}.bin" for s in range(shares)] for c in range(copies)]
        images = [bytearray(split.file_bytes(share)) for share in range(shares)]
        for number, layer in enumerate(layers):
            content.append([os.urandom(layer.extent_bytes) for _ in range(layer.n_experts)])
            for expert, extent in enumerate(content[-1]):
                for share, at, start, end in split.ranges(number, expert, 0, len(extent)):
                    images[share][at : at + end - start] = extent[start:end]
            sums = tuple(map(xxhash.xxh3_64_hexdigest, content[-1]))
            layers[number] = replace(layer, checksums=sums)
        for paths in files:
            for path, image in zip(paths, images, strict=True):
                path.write_bytes(image)
        self.content = content
        manifest = Manifest("", "", 1, "", "", 0, tuple(layers), shares=shares)
        self.backend = PackedExperts(folder, manifest, files=files)


@settings(max_examples=60, deadline=None)
@given(
    extents_of_layers,
    st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]),
    st.sets(st.integers(0, 2)),
    st.sampled_from(["error", "end", "wrong"]),
    st.sampled_from([1, 1 << 20]),
    st.booleans(),
)
def test_experts_come_whole_while_one_copy_is_sound(
    tmp_path_factory, extents, kind, broken, fault, grouped_below_bytes, check_all
):
    copies, shares = kind
    written = Written(tmp_path_factory.mktemp("drives"), extents, copies, shares)
    backend = written.backend
    bad = {
        descriptor
        for copy, opened in enumerate(backend._descriptors)
        for share, (descriptor, _) in enumerate(opened)
        if (copy if copies > 1 else share) in broken
    }
    n_drives = copies * shares
    n_broken = len(broken & set(range(n_drives)))
    is_readable = n_broken < (copies if shares == 1 else 1)
    read = os.preadv

    def preadv(descriptor, buffers, offset):
        if descriptor not in bad:
            return read(descriptor, buffers, offset)
        if fault == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "end":
            return 0
        count = read(descriptor, buffers, offset)
        memoryview(buffers[0]).cast("B")[0] ^= 1
        return count

    with (
        patch.object(os, "preadv", preadv),
        patch.object(reading, "GROUPED_BELOW_BYTES", grouped_below_bytes),
        patch.object(reading, "PIECE_BYTES", ALIGNMENT_BYTES),
    ):
        reader = ExtentReader(backend, readers=3, check_all=check_all)
        layers = backend.manifest.layers
        try:
            for _ in range(3):
                for number, layer in enumerate(layers):
                    size, count = layer.extent_bytes, layer.n_experts
                    memory = memoryview(aligned_memory(size * count))
                    slots = [memory[i * size : (i + 1) * size] for i in range(count)]
                    reads = reader.submit(number, list(enumerate(slots)))
                    for one, slot, right in zip(reads, slots, written.content[number], strict=True):
                        error = one.exception()
                        assert error is None or isinstance(error, FlashMoEError)
                        assert error or slot == right
                        assert bool(error) <= (not is_readable)
                        assert bool(error) >= (n_broken == n_drives)
        finally:
            reader.close()


@pytest.mark.parametrize("stripe", [False, True])
def test_a_store_on_two_drives_gives_the_same_tokens_by_reads_from_both(pair, stores, stripe):
    store, other = pair(stripe=stripe)
    expected, plain = tokens(stores())
    output, stats = tokens(store)
    assert output == expected
    assert stats["bytes_read"] == plain["bytes_read"]
    first, second = stats["bytes_by_drive"]
    assert first + second >= stats["bytes_read"]  # a guess that was dropped is among them
    assert 0.1 < first / (first + second) < 0.9  # reads are small, and both on one drive
    assert not plain["bytes_by_drive"]
    sizes = [sum(p.stat().st_size for p in one.glob("experts-*.bin")) for one in (store, other)]
    whole = manifests.load(store).experts_bytes
    assert sizes == ([whole, whole] if not stripe else [whole / 2, whole / 2])


@pytest.mark.parametrize("kind", ["error", "end", "wrong"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_mirrored_store_goes_on_when_a_drive_fails_and_says_so_once(
    pair, stores, caplog, kind, which
):
    folders = pair(stripe=False)
    expected, _ = tokens(stores())
    model = flashmoe.load(folders[0], memory=budget(folders[0], 2), policy="lru", check_reads=True)
    try:
        with failing(folders[which].resolve(), kind) as counts:
            assert generate(model, prompt(5), 6) == expected
            before = counts[folders[which]]
            model.flashmoe.reset()
            assert generate(model, prompt(5), 6) == expected
        assert before >= MOST_ERRORS
        assert counts[folders[which]] == before  # it is left alone
    finally:
        model.flashmoe.close()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2
    assert f"{folders[which]}: a read failed" in said[0]
    assert "is left alone from now on" in said[1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_striped_store_refuses_when_a_drive_fails(pair, which):
    folders = pair(stripe=True)
    model = flashmoe.load(folders[0], memory=budget(folders[0], 2), policy="lru")
    try:
        with (
            failing(folders[which].resolve()),
            pytest.raises(FlashMoEError, match=rf"expert \d.*{folders[which].name}.*`flashmoe ver"),
        ):
            generate(model, prompt(5), 6)
    finally:
        model.flashmoe.close()


def test_a_mirror_that_is_not_mounted_is_told_and_the_other_read(pair, stores, caplog):
    store, other = pair(stripe=False)
    expected, _ = tokens(stores())
    shutil.rmtree(other)
    assert tokens(store)[0] == expected
    assert f"{other} has no copy of the experts of {store}" in caplog.text
    with pytest.raises(FlashMoEError, match=rf"{other} has no copy"):
        verify(store)


def test_a_mirror_is_a_store_of_its_own(pair, stores, caplog):
    store, other = pair(stripe=False)
    shutil.rmtree(store)
    assert tokens(other)[0] == tokens(stores())[0]
    assert f"{store} has no copy" in caplog.text


def test_a_striped_store_without_one_share_refuses_until_it_is_found(pair, stores, tmp_path):
    store, other = pair(stripe=True)
    moved = other.rename(tmp_path / "elsewhere")
    for use in (verify, tokens):
        with pytest.raises(FlashMoEError, match=r"share 2 of 2 .* not there.*mount its drive"):
            use(store)
    assert tokens(store, also=[moved])[0] == tokens(stores())[0]
    with pytest.raises(FlashMoEError, match="holds share 2 of 2 of a store's experts"):
        flashmoe.load(moved, memory="1MiB")


def test_a_copy_of_the_folder_is_a_mirror(own_store, stores, tmp_path):
    copy = shutil.copytree(own_store, tmp_path / "copy")
    output, stats = tokens(own_store, also=[copy])
    assert output == tokens(stores())[0]
    assert len(stats["bytes_by_drive"]) == 2
    os.truncate(copy / manifests.load(own_store).experts_file, 4096)
    with pytest.raises(FlashMoEError, match=rf"{copy} has no copy .*it has 4096 bytes"):
        tokens(own_store, also=[copy])


def test_a_checkpoint_read_in_place_has_one_drive(checkpoints, tmp_path):
    with pytest.raises(FlashMoEError, match="is read in place, from one drive: run `flashmoe pack"):
        flashmoe.load(checkpoints(), memory="1MiB", also=[tmp_path])


@pytest.mark.parametrize("stripe", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_verify_reads_every_copy_and_share(pair, stripe, which):
    folders = pair(stripe=stripe)
    assert verify(folders[0]).n_copies == (1 if stripe else 2)
    (file,) = folders[which].glob("experts-*.bin")
    with open(file, "r+b") as damaged:
        damaged.seek(5000)
        byte = damaged.read(1)
        damaged.seek(5000)
        damaged.write(bytes([byte[0] ^ 1]))
    named = folders[0] if stripe else folders[which]
    with pytest.raises(FlashMoEError, match=f"{named}: expert 0 .*not those that were packed"):
        verify(folders[0])


@pytest.mark.parametrize("stripe", [False, True])
def test_packing_again_leaves_no_old_file_on_either_drive(pair, checkpoints, stripe):
    folders = pair(stripe=stripe)
    before = [{path.name for path in folder.iterdir()} for folder in folders]
    pack(checkpoints(), folders[0], also=[folders[1]], stripe=stripe)
    after = [{path.name for path in folder.iterdir()} for folder in folders]
    assert list(map(len, before)) == list(map(len, after))
    assert verify(folders[0])


@pytest.mark.parametrize("stripe", [False, True])
def test_a_pack_that_fails_leaves_the_store_on_both_drives(pair, checkpoints, monkeypatch, stripe):
    folders = pair(stripe=stripe)
    save, saved = Manifest.save, []

    def save_one(self, directory):
        if saved:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        saved.append(directory)
        save(self, directory)

    monkeypatch.setattr(Manifest, "save", save_one)
    with pytest.raises(FlashMoEError, match="packing stopped"):
        pack(checkpoints(), folders[0], also=[folders[1]], stripe=stripe)
    assert saved == [folders[1]]
    verify(folders[0])


def test_two_folders_must_be_two(checkpoints, tmp_path):
    with pytest.raises(FlashMoEError, match="is named twice"):
        pack(checkpoints(), tmp_path / "a", also=[tmp_path / "b" / ".." / "a"])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"folders": [3]}', '{"folders": ["a\\u0000b"]}'])
def test_a_damaged_list_of_folders_is_named(pair, content):
    store, _ = pair(stripe=False)
    path = store / manifests.load(store).folders_file
    path.write_text(content)
    with pytest.raises(FlashMoEError, match=f"{path} cannot be read"):
        tokens(store)
