"""Fixtures of every folder. Each imports torch itself, because tests/fast runs without it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A checkpoint of a family, in float32 if no dtype is named; made once."""
    import tiny

    made: dict[tuple, Path] = {}

    def get(family: str = "olmoe", dtype=None) -> Path:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family, dtype] = tiny.make_checkpoint(family, folder, dtype)
        return made[family, dtype]

    return get


@pytest.fixture(scope="session")
def stores(checkpoints, tmp_path_factory):
    """A store of a family's checkpoint, packed once."""
    from flashmoe.engines.transformers.checkpoints.pack import pack

    made: dict[tuple, Path] = {}

    def get(family: str = "olmoe", dtype=None) -> Path:
        if (family, dtype) not in made:
            store = tmp_path_factory.mktemp("store") / family
            pack(checkpoints(family, dtype), store)
            made[family, dtype] = store
        return made[family, dtype]

    return get


@pytest.fixture
def loaded(stores):
    """Load from a store at so many slots a layer; closed afterwards."""
    import tiny

    import flashmoe
    from flashmoe.store import manifest

    models = []

    def get(family="olmoe", slots=None, policy="lru", dtype=None):
        store = stores(family, dtype)
        slots = slots or manifest.load(store).top_k
        models.append(flashmoe.load(store, memory=tiny.budget(store, slots), policy=policy))
        return models[-1]

    yield get
    for model in models:
        model.flashmoe.close()


@pytest.fixture(scope="module")
def whim() -> Iterator[str]:
    """A policy of this name, which bypasses by chance."""
    from whim import Whim

    from flashmoe import policies

    policies.available()[Whim.name] = Whim
    yield Whim.name
    del policies.available()[Whim.name]


@pytest.fixture
def many_guesses(monkeypatch):
    """Experts of any size are guessed whenever they may be, with half of the budget as spares."""
    from flashmoe.reading.reader import ExtentReader
    from flashmoe.residency import budget, prefetch

    monkeypatch.setattr(prefetch, "PREFETCH_FROM_BYTES", 1)
    monkeypatch.setattr(budget, "SPARE_SHARE", 1 / 2)
    monkeypatch.setattr(ExtentReader, "extent_seconds", lambda *_: 1.0)


@pytest.fixture(scope="session")
def large_store(tmp_path_factory) -> Path:
    """192 MiB of experts: 4 layers x 32 of 1.5 MiB."""
    import tiny

    from flashmoe.engines.transformers.checkpoints.pack import pack

    folder = tmp_path_factory.mktemp("larger")
    tiny.make_checkpoint(
        "olmoe", folder / "checkpoint", vocab_size=256, hidden_size=256, intermediate_size=512,
        num_hidden_layers=4, num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip
    pack(folder / "checkpoint", folder / "store")
    return folder / "store"


@pytest.fixture(scope="session")
def gguf_files(tmp_path_factory):
    """A tiny model as a GGUF file, by family and scheme; made once."""
    from harness import tiny_gguf

    made: dict[tuple[str, str], Path] = {}

    def get(family: str = "olmoe", scheme: str = "int4") -> Path:
        if (family, scheme) not in made:
            path = tmp_path_factory.mktemp("gguf") / f"{family}-{scheme}.gguf"
            made[family, scheme] = tiny_gguf.write(path, family, scheme)
        return made[family, scheme]

    return get


@pytest.fixture(params=["in groups", "in pieces"])
def reading(request, monkeypatch):
    """Small extents are read in groups; in pieces only large ones, or all for this test."""
    from flashmoe.reading import reader

    if request.param == "in pieces":
        monkeypatch.setattr(reader, "GROUPED_BELOW_BYTES", 1)
        monkeypatch.setattr(reader, "PIECE_BYTES", 4096)


@pytest.fixture
def own_store(checkpoints, tmp_path):
    """A store of the test's own, to be damaged."""
    from flashmoe.engines.transformers.checkpoints.pack import pack

    store = tmp_path / "own"
    pack(checkpoints(), store)
    return store


@pytest.fixture(scope="module")
def browser():
    """A browser without a screen; where none is installed, its tests are skipped."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser, request):
    """A page, light and 1200 pixels wide or as its parameter says, and what it complained of."""
    scheme, width = getattr(request, "param", ("light", 1200))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    opened.complaints = []
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on(
        "console",
        lambda message: (
            message.type in ("error", "warning") and opened.complaints.append(message.text)
        ),
    )
    opened.on("requestfailed", lambda failed: opened.complaints.append(failed.url))
    yield opened
    context.close()
