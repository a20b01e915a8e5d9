"""The tokenizer of a model directory: what a prompt becomes, and one sentence where it cannot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_tokenizer
import transformers
from tiny_tokenizer import CHAT, ids_of

import flashmoe
from flashmoe.engines.transformers import prompting
from flashmoe.engines.transformers.prompting import Prompter
from flashmoe.errors import FlashMoEError


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """A model's configuration, without weights: those come after the tokenizer."""
    shutil.copy(checkpoints() / "config.json", tmp_path)
    return tmp_path


def complaint(folder: Path, prompt: str = "hello", **options: bool) -> str:
    with pytest.raises(FlashMoEError) as caught:
        Prompter(folder, **options).token_ids(prompt)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_prompt_is_encoded_as_transformers_does(folder):
    prompter = Prompter(tiny_tokenizer.give(folder))
    assert prompter.token_ids("hello").tolist() == [1, *ids_of("hello")]
    assert prompter.decode(prompter.token_ids("hello"), skip_special_tokens=True) == "hello"


def test_an_instruct_model_sees_its_chat_template_with_one_first_token(folder):
    tiny_tokenizer.give(folder, chat_template=CHAT)
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert Prompter(folder).token_ids("hello").tolist() == expected == [1, *ids_of("[hello]>")]
    assert Prompter(folder, raw=True).token_ids("hello").tolist() == [1, *ids_of("hello")]


def test_a_chat_template_in_a_file_of_its_own_counts_and_the_default_of_several(folder):
    tiny_tokenizer.give(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("other")
    assert Prompter(folder).token_ids("hello").tolist() == [1, *ids_of("[hello]>")]


def test_a_template_that_wants_parts_is_given_parts(folder):
    template = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
    tiny_tokenizer.give(folder, chat_template=template)
    assert Prompter(folder).token_ids("hello").tolist() == ids_of("hello")
    strict = "{% if messages[0]['content'] is string %}{{ raise_exception('no') }}{% endif %}"
    tiny_tokenizer.give(folder, chat_template=strict + template)
    assert Prompter(folder).token_ids("hello").tolist() == ids_of("hello")


def test_a_template_may_change_the_prompt(folder):
    tiny_tokenizer.give(folder, chat_template="{{ messages[0]['content'] | trim | upper }}")
    assert Prompter(folder).token_ids(" hello ").tolist() == ids_of("HELLO")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only system messages') }}", "only system messages"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].nothing.at_all }}", "undefined|has no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe|undefined"),
        ("constant", "leaves the prompt out"),
        (5, r"\("),
        ({"tools": CHAT}, r"\("),
    ],
)
def test_a_chat_template_that_fails_is_one_sentence_and_raw_goes_without(folder, template, why):
    tiny_tokenizer.give(folder, chat_template=template)
    said = complaint(folder)
    assert re.search(why, said), said
    assert said.endswith("go without it by --raw")
    assert Prompter(folder, raw=True).token_ids("a").tolist() == [1, *ids_of("a")]


def test_a_directory_without_a_tokenizer_says_so(folder):
    assert "holds no tokenizer; copy" in complaint(folder)
    # transformers would make up one with no words
    for made_up in ("GPT2Tokenizer", "LlamaTokenizer", "T5Tokenizer", "Qwen2Tokenizer"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": made_up}))
        assert "holds no tokenizer; copy" in complaint(folder)
    (folder / "tokenizer.json").mkdir()
    assert "holds no tokenizer; copy" in complaint(folder)


def test_code_of_the_checkpoint_is_named_and_never_run(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    classes = {"AutoTokenizer": ["code.Their", None]}
    config = {"tokenizer_class": "TheirTokenizer", "auto_map": classes}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    assert "code of the checkpoint's own (code.Their), which is never run" in complaint(folder)
    (folder / "their.tiktoken").write_text("aGk= 0\n")
    assert "code of the checkpoint's own (code.Their), which is never run" in complaint(folder)
    config = {"auto_map": {"AutoTokenizer": [None, "code.Fast"]}}
    (folder / "config.json").unlink()
    shutil.copy(flashmoe.demo_path() / "config.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "(code.Fast), which is never run" in complaint(folder)
    tiny_tokenizer.give(folder, **config)  # whose tokenizer.json needs none of it
    assert len(Prompter(folder).token_ids("hello"))
    (folder / "tokenizer.json").write_text("{")
    assert "copy them anew" in complaint(folder)


def test_a_library_that_is_missing_is_named(folder, monkeypatch):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.model").write_text("garbage")
    monkeypatch.setattr(prompting, "find_spec", lambda name: None)
    assert "`pip install protobuf sentencepiece tiktoken` to read" in complaint(folder)
    monkeypatch.setattr(prompting, "find_spec", lambda name: name)
    said = complaint(folder)
    assert "from tokenizer.model, tokenizer_config.json (" in said
    assert said.endswith("; copy them anew from where the weights came")


@pytest.mark.parametrize(
    "content", [b"", b'{"version": "1.0", ', b"{}", b"[]", b"null", b"\xff\xfe\x00", b"[" * 99999]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_one_sentence(folder, name, content):
    tiny_tokenizer.give(folder)
    (folder / name).write_bytes(content)
    try:
        assert len(Prompter(folder).token_ids("hello"))  # {} is a configuration without settings
    except FlashMoEError as error:
        assert str(error).startswith(f"{folder}: no tokenizer can be loaded from tokenizer.json, ")
    else:
        assert (name, content) == ("tokenizer_config.json", b"{}")


@pytest.mark.parametrize(
    "setting",
    [
        {"tokenizer_class": 5}, {"tokenizer_class": "RagTokenizer"}, {"auto_map": 5},
        {"tokenizer_class": "BertJapaneseTokenizer"}, {"added_tokens_decoder": {"x": "y"}},
        {"bos_token": [1]}, {"fast_tokenizer_files": 5},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_one_sentence(folder, setting):
    tiny_tokenizer.give(folder, **setting)
    assert "no tokenizer can be loaded" in complaint(folder)


def test_a_panic_of_a_library_is_one_sentence(folder, monkeypatch):
    class PanicException(BaseException):  # as pyo3's, which is no Exception
        pass

    prompter = Prompter(tiny_tokenizer.give(folder))

    def panics(*_, **__):
        raise PanicException

    monkeypatch.setattr(prompter, "tokenizer", panics)
    with pytest.raises(FlashMoEError, match=r"cannot encode \(PanicException\)"):
        prompter.token_ids("hello")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prompter, "tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prompter.token_ids("hello")


def test_prompts_that_are_none_are_one_sentence(folder):
    tiny_tokenizer.give(folder)
    assert "the prompt is empty" in complaint(folder, "")
    assert "not valid UTF-8" in complaint(folder, "\udcff")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text()) | {"post_processor": None}
    path.write_text(json.dumps(content))
    assert "makes no token of the prompt" in complaint(folder, "\N{SNOWMAN}")


def test_another_models_tokenizer_is_named_before_the_model_meets_its_tokens(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(flashmoe.demo_path() / name, folder)
    assert "but the model knows 128 (0..127), so it is another model's" in complaint(folder)


def test_a_directory_that_is_no_model_is_told_as_such(tmp_path):
    assert "no such directory" in complaint(tmp_path / "none")
    assert "no config.json" in complaint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not a configuration" in complaint(tmp_path)
    assert "no such directory" in complaint(tmp_path / "config.json")
    assert "cannot be read (File name too long)" in complaint(tmp_path / ("x" * 300))
