"""What goes from beside the weights into a store: all that transformers reads, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_tokenizer
import transformers

from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.errors import FlashMoEError
from flashmoe.reading.verify import verify
from flashmoe.store import manifest, side_files

WANTED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "tiktoken.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "qwen.tiktoken", "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "emoji.json",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "audio_tokenizer_config.json", "LICENSE", "README.md",
    "additional_chat_templates/tool_use.jinja", "qformer_tokenizer/tokenizer.json",
    "deep/folder/of/config.json", "deep/manifest.json",
)  # fmt: skip
OTHER = (
    "model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "a.pt", "a.ckpt", "a.GGUF",
    "tf_model.h5", "flax_model.msgpack", "model.onnx", "model.onnx_data", "optimizer.pkl",
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "modeling_own.py", "kernel.so",
    ".gitattributes", ".cache/huggingface/x.json", "picture.PNG", "talk.mp4", "all.tar.gz",
    "manifest.json", "experts-00000000.bin", "dense-00000000.safetensors", ".lock",
    "original/params.json", "original/consolidated.pth", "checkpoint-5/tokenizer.json",
    "checkpoint-5/model.safetensors", "checkpoint-5/deeper/vocab.txt", "code/config.py",
)  # fmt: skip


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture
def store(tmp_path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def test_what_transformers_reads_is_copied_and_all_else_left(tmp_path, store):
    source = write(tmp_path / "source", *WANTED, *OTHER)
    side_files.copy(source, store)
    assert files_in(store) == set(WANTED)
    for name in WANTED:
        assert (store / name).read_bytes() == (source / name).read_bytes()


def test_a_store_serves_transformers_as_the_checkpoint_does(checkpoints, tmp_path):
    source = tmp_path / "source"
    checkpoint_files = sorted(checkpoints().iterdir())
    source.mkdir()
    for path in checkpoint_files:  # as the hub's cache has them
        (source / path.name).symlink_to(path)
    tiny_tokenizer.give(source)
    (source / "chat_template.jinja").write_text(tiny_tokenizer.CHAT)
    write(source, "additional_chat_templates/tool_use.jinja", "manifest.json")
    pack(source, tmp_path / "store")
    verify(tmp_path / "store")  # its own manifest is there, not the source's
    chat = [{"role": "user", "content": "hi"}]
    for options in ({}, {"chat_template": "tool_use"}):
        there, here = (
            transformers.AutoTokenizer.from_pretrained(path).apply_chat_template(chat, **options)
            for path in (source, tmp_path / "store")
        )
        assert there == here
    assert not any(path.is_symlink() for path in (tmp_path / "store").rglob("*"))
    assert not list((tmp_path / "store").glob("model*"))


def test_a_store_inside_its_checkpoint_does_not_copy_itself(checkpoints, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in checkpoints().iterdir():
        (source / path.name).symlink_to(path)
    for _ in range(2):
        pack(source, source / "store")
    assert not (source / "store" / "store").exists()
    manifest.load(source / "store")


def test_links_to_folders_are_not_followed_and_links_to_nothing_are_told(tmp_path, store, caplog):
    source, outside = write(tmp_path / "source", "config.json"), write(tmp_path / "out", "a.json")
    (source / "folder").symlink_to(outside)
    (source / "vocab.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(source / "pipe.json")
    side_files.copy(source, store)
    assert files_in(store) == {"config.json"}
    assert "vocab.txt is left behind: it is a link to no file" in caplog.text


def test_a_file_too_large_to_be_one_is_told(tmp_path, store, caplog, monkeypatch):
    monkeypatch.setattr(side_files, "LARGEST_BYTES", 10)
    source = write(tmp_path / "source", "large.json")
    side_files.copy(source, store)
    assert not files_in(store)
    assert f"{source / 'large.json'} is left behind: it has 21 B" in caplog.text


def test_nothing_is_written_through_a_link_in_the_store(tmp_path, store):
    source = write(tmp_path / "source", "config.json", "folder/a.json")
    victim = write(tmp_path / "victim", "config.json", "a.json")
    (store / "config.json").symlink_to(victim / "config.json")
    (store / "folder").symlink_to(victim)
    side_files.copy(source, store)
    for name in ("config.json", "a.json"):
        assert (victim / name).read_text() == f"content of {name}"
    assert files_in(store) == {"config.json", "folder/a.json"}
    assert not (store / "folder").is_symlink()


def test_packing_again_leaves_what_is_not_of_the_source(checkpoints, own_store, tmp_path):
    write(own_store, "mine.txt", "templates/mine.jinja", "templates/.0123456789abcdef.partial")
    pack(checkpoints(), own_store)
    assert {"mine.txt", "templates/mine.jinja"} <= files_in(own_store)
    killed = own_store / "templates" / ".0123456789abcdef.partial"
    assert not killed.exists()


def test_what_stands_in_the_way_is_one_sentence_and_stays(checkpoints, own_store):
    source = own_store.parent / "source"
    source.mkdir()
    for path in checkpoints().iterdir():
        (source / path.name).symlink_to(path)
    write(source, "folder/a.json")
    write(own_store, "folder")
    with pytest.raises(FlashMoEError, match="packing stopped"):
        pack(source, own_store)
    assert (own_store / "folder").read_text() == "content of folder"
    (own_store / "folder").unlink()
    write(source, "vocab.txt")
    write(own_store, "vocab.txt/c")
    with pytest.raises(FlashMoEError, match=r"vocab\.txt cannot be written"):
        pack(source, own_store)
    assert (own_store / "vocab.txt" / "c").exists()
    verify(own_store)
