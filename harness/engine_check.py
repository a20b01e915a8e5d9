"""Does an engine that speaks docs/engines.md's protocol do so correctly and honestly?"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf

from flashmoe import engines
from flashmoe.errors import FlashMoEError
from harness.progress import say
from harness.runs.engines.conversation import (
    Answer,
    BrokenProtocolError,
    Conversation,
    conversation,
)
from harness.runs.engines.second_opinion import NEAR_NATS, Given, opinions
from harness.runs.page_cache import cached_bytes, drop
from harness.runs.process_usage import Usage

PROMPT_TOKENS, NEW_TOKENS, CONTEXT_TOKENS = 24, 16, 1024
# Of the file: what the kernel may still have under way, or reads around a page.
_SLACK_SHARE, _SLACK_BYTES = 0.01, 256 << 10
# How far two clocks may be apart, as a share and in seconds: a busy machine stops one at times.
_CLOCK_SHARE, _CLOCK_SECONDS = 0.1, 0.25
_LEAST_DECODE_SHARE = 0.05  # of the first token's time, if the others were not made with it
_COUNTED_SECONDS = 3  # in which the kernel brings its count of a cgroup's memory up to date
_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Terms:
    """Under which an engine is checked. limit_bytes: of its memory, page cache included."""

    file: Path
    limit_bytes: int
    wait_seconds: float = 120.0  # for any one line
    pause_seconds: float = 1.0  # between load and run, in which nothing may be read
    seed: int | None = None  # of the prompts; None: always others, which no engine can know

    @property
    def slack_bytes(self) -> int:
        return _slack_bytes(self.file)


def check(command: str, terms: Terms) -> list[str]:
    """What it does wrong, a sentence each; none: it conforms.

    Raises FlashMoEError where the check itself cannot be made.
    """
    found: list[str] = []
    answers: list[Given] = []
    needed_bytes = least_bytes(terms.file)  # these read of the file's head, before it is dropped
    words = _vocabulary(terms.file)
    prompts = _prompts(words, terms.seed)
    reads_count = _reads_are_counted(terms.file)
    with conversation(command, terms.limit_bytes, terms.wait_seconds) as engine:
        if engine.cap is None:
            raise FlashMoEError("no memory cgroup can be made here: an engine cannot be checked")
        try:
            needed_bytes *= reads_count
            for sentence in _session(engine, terms, prompts, answers, needed_bytes):
                found.append(sentence)
        except BrokenProtocolError as error:
            found.append(str(error))
    if answers:
        found += _wrong_tokens(terms.file, words, answers)
    return found


def _slack_bytes(file: Path) -> int:
    return max(int(_SLACK_SHARE * file.stat().st_size), _SLACK_BYTES)


def least_bytes(file: Path) -> int:
    """What no answer can do without: the dense part, and in every layer one token's experts.

    Raises FlashMoEError where that is no MoE model's file.
    """
    facts = engines.engine_for(file).describe(file)
    return int(facts.dense_token_bytes + facts.touched_bytes)


def _reads_are_counted(file: Path) -> bool:
    """Drop the file from the page cache: is it gone, and does the kernel count reads of it?"""
    drop(file)
    usage = Usage()
    with open(file, "rb") as opened:
        opened.read(_PROBE_BYTES)
    counted = usage.since().device_bytes > 0
    drop(file)
    is_held = cached_bytes(file) > _slack_bytes(file)
    if is_held or not counted:
        say(
            f"{file} does not leave the page cache, or lies on no drive: whether an engine reads "
            "too little of it cannot be seen"
        )
    return counted and not is_held


def _session(
    engine: Conversation,
    terms: Terms,
    prompts: tuple[list[int], list[int]],
    answers: list[Given],
    needed_bytes: int,
) -> Iterator[str]:
    """Everything that is asked of one process, and what is seen meanwhile."""
    one, other = prompts
    engine.hello()
    before_bytes = engine.followed.read_bytes()  # of its own program
    threads = os.cpu_count() or 1
    seen, said = engine.load(terms.file, threads, CONTEXT_TOKENS, terms.limit_bytes)
    if _apart(seen, said):
        yield f"it says that loading took {said:.2f} s, and it took {seen:.2f} s"
    held = [_held_outside(engine, terms)]
    yield from _reads_before_the_clock(engine, terms)

    def ask(prompt: list[int], new_tokens: int = NEW_TOKENS) -> Answer:
        answer = engine.run(prompt, new_tokens)
        answers.append(Given(prompt, answer.token_ids))
        held.append(_held_outside(engine, terms))
        return answer

    first = ask(one)
    read_bytes = engine.followed.read_bytes() - before_bytes
    if read_bytes < needed_bytes:
        yield (
            f"it answered after {read_bytes} bytes read from the drive, and no answer needs fewer "
            f"than {needed_bytes}: something outside its limit holds the weights"
        )
    runs = [first, ask(other)]
    short = ask(one, 1)
    runs.append(ask(one))
    if runs[-1].token_ids != first.token_ids or short.token_ids != first.token_ids[:1]:
        yield (
            "it answers the same prompt otherwise after another one: the answer depends on tokens "
            "that it was not given"
        )
    lies = [lie for run in runs if (lie := _clock_lie(run))]
    if len(lies) > 1:  # one alone may be the machine's
        yield lies[0]
    if _held_back(short, runs[-1]) and _held_back(ask(one, 1), again := ask(one)):
        yield (
            f"it holds tokens back: the first of {NEW_TOKENS} came after "
            f"{again.seen_seconds[0]:.4f} s, the last after {again.seen_seconds[-1]:.4f} s, and "
            f"the first alone after {short.seen_seconds[0]:.4f} s"
        )
    yield from list(filter(None, held))[:1]
    yield from _outside_memory(engine, terms)
    engine.quit()
    if left := engine.followed.started():
        yield f"it left {len(left)} processes behind after quit"


def _vocabulary(file: Path) -> int:
    tensors = gguf.GGUFReader(file).tensors
    return next(int(t.shape[-1]) for t in tensors if t.name == "token_embd.weight")


def _prompts(words: int, seed: int | None) -> tuple[list[int], list[int]]:
    """Two prompts of ids from the whole vocabulary."""
    drawn = random.Random(seed)
    one, other = ([drawn.randrange(words) for _ in range(PROMPT_TOKENS)] for _ in range(2))
    return one, other


def _reads_before_the_clock(engine: Conversation, terms: Terms) -> Iterator[str]:
    """Between `loaded` and `run` no clock runs: so nothing may be read."""
    before = engine.followed.read_bytes(), cached_bytes(terms.file)
    time.sleep(terms.pause_seconds)
    after = engine.followed.read_bytes(), cached_bytes(terms.file)
    more = max(b - a for a, b in zip(before, after, strict=True))
    if more > terms.slack_bytes:
        yield f"it read {more} bytes between loaded and run, when no clock runs"


def _held_outside(engine: Conversation, terms: Terms) -> str | None:
    """Do its processes hold more than is charged to the limit, as if they had been elsewhere?"""
    if engine.cap is None:
        return None
    for _ in range(_COUNTED_SECONDS):
        held, charged = engine.followed.memory_bytes(), engine.cap.own_bytes()
        if held <= charged + terms.slack_bytes:
            return None
        time.sleep(1)
    return f"its processes hold {held} bytes beside files, and its limit counts {charged}"


def _outside_memory(engine: Conversation, terms: Terms) -> Iterator[str]:
    if strays := engine.outside():
        yield f"it has {len(strays)} processes outside its memory limit"
    cap = engine.cap
    if cap is None:
        return
    if cap.peak_bytes() > terms.limit_bytes:
        yield f"it took {cap.peak_bytes()} bytes, and its limit is {terms.limit_bytes}"
    cached, charged = cached_bytes(terms.file), cap.current_bytes()
    if cached > charged + terms.slack_bytes:
        yield (
            f"the page cache holds {cached} bytes of the file and its limit counts {charged}: "
            "something outside the limit reads it"
        )


def _apart(seen: float, said: float) -> bool:
    return abs(seen - said) > max(_CLOCK_SHARE * seen, _CLOCK_SECONDS)


def _clock_lie(run: Answer) -> str | None:
    for number, (seen, said) in enumerate(zip(run.seen_seconds, run.said_seconds, strict=True), 1):
        if _apart(seen, said):
            return f"its clock says {said:.2f} s at token {number}, the referee's {seen:.2f} s"
    return None


def _held_back(alone: Answer, among_others: Answer) -> bool:
    """Do the others come at once, or the first far later than alone, as if all were made first?"""
    start, first = alone.seen_seconds[0], among_others.seen_seconds[0]
    last = among_others.seen_seconds[-1]
    if last - first < _LEAST_DECODE_SHARE * first:
        return True
    return first - start > max((last - start) / 2, _CLOCK_SECONDS)


def _wrong_tokens(file: Path, words: int, answers: list[Given]) -> Iterator[str]:
    """The first token that llama.cpp does not say, nor nearly so; ties are told, not found."""
    ties = 0
    if unknown := [token for given in answers for token in given.tokens if token >= words]:
        yield f"it gave the token {unknown[0]}, and the file has {words}"
        return
    for given, found in zip(answers, opinions(file, os.cpu_count() or 1, answers), strict=True):
        for place, (token, opinion) in enumerate(zip(given.tokens, found, strict=True), 1):
            if not opinion.is_near:
                yield (
                    f"its token {place} is {token} and llama.cpp's {opinion.likeliest}, which is "
                    f"more than {NEAR_NATS} nats likelier, after the prompt {given.prompt}"
                )
                return
            ties += token != opinion.likeliest
    if ties:
        say(
            f"{ties} tokens are not llama.cpp's likeliest but within {NEAR_NATS} nats of it: "
            "other kernels round otherwise"
        )
