"""A manifest is written as every other file is: whole or not at all."""

from __future__ import annotations

import pytest
from whole_files import (  # noqa: F401 - they are this module's tests
    test_a_failing_write_leaves_the_old_file_and_nothing_else,
    test_a_file_is_durable_before_it_has_its_name_and_has_usual_permissions,
    test_a_link_is_replaced_and_what_it_named_stays,
)

from flashmoe.store.manifest import FILE_NAME, Manifest


@pytest.fixture
def writing(tmp_path):
    """The function that writes, and the path that it writes to."""
    folder = tmp_path / "folder"
    folder.mkdir()
    manifest = Manifest("a", "b", 1, "c", "d", 1, ())
    return lambda path: manifest.save(path.parent), folder / FILE_NAME
