"""Models that Ollama and LM Studio keep are found by the names that those know them by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmoe import local_models
from flashmoe.engines import hub, llama
from flashmoe.errors import FlashMoEError

DIGEST = "sha256:" + "5" * 64
LM_STUDIO = ".lmstudio/models/lmstudio-community/gpt-oss-20b-GGUF"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keep(folder: Path, place: str, digest: str = DIGEST, kind: str = "model") -> Path:
    """A model of Ollama's below `folder`; the blob's place."""
    manifest = folder / "manifests" / place
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest, "size": 4},
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "7" * 64},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    blob = folder / "blobs" / digest.replace(":", "-")
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"GGUF")
    return blob


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gpt-oss:20b", "registry.ollama.ai/library/gpt-oss/20b"),
        ("gpt-oss", "registry.ollama.ai/library/gpt-oss/latest"),
        ("someone/mixture:q4_K_M", "registry.ollama.ai/someone/mixture/q4_K_M"),
        ("hf.co/org/name-GGUF:Q4_K_M", "hf.co/org/name-GGUF/Q4_K_M"),
        ("localhost:5000/a/b", "localhost:5000/a/b/latest"),
    ],
)
def test_a_name_of_ollamas_is_its_blob(home, name, place):
    blob = keep(home / ".ollama" / "models", place)
    assert hub.on_disk(name) == hub.on_disk(Path(name)) == blob
    assert llama.accepts(blob)


def test_ollamas_models_lie_where_its_variable_says(home, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "large drive"))
    blob = keep(home / "large drive", "registry.ollama.ai/library/gpt-oss/20b")
    assert local_models.find("gpt-oss:20b") == blob
    blob.rename(blob.with_name(DIGEST))  # as its older versions spell it
    assert local_models.find("gpt-oss:20b") == blob.with_name(DIGEST)
    blob.with_name(DIGEST).unlink()
    with pytest.raises(FlashMoEError, match=r"is not there: `ollama pull gpt-oss:20b` again"):
        local_models.find("gpt-oss:20b")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no manifest"), ("[1]", "is no manifest"), ('{"layers": [{}]}', "is no manifest"),
        ('{"layers": []}', "does not keep it as one GGUF file"),
        (
            '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "../x"}]}',
            "does not keep it as one GGUF file",
        ),
    ],
)  # fmt: skip
def test_a_manifest_that_names_no_gguf_file_is_one_sentence(home, content, said):
    folder = home / ".ollama" / "models"
    keep(folder, "registry.ollama.ai/library/it/latest", kind="tensor")
    with pytest.raises(FlashMoEError, match="does not keep it as one GGUF file"):
        local_models.find("it")
    (folder / "manifests/registry.ollama.ai/library/it/latest").write_text(content)
    with pytest.raises(FlashMoEError, match=said):
        local_models.find("it")


def put(home: Path, *files: str) -> list[Path]:
    paths = [home / file for file in files]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")
    return paths


@pytest.mark.parametrize(
    "name",
    [
        "lmstudio-community/gpt-oss-20b-GGUF", "lmstudio-community/gpt-oss-20b", "gpt-oss-20b",
        "GPT-OSS-20b", "gpt-oss-20b@mxfp4", "gpt-oss-20b-MXFP4.gguf", "gpt-oss-20b-MXFP4",
        "lmstudio-community/gpt-oss-20b-GGUF:gpt-oss-20b-MXFP4.gguf",
        "lmstudio-community/gpt-oss-20b-GGUF/gpt-oss-20b-MXFP4.gguf",
    ],
)  # fmt: skip
def test_a_name_of_lm_studios_is_its_file(home, name):
    file, *_ = put(
        home, f"{LM_STUDIO}/gpt-oss-20b-MXFP4.gguf", f"{LM_STUDIO}/mmproj-model-f16.gguf",
        f"{LM_STUDIO}/../other-GGUF/other.gguf",
    )  # fmt: skip
    assert hub.on_disk(name) == file


def test_of_a_split_file_it_is_the_first_part_and_of_several_the_one_that_is_named(home):
    older = ".cache/lm-studio/models/org/big-GGUF"
    first, *_ = put(home, *(f"{older}/big-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)))
    assert local_models.find("org/big") == first
    other, *_ = put(home, f"{older}/big-Q8_0.gguf")
    with pytest.raises(FlashMoEError, match=r"several files of org/big: name one of org/big-GGUF"):
        local_models.find("org/big")
    assert local_models.find("big@q8_0") == other


def test_a_name_that_nobody_knows_is_not_found(home):
    keep(home / ".ollama" / "models", "registry.ollama.ai/library/gpt-oss/20b")
    put(home, f"{LM_STUDIO}/gpt-oss-20b-MXFP4.gguf")
    for name in ("gpt-oss", "../gpt-oss:20b", "a/../../b", "", "/", "20b", "x.gguf", "a:b:c"):
        assert local_models.find(name) is None


def test_a_path_goes_before_a_name(home):
    keep(home / ".ollama" / "models", "registry.ollama.ai/library/olmoe/latest")
    (home / "olmoe").mkdir()
    assert hub.on_disk("olmoe") == Path("olmoe")
