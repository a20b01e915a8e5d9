"""`flashmoe.load` gives a path to the engine that takes it; an engine is one folder."""

from __future__ import annotations

import sys

import pytest

import flashmoe
from flashmoe import engines

ENGINE = '''
"""Runs files that end in .words."""

def accepts(path):
    return str(path).endswith(".words")

def load(path, *, memory, **options):
    return path, memory, options
'''


@pytest.fixture
def another_engine(tmp_path, monkeypatch):
    folder = tmp_path / "engines" / "words"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(ENGINE)
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(folder.parent)])
    yield
    sys.modules.pop("flashmoe.engines.words", None)


def test_an_engine_is_one_folder_that_says_what_it_takes(another_engine, tmp_path):
    assert {"transformers", "words"} <= set(engines.available())
    path = tmp_path / "a.words"
    path.write_text("one two")
    assert flashmoe.load(path, memory="1GiB", pace=3) == (path, "1GiB", {"pace": 3})


def test_a_file_that_no_engine_takes_is_refused(tmp_path):
    path = tmp_path / "a.words"
    path.write_text("one two")
    with pytest.raises(flashmoe.FlashMoEError, match=r"a\.words: no engine runs such a file"):
        flashmoe.load(path, memory="1GiB")
