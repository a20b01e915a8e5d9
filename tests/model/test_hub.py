"""A model by its name: fetched once, found afterwards, refused in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
from hub_server import environment
from tiny import make_checkpoint

import flashmoe
from flashmoe.engines import hub
from flashmoe.engines.transformers.checkpoints.given_back import GivenBack
from flashmoe.engines.transformers.checkpoints.pack import pack as pack_checkpoint
from flashmoe.errors import FlashMoEError
from flashmoe.store import writer

_FIND = """
import sys
from flashmoe.engines import hub
from flashmoe.errors import FlashMoEError
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        print(hub.on_disk(name, revision or None))
    except FlashMoEError as error:
        print("refused:", error)
"""


def find(cache: Path, address: str, *names: str, **more: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _FIND, *names],
        env=environment(cache, address, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.splitlines()


def fetched(asked: list[str]) -> list[str]:
    """The files that were given, of all that was asked."""
    return [line for line in asked if line.startswith("GET") and "resolve" in line]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_checkpoint("olmoe", tmp_path_factory.mktemp("hub") / "olmoe")
    (folder / "original").mkdir()
    (folder / "original" / "weights.safetensors").write_bytes(b"the same in another form")
    (folder / "README.md").write_text("a card")
    return folder


def test_a_model_by_its_name_is_that_in_its_folder(checkpoint, tmp_path):
    with hub_server.serve({"org/tiny": checkpoint}) as (address, asked):
        (found,) = find(tmp_path, address, "org/tiny")
        assert not any("original" in line or "README" in line for line in fetched(asked))
    names = {p.name for p in Path(found).iterdir()}
    assert names == {p.name for p in checkpoint.iterdir() if p.suffix in (".json", ".safetensors")}
    ours = flashmoe.load(found, memory="1GiB").state_dict()
    plain = flashmoe.load(checkpoint, memory="1GiB").state_dict()
    assert ours.keys() == plain.keys()


def test_it_is_found_again_without_a_hub(checkpoint, tmp_path):
    with hub_server.serve({"org/tiny": checkpoint}) as (address, asked):
        (first,) = find(tmp_path, address, "org/tiny")
        assert Path(first).is_dir()
        before = fetched(asked)
        (again,) = find(tmp_path, address, "org/tiny")
        assert fetched(asked) == before
    assert [first] == [again] == find(tmp_path, address, "org/tiny")  # the server is gone
    assert [first] == find(tmp_path, address, "org/tiny", HF_HUB_OFFLINE="1")


def test_what_cannot_be_had_is_one_sentence_before_weights_are_fetched(checkpoint, tmp_path):
    folders = {}
    for name, files in {
        "ggufs": ("a-Q4_K_M.gguf", "a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf"),
        "huge": ("config.json", "model.huge.safetensors"),
        "pickles": ("config.json", "pytorch_model.bin"),
    }.items():
        folders[f"org/{name}"] = tmp_path / name
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"{}")
    folders["org/tiny"] = checkpoint
    cache = tmp_path / "cache"
    with hub_server.serve(folders, gated=("org/gated",)) as (address, asked):
        said = find(
            cache, address,
            *("org/none", "org/gated", "org/tiny@other", "org/huge", "org/pickles", "org/ggufs"),
            *("org/ggufs:b.gguf", "org/ggufs:a-Q8_0-00001-of-00002.gguf"),
        )  # fmt: skip
    none, gated, other, huge, pickles, ggufs, wrong, right = said
    assert "org/none: neither a file here nor a model on the hub" in none
    assert "gives it on request" in gated
    assert "org/tiny at revision other: the hub has no such revision" in other
    assert "the disk has" in huge
    assert "no safetensors" in pickles
    assert "name one, such as org/ggufs:a-Q4_K_M.gguf" in ggufs
    assert "there is no b.gguf; its GGUF files: a-Q4_K_M.gguf" in wrong
    assert all(line.startswith("refused: ") for line in said[:-1])
    assert Path(right).name == "a-Q8_0-00001-of-00002.gguf"
    assert (Path(right).parent / "a-Q8_0-00002-of-00002.gguf").exists()
    assert not (Path(right).parent / "a-Q4_K_M.gguf").exists()
    assert all("org/ggufs" in line for line in fetched(asked))
    assert "cannot be reached" in find(tmp_path / "empty", address, "org/tiny")[0]


def test_the_command_takes_a_name(tmp_path):
    demo = flashmoe.demo_path()
    prompt = ["--prompt", "And it came to pass", "--max-new-tokens", "4", "--json"]

    def tokens(*arguments: str, **more: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-m", "flashmoe", "generate", *arguments, *prompt],
            env=environment(tmp_path / "cache", address) | more,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        return json.loads(done.stdout)["token_ids"]

    with hub_server.serve({"org/demo": demo}) as (address, _):
        assert tokens("org/demo", "--memory", "1GiB") == tokens("--memory", "1GiB")


_COMMANDS = """
import sys
from flashmoe import cli
for line in sys.stdin.read().splitlines():
    cli.main(line.split())
"""


def test_a_name_is_packed_and_given_back(checkpoint, tmp_path):
    def pack(*lines: str) -> str:
        """What the commands say on stderr, of one process."""
        return subprocess.run(
            [sys.executable, "-c", _COMMANDS],
            input="".join(f"pack {line}\n" for line in lines),
            env=environment(tmp_path / "cache", address),
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stderr

    def weights() -> list[Path]:
        return [p for p in (tmp_path / "cache").rglob("*.safetensors") if p.exists()]

    kept, given, int8 = stores = [tmp_path / name for name in ("kept", "given", "int8")]
    with hub_server.serve({"org/tiny": checkpoint}) as (address, asked):
        said = pack(
            f"org/tiny {kept}",
            f"org/tiny {given} --give-back --quant nope",
            f"{checkpoint} {given} --give-back",
        )
        assert "no quantisation is called 'nope'" in said
        assert "is no name on the hub, and stays as it is" in said
        assert weights()
        before = fetched(asked)
        pack(f"org/tiny {given} --give-back")
        assert fetched(asked) == before
        assert not weights()
        pack(f"org/tiny {int8} --give-back --quant int8")
        assert len(fetched(asked)) > len(before)
        assert not weights()
    files = [next(store.glob("experts-*.bin")).read_bytes() for store in (kept, given)]
    assert files[0] == files[1]
    for store in stores:
        flashmoe.load(store, memory="1GiB").flashmoe.close()


def test_disk_space_is_given_back_layer_by_layer(tmp_path, monkeypatch):
    folder = make_checkpoint("olmoe", tmp_path / "olmoe", hidden_size=256, intermediate_size=512)
    shards = list(folder.glob("*.safetensors"))
    descriptors = [os.open(shard, os.O_RDONLY) for shard in shards]
    forget, used = GivenBack.forget_pages, []

    def blocks() -> int:
        return sum(os.fstat(descriptor).st_blocks for descriptor in descriptors)

    def noted(self: GivenBack) -> None:
        forget(self)
        used.append(blocks())

    monkeypatch.setattr(GivenBack, "forget_pages", noted)
    whole, store = blocks(), tmp_path / "store"
    pack_checkpoint(folder, store, give_back=True)
    assert not any(shard.exists() for shard in shards)
    assert whole > used[0] > used[1]
    for descriptor in descriptors:
        os.close(descriptor)
    flashmoe.load(store, memory="1GiB").flashmoe.close()


def test_a_pack_that_fails_says_what_was_given_back(tmp_path, monkeypatch):
    folder = make_checkpoint("olmoe", tmp_path / "olmoe")
    monkeypatch.setattr(writer, "write_all", lambda *_: os.open(tmp_path / "none", os.O_RDONLY))
    with pytest.raises(FlashMoEError, match=r"packing stopped .*it will be fetched again"):
        pack_checkpoint(folder, tmp_path / "store", give_back=True)
    assert not (tmp_path / "store").exists()


def test_a_path_is_never_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.on_disk("org/name") == Path("org/name")
    for path in ("/org/name", "name", "a/b/c", "./other", "../other", "~/other"):
        assert hub.on_disk(path) == Path(path)
    with pytest.raises(FlashMoEError, match="no name on the hub"):
        hub.on_disk("org/name", "main")
