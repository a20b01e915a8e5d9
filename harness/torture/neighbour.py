"""A program that takes memory and gives it back, as it is told, beside one that is tested."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

STEP_BYTES = 8 << 20


class Neighbour:
    """The program, in a process of its own, until the `with` ends."""

    def __init__(self, before: Callable[[], None] | None = None) -> None:
        """before: runs in the new process."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=before,
        )  # fmt: skip

    def hold(self, size_bytes: int, bytes_per_second: float = 1e9) -> None:
        """Begin to take or to give back memory, so fast, until it holds so much."""
        assert self.process.stdin
        self.process.stdin.write(f"{size_bytes} {bytes_per_second}\n")
        self.process.stdin.flush()

    def has_it(self, within_seconds: float = 0.0) -> bool:
        """It holds what it was told to. To be asked until then. Raises EOFError if it ended."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], within_seconds)[0]:
            return False
        if not self.process.stdout.readline():
            raise EOFError
        return True

    def __enter__(self) -> Neighbour:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()


def main() -> None:
    held: list[bytearray] = []
    for line in sys.stdin:
        size_bytes, bytes_per_second = map(float, line.split())
        while len(held) != int(size_bytes) // STEP_BYTES:
            started = time.monotonic()
            if len(held) * STEP_BYTES < size_bytes:
                held.append(bytearray(b"\1") * STEP_BYTES)
            else:
                held.pop()
            time.sleep(max(0.0, started + STEP_BYTES / bytes_per_second - time.monotonic()))
        print("done", flush=True)


if __name__ == "__main__":
    main()
