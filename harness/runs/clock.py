"""When each token came: the same clock for every system, ours or not. Imports nothing heavy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from harness.runs.disturbance import Watch
from harness.runs.job import Job
from harness.runs.process_usage import Usage


class Clock:
    """Told of every token, it leaves out the warm-up and says when it is enough.

    Warm-up lasts a number of tokens, or half of the job's seconds where those are slower.
    """

    def __init__(self, job: Job, on_start: Callable[[], None] = lambda: None) -> None:
        self.job = job
        self.on_start = on_start  # called once, when the warm-up is over
        self.times: list[float] = []  # from the warm-up's last token on
        self.tokens = 0
        self.warm_up_tokens = 0
        self.usage, self.others = Usage(), Watch()
        self.started = self.first_token = time.perf_counter()

    def start(self) -> None:
        """The prompt goes in now."""
        self.started = time.perf_counter()

    def token(self) -> None:
        now = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:  # which prefill gave
            self.first_token = now
        if self.times:
            self.times.append(now)
            return
        limit = self.job.decode_seconds
        late = limit is not None and now - self.first_token > limit / 2
        if late or self.tokens == 1 + self.job.warm_up_tokens:
            self.warm_up_tokens = self.tokens - 1
            self.on_start()
            self.others.take()
            self.usage.take()
            self.times.append(time.perf_counter())

    @property
    def enough(self) -> bool:
        """The job's seconds are over, and at least one token was measured."""
        limit = self.job.decode_seconds
        return limit is not None and len(self.times) > 1 and self.seconds > limit

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.times[0]

    @property
    def measured(self) -> int:
        return len(self.times) - 1

    def figures(self) -> dict[str, Any]:
        """Of the tokens after the warm-up; call it as soon as the last has come."""
        used, tokens = self.usage.since(), self.measured
        in_order = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        each = sorted(in_order)
        return {
            "tokens": tokens,
            "warm_up_tokens": self.warm_up_tokens,
            "tokens_per_second": tokens / self.seconds,
            "token_seconds": in_order,
            "token_median_seconds": each[len(each) // 2],
            "token_p95_seconds": each[int(len(each) * 0.95)],
            "token_p99_seconds": each[int(len(each) * 0.99)],
            "first_token_seconds": self.first_token - self.started,
            "device_bytes_per_token": used.device_bytes / tokens,
            "cpu_seconds_per_token": used.cpu_seconds / tokens,
            "joules_per_token": None if used.joules is None else used.joules / tokens,
        } | self.others.since()
