"""How disturbed a machine was while something was measured on it, and what is measured again.

A run is disturbed when others had more than a tenth of the cores' time, or when a fixed product
just before or after it took half as long again as its least. The services of a machine that does
nothing else take a hundredth or two of two cores; a program that computes on one of them takes
half, and a host that gives its cores to others as well doubles what a product takes.

What else is counted says how it was, and decides nothing: threads of a run that wait for each
other's cores are a part of that run. Imports nothing heavy: peers have environments of their own.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = dict[str, Any]

OTHERS_SHARE = 0.1  # of the cores' time, which others may have beside an undisturbed run
SLOWDOWN = 1.5  # times its least, which the fixed product may take beside it
AGAIN = 2  # times that a disturbed run is measured again at most
# Of repeats in one table, together: a disturbance that lasts shall not double a table's time.
AGAIN_SECONDS, QUICK_AGAIN_SECONDS = 900.0, 40.0

_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_LEAST_OTHERS_SECONDS = 10 * _TICK_SECONDS  # less may be what whole ticks leave
_KTHREADD = "2"  # the parent of all the kernel's own threads, such as those that write or decrypt
_SIDE = 1024  # of the square matrices of the product
PRODUCT_OPERATIONS = 2 * _SIDE**3
_PRODUCT_SECONDS = 0.2  # long enough that a hiccup of a thread does not matter


@dataclass(frozen=True)
class _Counters:
    """Of one moment; seconds since some start."""

    at: float
    busy: float  # of this process's cores: programs, and the kernel's work for them
    stolen: float  # when the host of a virtual machine ran others
    kernel: float  # of the kernel's own threads, which work for the run as well
    own: float  # of this process and of those of its children that have ended
    waited: float | None  # some thread had no core; None: this kernel does not tell
    switches: int


class Watch:
    """What others had of this process's cores since `take`, or since it was made.

    Children count as its own once they have ended.
    """

    def __init__(
        self,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
        usage: Callable[[int], Any] = resource.getrusage,
    ) -> None:
        self._proc, self._clock, self._usage = proc, clock, usage
        self._cores = sorted(os.sched_getaffinity(0))
        self.take()

    def take(self) -> None:
        self._before = self._counters()

    def since(self) -> Run:
        """Shares of the cores' time, of the time, and a rate; empty where Linux does not tell."""
        now, before = self._counters(), self._before
        if now is None or before is None or now.at <= before.at:
            return {}
        seconds = now.at - before.at
        cores = seconds * len(self._cores)
        stolen = now.stolen - before.stolen
        others = now.busy - before.busy - (now.own - before.own) - (now.kernel - before.kernel)
        taken = max(others, 0.0) + stolen
        waited = None if None in (now.waited, before.waited) else now.waited - before.waited  # type: ignore[operator]
        return {
            "others_share": min(taken / cores, 1.0) if taken > _LEAST_OTHERS_SECONDS else 0.0,
            "stolen_share": min(stolen / cores, 1.0),
            "waiting_share": None if waited is None else min(waited / seconds, 1.0),
            "involuntary_switches_per_second": (now.switches - before.switches) / seconds,
        }

    def _counters(self) -> _Counters | None:
        used = [self._usage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        try:
            lines = (self._proc / "stat").read_text().splitlines()
            cores = dict(line.split(maxsplit=1) for line in lines if line.startswith("cpu"))
            # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [[int(n) for n in cores[f"cpu{core}"].split()] for core in self._cores]
        except (OSError, KeyError, ValueError):
            return None
        return _Counters(
            at=self._clock(),
            busy=sum(sum(core[:3]) for core in ticks) * _TICK_SECONDS,
            stolen=sum(core[7] for core in ticks) * _TICK_SECONDS,
            kernel=sum(self._kernel_ticks()) * _TICK_SECONDS,
            own=sum(one.ru_utime + one.ru_stime for one in used),
            waited=self._waited(),
            switches=sum(one.ru_nivcsw for one in used),
        )

    def _kernel_ticks(self) -> Iterator[int]:
        for path in self._proc.glob("[0-9]*/stat"):
            with suppress(OSError, ValueError):  # it may have ended
                # a name in parentheses may have spaces
                state = path.read_text().rpartition(")")[2].split()
                if state[1] == _KTHREADD:
                    yield int(state[11]) + int(state[12])

    def _waited(self) -> float | None:
        """Pressure stall information, of the whole machine."""
        with suppress(OSError, ValueError, StopIteration):
            lines = (self._proc / "pressure" / "cpu").read_text().splitlines()
            some = next(line for line in lines if line.startswith("some"))
            return int(some.rpartition("total=")[2]) / 1e6
        return None


def product_seconds() -> float:
    """How long a fixed product of float32 takes on all cores: the mean of 0.2 seconds' worth."""
    import torch

    left, right = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
    left @ right  # cores that slept come back, and threads are made
    started, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < _PRODUCT_SECONDS or done < 2:
        left @ right
        done += 1
    return seconds / done


class Repeater:
    """Measures runs, and measures again what was disturbed, within so many seconds in all."""

    def __init__(
        self,
        again_seconds: float,
        say: Callable[[str], None],
        product: Callable[[], float] = product_seconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left, self._say, self._product, self._clock = again_seconds, say, product, clock
        self._last = product()
        self.least_product_seconds = min(self._last, product())

    def least_disturbed(self, attempt: Callable[[], Run]) -> Run:
        """The run of `attempt` that was disturbed least, with `disturbed`: was it, though?

        attempt: gives its figures with those of a Watch, if any. A run that was killed or refused
        is not repeated: another outcome is no better figure.
        """
        best, seconds = self._timed(attempt)
        for _ in range(AGAIN):
            if best["outcome"] != "ok" or not disturbed(best) or seconds > self._left:
                break
            self._say(f"{_why(best)}: measured again")
            again, seconds = self._timed(attempt)
            self._left -= seconds
            if again["outcome"] == "ok":
                best = min(best, again, key=_severity)
        return best | {"disturbed": disturbed(best)}

    def _timed(self, attempt: Callable[[], Run]) -> tuple[Run, float]:
        started, before = self._clock(), self._last
        run = attempt()
        self._last = self._product()
        self.least_product_seconds = min(self.least_product_seconds, self._last)
        slowdown = max(before, self._last) / self.least_product_seconds
        return run | {"product_slowdown": slowdown}, self._clock() - started


def disturbed(run: Run) -> bool:
    """Did others have more of the machine than an undisturbed run leaves them?"""
    return _severity(run) > 1


def _severity(run: Run) -> float:
    """1 at the bounds of either sign, whichever is worse."""
    slowdown = (run.get("product_slowdown") or 1) - 1
    return max((run.get("others_share") or 0) / OTHERS_SHARE, slowdown / (SLOWDOWN - 1))


def _why(run: Run) -> str:
    if (run.get("others_share") or 0) > OTHERS_SHARE:
        return f"others had {run['others_share']:.0%} of the cores' time"
    return f"a fixed product took {run['product_slowdown']:.1f} times its least"


FIGURES = (
    "others_share",
    "stolen_share",
    "waiting_share",
    "involuntary_switches_per_second",
    "product_slowdown",
)


def columns(runs: Sequence[Run]) -> Run:
    """Of a row: was a round disturbed, and the most of each figure; None: not told."""
    told = {name: [run[name] for run in runs if run.get(name) is not None] for name in FIGURES}
    flags = [run["disturbed"] for run in runs if "disturbed" in run]
    return {"disturbed": any(flags) if flags else None} | {
        name: max(values, default=None) for name, values in told.items()
    }
