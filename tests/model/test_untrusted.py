"""Files from anywhere: refused in a sentence or harmless, whatever they hold."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.store import manifest
from harness.torture import untrusted

NUMBERS = [-1, 0, 1, 7, 4096, 1 << 31, 1 << 40, 1 << 63, 1 << 70, 0.5, 1e300, float("inf")]
VALUES = [*NUMBERS, None, True, "", "x", "../x", "/etc/passwd", [], [[]], {}, {"a": 1}]


@pytest.fixture(scope="module", params=list(untrusted.INPUTS))
def given_input(request, tmp_path_factory):
    what = untrusted.INPUTS[request.param]
    path = what.make(tmp_path_factory.mktemp("input"))
    original = path.read_bytes()
    assert untrusted.survives(what, path, original)
    return what, path, original


def test_bytes_are_damaged(given_input):
    what, path, original = given_input

    @given(st.data())
    @settings(max_examples=50, deadline=None)
    def damaged(data: st.DataObject) -> None:
        content = bytearray(original)
        for _ in range(data.draw(st.integers(1, 5))):
            # the head of a file says more than the rest of it
            near = data.draw(st.sampled_from([16, 256, len(content)]))
            at = data.draw(st.integers(0, max(0, min(near, len(content)) - 1)))
            kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
            if kind == "change" and content:
                content[at] = data.draw(st.integers(0, 255))
            elif kind == "cut":
                del content[at : at + data.draw(st.integers(1, 64))]
            else:
                content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        untrusted.survives(what, path, bytes(content))

    try:
        damaged()
    finally:
        path.write_bytes(original)


def _places(document, at=()):
    """Every place in a JSON document, as keys to follow."""
    yield at
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from _places(value, (*at, key))
        else:
            yield (*at, key)


def test_values_of_json_are_replaced(given_input):
    what, path, original = given_input
    if not path.name.endswith(".json"):
        pytest.skip("not JSON")
    places = [at for at in _places(json.loads(original)) if at]

    @given(st.sampled_from(places), st.sampled_from(VALUES), st.booleans())
    @settings(max_examples=150, deadline=None)
    def replaced(at, value, remove) -> None:
        document = json.loads(original)
        inner = document
        for key in at[:-1]:
            inner = inner[key]
        if remove:
            del inner[at[-1]]
        else:
            inner[at[-1]] = value
        untrusted.survives(what, path, json.dumps(document).encode())

    try:
        replaced()
        deep = b'{"a":' * 100_000
        assert not untrusted.survives(what, path, deep)
    finally:
        path.write_bytes(original)


def test_links_in_a_target_are_not_followed(checkpoints, tmp_path):
    """Somebody prepared the directory that a store is packed into."""
    victim, store = tmp_path / "victim", tmp_path / "store"
    victim.write_text("precious")
    store.mkdir()
    for name in (manifest.FILE_NAME, "config.json", f".config.json.{os.getpid()}.partial"):
        (store / name).symlink_to(victim)
    with pytest.raises(FlashMoEError):  # its manifest is none
        pack(checkpoints(), store)
    (store / manifest.FILE_NAME).unlink()
    pack(checkpoints(), store)
    assert victim.read_text() == "precious"
    (store / ".lock").unlink()
    (store / ".lock").symlink_to(victim)
    with pytest.raises(FlashMoEError, match="packing stopped"):
        pack(checkpoints(), store)
    assert victim.read_text() == "precious"
    manifest.load(store)
