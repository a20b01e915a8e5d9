"""The trace file: kept exactly, and refused in a sentence when it makes no sense."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from flashmoe import trace
from flashmoe.disk import plain_npz
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace


def small() -> Trace:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(6)[:2] for _ in range(10 * 3)]).reshape(10, 3, 2)
    return Trace(
        experts.astype(np.uint8),
        np.repeat([0, 1], 5).astype(np.int32),
        6,
        weights=rng.random((10, 3, 2)).astype(np.float16),
        step=np.array([0, 0, 0, 1, 2, 3, 3, 4, 5, 6], dtype=np.int32),
        guesses=experts[:, 1:, ::-1].astype(np.uint8),
        computed=rng.random((10, 3)) < 0.7,
        info={"model": "m", "names": ["a", "b"]},
    )


def test_round_trip(tmp_path):
    small().save(tmp_path / "t.npz")
    back = trace.load(tmp_path / "t.npz")
    for name in ("experts", "sequence", "weights", "step", "guesses", "computed"):
        np.testing.assert_array_equal(getattr(back, name), getattr(small(), name))
    assert (back.n_experts, back.info["names"], back.probabilities) == (6, ["a", "b"], None)
    assert [run for _, run in back.sequences()] == [slice(0, 5), slice(5, 10)]
    assert list(back.steps(slice(0, 5))) == [slice(0, 3), slice(3, 4), slice(4, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.npz"]


def test_a_sequence_by_its_name():
    part = small().named("b")
    np.testing.assert_array_equal(part.experts, small().experts[5:])
    np.testing.assert_array_equal(part.weights, small().weights[5:])
    np.testing.assert_array_equal(part.step, small().step[5:])
    np.testing.assert_array_equal(part.computed, small().computed[5:])
    with pytest.raises(FlashMoEError, match="no sequence called 'c'"):
        small().named("c")
    np.testing.assert_array_equal(small().without("b").guesses, small().guesses[:5])
    assert len(small().without("c").experts) == 10
    assert len(part.without("b").experts) == 5  # there is nothing else
    np.testing.assert_array_equal(small().first(3).step, [0, 0, 0])


def test_uses_are_of_what_was_computed():
    part = small()
    uses = part.uses()
    assert uses.sum() == part.computed.sum() * part.top_k
    rows = part.experts[part.computed[:, 1], 1]
    np.testing.assert_array_equal(uses[1], np.bincount(rows.ravel(), minlength=6))


def damaged(**changes):
    arrays = {"experts": small().experts, "sequence": small().sequence} | changes
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        (damaged(experts=small().experts + 3), "names expert"),
        (damaged(experts=small().experts.astype(np.int64)), "must be uint8 or uint16"),
        (damaged(experts=small().experts[:0]), "not empty"),
        (damaged(experts=np.zeros_like(small().experts)), "same expert twice"),
        (damaged(experts=np.array([{"a": 1}], dtype=object)), "pickled"),
        (damaged(sequence=None), "lacks the arrays"),
        (damaged(sequence=np.zeros(3, np.int32)), "'sequence' must be"),
        (damaged(sequence=np.array([0, 1] * 5, np.int32)), "contiguous"),
        (damaged(weights=np.zeros((2, 2), np.float16)), "'weights' must have shape"),
        (damaged(guesses=small().experts), "'guesses' must have shape"),
        (damaged(guesses=small().guesses + 3), "'guesses' must be experts of a layer"),
        (damaged(guesses=small().guesses.astype(np.float32)), "'guesses' must be experts"),
        (damaged(computed=np.ones((10, 2), bool)), "'computed' must have shape"),
        (damaged(computed=np.ones((10, 3), np.uint8)), "'computed' must be true or false"),
        (damaged(computed=np.zeros((10, 3), bool)), "true somewhere"),
    ],
)
def test_nonsense_is_refused(tmp_path, arrays, complaint):
    path = tmp_path / "t.npz"
    np.savez(path, allow_pickle=True, **arrays)
    path.with_suffix(".json").write_text(json.dumps({"experts": 6}))
    with pytest.raises(FlashMoEError, match=complaint):
        trace.load(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04pickle", b"x" * 99])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(FlashMoEError, match="cannot be read"):
        trace.load(path)


@pytest.mark.parametrize("text", ["[", "[1]", '{"experts": -1}', '{"experts": "six"}', "[" * 99999])
def test_a_nonsense_description_is_refused(tmp_path, text):
    small().save(tmp_path / "t.npz")
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(FlashMoEError, match="description"):
        trace.load(tmp_path / "t.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FlashMoEError, match="no such file"):
        trace.load(tmp_path / "t.npz")


def test_an_array_that_claims_more_than_there_is(tmp_path):
    """A header of terabytes: refused before anything is allocated."""
    path, header = tmp_path / "t.npz", io.BytesIO()
    claimed = {"descr": "|u1", "fortran_order": False, "shape": (4 << 40, 1, 2)}
    np.lib.format.write_array_header_1_0(header, claimed)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("experts.npy", header.getvalue() + b"1234")
    with pytest.raises(FlashMoEError, match="claims"):
        trace.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("experts.npy", pickle.dumps([1]))
    with pytest.raises(plain_npz.UnreadableError, match="without pickled objects"):
        plain_npz.read(path)


def test_heads_are_the_first_tokens_of_each_sequence():
    experts = np.arange(7, dtype=np.uint8)[:, None, None]
    sequence = np.array([0, 0, 0, 1, 2, 2, 2], np.int32)
    recorded = Trace(experts, sequence, 7, weights=experts.astype(np.float16))
    heads = recorded.heads(2)
    assert heads.experts[:, 0, 0].tolist() == heads.weights[:, 0, 0].tolist() == [0, 1, 3, 4, 5]
    assert heads.sequence.tolist() == [0, 0, 1, 2, 2]
