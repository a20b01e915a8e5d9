"""What `flashmoe serve` does to an answer: beside one asked alone, and beside plain generation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import flashmoe
from flashmoe.errors import FlashMoEError
from harness.progress import say
from harness.report import report
from harness.runs.served import Prompt, Served

REQUESTS, CLIENTS, HANGING_UP_ONE_IN = 200, 8, 10
ANSWER_TOKENS, ABANDONED_TOKENS = 8, 400
WARM_UP_REQUESTS = 50  # until what grows once has grown
TURN_TOKENS, NEW_TOKENS, CONVERSATIONS = 1990, 50, 3  # the demo takes 2,048 in all
DECODED_TOKENS, SHORT_TOKENS = 96, 4
MEMORY = "64GiB"  # all experts are resident, so that no drive's noise is in a ratio
Plain = Callable[[Prompt], float]  # seconds a token, of plain generation


def served_table(
    folder: Path, command: str, model: Path | None, bench: Path | None, rounds: int
) -> None:
    """Write the row of this model (default: the demo) beside those of the other engine.

    model: a GGUF file, or what `flashmoe.load` takes. bench: llama-bench, the plain form of a GGUF.
    """
    path = model or flashmoe.demo_path()
    is_gguf = path.suffix == ".gguf"
    with report.scratch(folder) as work:
        log = work / "log"
        with Served(path, MEMORY, log) as served, _plain(path, bench) as plain:
            prompts = _Prompts(ids=is_gguf)
            row: dict[str, Any] = {"engine": "llama.cpp" if is_gguf else "transformers"}
            say(f"{REQUESTS} requests of {CLIENTS} clients")
            row |= crowd(served, prompts)
            say(f"{CONVERSATIONS} conversations of two turns")
            row |= second_turn(served, prompts)
            say(f"{rounds} rounds of decode")
            row |= decode(served, prompts.short(0), plain, rounds)
    name = f"served-{'llama' if is_gguf else 'transformers'}"
    report.write(folder, name, [row])
    report.record(folder, name, command, seed=0)


class _Prompts:
    """Prompts of any length: of words, or of token ids where a made-up tokeniser has no words."""

    _SENTENCE = "and it came to pass that the king said unto his servants go up into the land"

    def __init__(self, *, ids: bool) -> None:
        self._ids = ids

    def short(self, number: int) -> Prompt:
        return self.of(12, number)

    def of(self, length: int, seed: int) -> Prompt:
        picks = np.random.default_rng(seed).integers(0, 1 << 30, length)
        if self._ids:
            return [int(3 + pick % 200) for pick in picks]
        words = self._SENTENCE.split()
        return " ".join(words[pick % len(words)] for pick in picks)

    def longer(self, prompt: Prompt, answer: str, length: int) -> Prompt:
        """The next turn: what was said, and `length` more."""
        more = self.of(length, 99)
        return prompt + more if self._ids else f"{prompt}{answer} {more}"  # type: ignore[operator]


def crowd(served: Served, prompts: _Prompts) -> dict[str, Any]:
    """Many clients at once: does each get what it gets alone, and does anything grow?"""
    texts = [prompts.short(number) for number in range(4)]
    alone = [served.complete(text, ANSWER_TOKENS).text for text in texts]

    def ask(number: int) -> bool | None:
        prompt, expected = texts[number % len(texts)], alone[number % len(texts)]
        if number % HANGING_UP_ONE_IN == HANGING_UP_ONE_IN // 2:
            served.hang_up(prompt, ABANDONED_TOKENS)
            return None
        if number % 2:
            return served.stream(prompt, ANSWER_TOKENS)[0] == expected
        return served.complete(prompt, ANSWER_TOKENS).text == expected

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, range(WARM_UP_REQUESTS)))
        served.complete(texts[0], 1)  # behind all that was abandoned
        before = served.usage()
        answers = list(clients.map(ask, range(REQUESTS)))
        served.complete(texts[0], 1)
        after = served.usage()
    row: dict[str, Any] = {
        "requests": REQUESTS, "hung_up": answers.count(None), "equal": answers.count(True),
        "different": answers.count(False),
    }  # fmt: skip
    for name in before._fields:
        row |= {f"{name}_before": getattr(before, name), f"{name}_after": getattr(after, name)}
    return row


def second_turn(served: Served, prompts: _Prompts) -> dict[str, Any]:
    """First token of a long conversation, and of its next turn, of which a prefix is kept."""
    firsts, seconds, counts = [], [], []
    for number in range(CONVERSATIONS):
        prompt = prompts.of(TURN_TOKENS, 1000 + number)
        first = served.complete(prompt, 1)
        second = served.complete(prompts.longer(prompt, first.text, NEW_TOKENS), 1)
        firsts.append(first.seconds)
        seconds.append(second.seconds)
        counts.append((first.prompt_tokens, second.prompt_tokens))
    return {
        "first_turn_tokens": counts[0][0],
        "second_turn_tokens": counts[0][1],
        "first_turn_seconds": float(np.median(firsts)),
        "second_turn_seconds": float(np.median(seconds)),
        "second_turn_share": float(np.median(np.array(seconds) / firsts)),
    }


def decode(served: Served, prompt: Prompt, plain: Plain, rounds: int) -> dict[str, Any]:
    """Seconds a decoded token: whole, streamed, watched, and plain, in turn."""

    def seconds(ask: Callable[[int], float]) -> float:
        return (ask(DECODED_TOKENS) - ask(SHORT_TOKENS)) / (DECODED_TOKENS - SHORT_TOKENS)

    def whole(tokens: int) -> float:
        answer = served.complete(prompt, tokens)
        if answer.tokens != tokens:
            raise FlashMoEError(f"the server gave {answer.tokens} tokens of {tokens}")
        return answer.seconds

    def streamed(tokens: int) -> float:
        return served.stream(prompt, tokens)[1][-1]

    def watched() -> float:
        with served.watched():
            return seconds(whole)

    ways: dict[str, Callable[[], float]] = {
        "plain": lambda: plain(prompt), "whole": lambda: seconds(whole),
        "streamed": lambda: seconds(streamed), "watched": watched,
    }  # fmt: skip
    for way in ways.values():
        way()  # compiles, reads and fills caches
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in order:
            times[name].append(ways[name]())
    row: dict[str, Any] = {"rounds": rounds}
    for name, found in times.items():
        row[f"{name}_tokens_per_second"] = 1 / float(np.median(found))
    for name, beside in (("whole", "plain"), ("streamed", "plain"), ("watched", "whole")):
        ratios = np.array(times[beside]) / times[name]
        row[f"{name}_of_{beside}"] = float(np.median(ratios))
        row[f"{name}_of_{beside}_min"] = float(ratios.min())
        row[f"{name}_of_{beside}_max"] = float(ratios.max())
    return row


@contextmanager
def _plain(path: Path, bench: Path | None) -> Iterator[Plain]:
    if path.suffix == ".gguf":
        if bench is None:
            raise FlashMoEError("--bench must name llama-bench: it is the plain form of a GGUF")
        yield lambda prompt: _bench(path, bench)
        return
    child = subprocess.Popen(
        [sys.executable, "-m", "harness.runs.plain_child", str(path), MEMORY],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def ask(prompt: Prompt, tokens: int) -> float:
        assert child.stdin and child.stdout
        print(json.dumps({"prompt": prompt, "tokens": tokens}), file=child.stdin, flush=True)
        answer = json.loads(child.stdout.readline())
        return float(answer["seconds"])

    with child:
        try:
            yield (
                lambda prompt: (
                    (ask(prompt, DECODED_TOKENS) - ask(prompt, SHORT_TOKENS))
                    / (DECODED_TOKENS - SHORT_TOKENS)
                )
            )
        finally:
            child.kill()


def _bench(path: Path, bench: Path) -> float:
    """Seconds a token of `flashmoe run llama-bench`'s second run, when the experts are there."""
    done = subprocess.run(
        [sys.executable, "-m", "flashmoe", "run", "--memory", MEMORY, str(bench), "-m", str(path),
         "-p", "0", "-n", str(DECODED_TOKENS), "-r", "2", "-o", "json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return 1 / float(json.loads(done.stdout)[0]["samples_ts"][-1])
