"""Engines of other people: an honest one passes and has its row, and every cheat is found."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from flashmoe.errors import FlashMoEError
from harness import commands, engine_check
from harness.__main__ import build_parser, main
from harness.runs.disturbance import Repeater
from harness.runs.engines import conversation
from harness.runs.engines.second_opinion import Given, opinions
from harness.runs.gguf_systems import Work, user_engine
from harness.runs.memory_cap import memory_cap
from harness.tables import server_table

MIB = 1 << 20
HONEST = f"{sys.executable} -m harness.runs.engines.reference_adapter"
CHEATING = f"{sys.executable} {Path(__file__).parents[1] / 'cheating_engine.py'}"
PROMPT = tuple(range(300, 330))

CHEATS = {
    "the_same_token": "llama.cpp's",
    "counts_up": "llama.cpp's",
    "remembers_the_last_prompt": "tokens that it was not given",
    "looks_at_how_many_are_asked": "tokens that it was not given",
    "loads_after_loaded": "bytes between loaded and run",
    "loads_a_cached_copy": "something outside its limit holds the weights",
    "loads_a_copy_in_memory": "bytes beside files, and its limit counts",
    "has_a_helper_outside": "1 processes outside its memory limit",
    "holds_memory_elsewhere": "bytes beside files, and its limit counts",
    "holds_back": "it holds tokens back",
    "holds_back_alone_too": "it holds tokens back",
    "no_such_token": f"it gave the token {1 << 40}",
    "a_slow_clock": "its clock says",
    "a_clock_that_goes_back": "its clock went backwards",
    "says_loading_was_quick": "it says that loading took 0.00 s",
    "leaves_a_process": "it left 1 processes behind",
    "dies_midway": "last words: no more tokens",
    "hangs": "it did not say 'token' within 4 s",
    "too_few": "in place of 'token'",
    "a_field_is_missing": "lacks 'seconds' of type float",
    "a_token_is_text": "lacks 'token' of type int",
    "another_protocol": "it speaks protocol 2, the referee 1",
    "another_format": "it reads no gguf",
    "no_end_of_lists": "which is no JSON object",
    "a_huge_number": "lacks 'seconds' of type float",
    "no_json": "it wrote 'model loaded!', which is no JSON object",
    "an_error": "it says: no such model",
}


@pytest.fixture(scope="module", autouse=True)
def _cgroups():
    with memory_cap(1 << 30) as cap:
        if cap is None:
            pytest.skip("no memory cgroup can be made here")


def findings(command: str, file: Path, wait_seconds: float = 60) -> list[str]:
    terms = engine_check.Terms(file, 512 * MIB, wait_seconds, pause_seconds=0.4, seed=1)
    return engine_check.check(command, terms)


def test_an_honest_engine_conforms(gguf_files):
    assert findings(HONEST, gguf_files()) == []


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_found(gguf_files, tmp_path, monkeypatch, cheat):
    copy = tmp_path / "copy.gguf"
    shutil.copy(gguf_files(), copy)
    copy.read_bytes()
    monkeypatch.setenv("CACHED_COPY", str(copy))
    with TemporaryDirectory(dir="/dev/shm") as memory:
        monkeypatch.setenv("COPY_IN_MEMORY", shutil.copy(copy, memory))
        found = findings(f"{CHEATING} {cheat}", gguf_files(), 4 if cheat == "hangs" else 60)
    assert any(CHEATS[cheat] in sentence for sentence in found), found


def test_nothing_that_an_engine_started_outlives_the_check(gguf_files):
    def sleepers() -> set[str]:
        return {
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if path.exists() and b"sleep\x00600" in path.read_bytes()
        }

    before = sleepers()
    findings(f"{CHEATING} leaves_a_process", gguf_files())
    assert sleepers() <= before


def test_the_command_ends_with_a_status_that_says_it(gguf_files, capsys):
    file = str(gguf_files())
    main(["engine-check", f"mine={HONEST}", file])
    assert capsys.readouterr().out == "mine conforms\n"
    with pytest.raises(SystemExit) as ended:
        main(["engine-check", f"mine={CHEATING} no_json", file])
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("mine: it wrote 'model loaded!'")


def test_a_file_without_experts_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF, but no more")
    with pytest.raises(FlashMoEError, match=r"m\.gguf"):
        findings(HONEST, file)


def test_a_likely_token_is_told_from_an_unlikely_one(gguf_files):
    prompt = list(PROMPT)
    ((first,),) = opinions(gguf_files(), 2, [Given(prompt, [0])])
    right = Given(prompt, [first.likeliest])
    ((same,),) = opinions(gguf_files(), 2, [right])
    assert same == (first.likeliest, True)
    assert not first.is_near


def test_a_file_that_is_no_model_is_refused_in_a_sentence(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF, but no more")
    with pytest.raises(FlashMoEError, match=r"llama.cpp has no opinion of .*m\.gguf"):
        opinions(file, 2, [Given([1], [2])])


def work(file: Path, cap_bytes: int | None = 512 * MIB) -> Work:
    return Work(Path("programs"), file, 0, PROMPT, 8, os.cpu_count() or 1, cap_bytes)


def test_an_engine_has_a_row_by_the_referees_clock(gguf_files):
    (system,) = user_engine.systems([f"mine={HONEST}"])
    run = system.run(work(gguf_files())) | {"system": "mine", "cap_share": None, "cap_bytes": 1}
    assert len(run["token_ids"]) == 8
    assert 0 < run["peak_memory_bytes"] < 512 * MIB
    (row,) = server_table.rows_of([run], 1, [system])
    assert row["outcome"] == "ok"
    assert row["tokens_per_second"] == run["tokens_per_second"]


def test_the_engines_own_clock_stands_beside_where_it_differs(gguf_files):
    (liar,) = user_engine.systems([f"liar={CHEATING} a_slow_clock"])
    run = liar.run(work(gguf_files()))
    assert run["own_tokens_per_second"] == pytest.approx(10 * run["tokens_per_second"], rel=0.2)


def test_what_an_engine_does_not_survive_is_its_outcome(gguf_files, monkeypatch, tmp_path):
    dying, tight = user_engine.systems([f"dying={CHEATING} dies_midway", f"tight={HONEST}"])
    assert tight.run(work(gguf_files(), 16 * MIB)) == {"outcome": "out of memory"}
    monkeypatch.setattr(server_table, "drop_all", lambda: None)
    calm = Repeater(0, str, product=lambda: 1.0)
    (run,) = server_table.measure(
        gguf_files(), Path("p"), [dying], (), 1, tmp_path, calm, PROMPT, 8
    )
    assert "no more tokens" in run["outcome"]


def test_an_outcome_tells_no_folders(tmp_path):
    said = conversation._words(f"hello\n{tmp_path}/mine.bin: error in /usr/lib/x.so, at 3/4\n\n")
    assert said == "mine.bin: error in x.so, at 3/4"
    assert len(conversation._words("word " * 1000)) <= 160
    (lost,) = user_engine.systems([f"mine={tmp_path}/engine --key secret"])
    with pytest.raises(FlashMoEError, match=r"^its command cannot be started: No such file or"):
        lost.run(work(tmp_path))


@pytest.mark.parametrize("words", ["no-equals-sign", "=command", "name=", ""])
def test_what_names_no_engine_is_refused(words):
    with pytest.raises(FlashMoEError, match="write NAME='command"):
        user_engine.systems([words])


def test_a_command_that_cannot_start_is_refused(gguf_files):
    with pytest.raises(FlashMoEError, match="cannot be started"):
        findings("/no/such/program", gguf_files())


def test_provenance_hides_what_runs_an_engine():
    words = ["servers", "bin/llama-server", "--engine", "mine=/home/me/run --fast"]
    line = commands.command_line(words, build_parser().parse_args(words))
    assert line == "python -m harness servers DIR --engine mine=COMMAND"
