"""Speaks the protocol of docs/engines.md with one engine, under a limit; the clock is ours."""

from __future__ import annotations

import json
import math
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from flashmoe.errors import FlashMoEError
from harness.runs.engines.followed import Followed
from harness.runs.memory_cap import Cap, memory_cap

PROTOCOL = 1
_LINE_BYTES = 1 << 20  # a longer line is no answer
_LARGEST_NUMBER = 1 << 63
_WORDS_BYTES, _WORDS_LENGTH = 4096, 160  # of what an engine says in its own words
_QUIT_SECONDS = 30.0
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # the second as a shell says it


class BrokenProtocolError(FlashMoEError):
    """The engine did not do what the protocol asks of it."""


class OutOfMemoryError(BrokenProtocolError):
    """The limit killed it."""


@dataclass
class Answer:
    """The tokens of one run; each one's seconds since it was asked for, by both clocks."""

    token_ids: list[int] = field(default_factory=list)
    seen_seconds: list[float] = field(default_factory=list)
    said_seconds: list[float] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)
    decode_read_bytes: int = 0  # from drives, after the first token

    @property
    def seen_rate(self) -> float:
        return _rate(self.seen_seconds)

    @property
    def said_rate(self) -> float:
        return _rate(self.said_seconds)


def _rate(seconds: list[float]) -> float:
    """Tokens a second after the first, which the prompt gave."""
    span = seconds[-1] - seconds[0]
    return (len(seconds) - 1) / span if span > 0 else math.inf


@dataclass
class Conversation:
    """With a running engine. Every method raises BrokenProtocolError, with one sentence."""

    process: subprocess.Popen[bytes]
    cap: Cap | None
    followed: Followed
    wait_seconds: float  # for any one line
    _errors: BinaryIO
    started: float = field(default_factory=time.perf_counter)
    _pending: bytes = b""
    _arrived: float = 0.0  # when the last bytes came

    def hello(self) -> dict[str, Any]:
        """Raises BrokenProtocolError where it speaks another protocol or reads no GGUF."""
        self._ask("hello", protocol=PROTOCOL)
        said = self._answer("hello", protocol=int, name=str, version=str, formats=list)
        if said["protocol"] != PROTOCOL:
            raise BrokenProtocolError(
                f"it speaks protocol {said['protocol']}, the referee {PROTOCOL}"
            )
        if "gguf" not in said["formats"]:
            raise BrokenProtocolError(f"it reads no gguf, only {said['formats']}")
        return said

    def load(self, file: Path, threads: int, context_tokens: int, limit_bytes: int | None) -> Any:
        """Seconds that it took: as seen, and as the engine says."""
        started = self._ask(
            "load",
            file=str(file),
            memory_limit_bytes=limit_bytes,
            threads=threads,
            context_tokens=context_tokens,
        )
        said = self._answer("loaded", seconds=float)
        return self._arrived - started, said["seconds"]

    def run(self, token_ids: list[int], new_tokens: int) -> Answer:
        started = self._ask("run", token_ids=token_ids, new_tokens=new_tokens)
        answer, before = Answer(), 0
        while len(answer.token_ids) < new_tokens:
            said = self._answer("token", token=int, seconds=float)
            if answer.said_seconds and said["seconds"] < answer.said_seconds[-1]:
                raise BrokenProtocolError("its clock went backwards between two tokens")
            answer.token_ids.append(said["token"])
            answer.seen_seconds.append(self._arrived - started)
            answer.said_seconds.append(said["seconds"])
            if len(answer.token_ids) == 1:
                before = self.followed.read_bytes()
        answer.decode_read_bytes = self.followed.read_bytes() - before
        answer.counters = self._answer("done")
        return answer

    def quit(self) -> None:
        self._ask("quit")
        try:
            status = self.process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise BrokenProtocolError(
                f"it did not end within {_QUIT_SECONDS:g} s of quit"
            ) from None
        if status:
            raise BrokenProtocolError(f"it ended with status {status} after quit")

    def outside(self) -> list[int]:
        """Processes that it started and that are not under its limit."""
        inside = self.cap.process_ids() if self.cap else set()
        return [p.pid for p in self.followed.started() if self.cap and p.pid not in inside]

    def _ask(self, what: str, **fields: Any) -> float:
        """When it was asked."""
        line = json.dumps({"ask": what} | fields).encode() + b"\n"
        started = time.perf_counter()
        try:
            assert self.process.stdin
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            raise self._ended(f"before it could be asked to {what}") from None
        return started

    def _answer(self, expected: str, **kinds: type) -> dict[str, Any]:
        line = self._line(expected)
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise BrokenProtocolError(f"it wrote {_cut(line)}, which is no JSON object")
        if said.get("say") == "error":
            raise BrokenProtocolError(f"it says: {_words(str(said.get('message')))}")
        if said.get("say") != expected:
            raise BrokenProtocolError(f"it wrote {_cut(line)} in place of {expected!r}")
        for name, kind in kinds.items():
            said[name] = _field(said, name, kind, line)
        return said

    def _line(self, expected: str) -> bytes:
        assert self.process.stdout
        source = self.process.stdout.fileno()
        until = time.monotonic() + self.wait_seconds
        while b"\n" not in self._pending:
            left = until - time.monotonic()
            if left <= 0 or not select.select([source], [], [], left)[0]:
                raise BrokenProtocolError(
                    f"it did not say {expected!r} within {self.wait_seconds:g} s"
                )
            part = os.read(source, 1 << 16)
            if not part:
                raise self._ended(f"before it said {expected!r}")
            self._arrived = time.perf_counter()
            self._pending += part
            if len(self._pending) > _LINE_BYTES:
                raise BrokenProtocolError(f"it wrote more than {_LINE_BYTES} bytes of one line")
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _ended(self, when: str) -> BrokenProtocolError:
        try:
            status: int | None = self.process.wait(5)
        except subprocess.TimeoutExpired:
            status = None
        if status in _KILLED and self.cap:
            return OutOfMemoryError(f"it was killed {when}: out of memory")
        length = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, length - _WORDS_BYTES))
        words = _words(self._errors.read().decode(errors="replace"))
        return BrokenProtocolError(f"it ended {when} (status {status}), its last words: {words}")


def _field(said: dict[str, Any], name: str, kind: type, line: bytes) -> Any:
    value: Any = said.get(name)
    kinds = (int, float) if kind is float else (kind,)
    sound = isinstance(value, kinds) and not isinstance(value, bool)
    if sound and kind in (int, float):
        sound = 0 <= value < _LARGEST_NUMBER
    if not sound:
        raise BrokenProtocolError(f"its {_cut(line)} lacks {name!r} of type {kind.__name__}")
    return kind(value)


def _words(text: str) -> str:
    """The last line, not too long, and without anyone's folders: a table may show it."""
    lines = text.strip().splitlines() or ["nothing"]
    return re.sub(r"(?<!\S)[^\s/]*/\S*/", "", lines[-1])[:_WORDS_LENGTH]


def _cut(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


@contextmanager
def conversation(
    command: str, limit_bytes: int | None, wait_seconds: float
) -> Iterator[Conversation]:
    """Start an engine in a cgroup of its own; whatever it started is ended afterwards.

    command: as for a shell, but no shell runs it. Raises FlashMoEError where it cannot be started.
    """
    with (
        memory_cap(limit_bytes) as cap,
        Followed() as followed,
        tempfile.TemporaryFile() as errors,
    ):
        try:
            process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                preexec_fn=cap.enter if cap else None,
            )
        except (OSError, ValueError, IndexError) as error:
            why = (isinstance(error, OSError) and error.strerror) or error
            raise FlashMoEError(f"its command cannot be started: {why}") from None
        try:
            yield Conversation(process, cap, followed, wait_seconds, errors)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    if pipe:
                        pipe.close()
