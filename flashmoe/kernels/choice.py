"""Multiplies by a plain bfloat16 weight in the way that is the fastest on this machine.

Which way that is gets measured once for each shape, and kept on disk: so a model gives the same
bits whenever it is loaded here. What was measured while others used the processor is not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import resource
import secrets
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import cycle, groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from flashmoe.kernels import by_rows, by_tiles, packed
from flashmoe.util.machine_code import cache_folder

logger = logging.getLogger(__name__)

TOKENS = (1, 2, 4, 8, 16, 32, 128)  # for so many it is measured; others count as the next of them
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WAYS: dict[str, Product] = {"torch": F.linear, "rows": by_rows.product, "tiles": by_tiles.product}
_ROWS = 1024  # of a weight are enough to measure
_WEIGHTS = 9  # in turn, so that large ones come from memory
_ROUNDS, _LONG_ROUNDS = 8, 3  # times of few tokens, and of many
_LONG_SECONDS = 0.05  # one such time is enough
_TRIES = 3  # to measure while nobody else uses the processor
_MOST_SWITCHES = 90  # a second; a busy program beside this one causes hundreds
_GAIN = 0.95  # another way than torch's own must take less than this share of its time


class Shape(NamedTuple):
    """Of a weight: out, in, and whether it lies in memory as [in, out]."""

    rows: int
    columns: int
    transposed: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}{'-transposed' * self.transposed}"


class Choice(NamedTuple):
    """ways: of each of TOKENS. packed: oneDNN's own layout is faster still for one token."""

    ways: tuple[str, ...]
    packed: bool

    def __str__(self) -> str:
        named = groupby(zip(TOKENS, self.ways, strict=True), key=lambda pair: pair[1])
        return ", ".join(f"{way} to {[t for t, _ in pairs][-1]}" for way, pairs in named)


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Is there more than one way to multiply these?"""
    return (x.dtype, weight.dtype, x.device.type) == (torch.bfloat16, torch.bfloat16, "cpu")


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] times a weight [out, in], or a view of an [in, out] one: [n, out], bfloat16.

    Rows are contiguous, without which attention would hold all of its weights at once.
    """
    out = WAYS[_way(len(x), weight)](x, weight)
    return out.to(x.dtype, memory_format=torch.contiguous_format)


def products(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `product`, of many weights alike: x [many, n, in] float32 -> [many, n, out] float32."""
    way = _way(x.shape[1], weights[0])
    if way == "rows":
        return by_rows.products(x, weights)
    each = zip(x.to(torch.bfloat16), weights, strict=True)
    return torch.stack([WAYS[way](x, weight).to(torch.float32) for x, weight in each])


def _way(tokens: int, weight: torch.Tensor) -> str:
    ways = choice(Shape(weight.shape[0], weight.shape[1], not weight.is_contiguous())).ways
    return ways[min(bisect_left(TOKENS, tokens), len(ways) - 1)]


@cache
def choice(shape: Shape) -> Choice:
    """What is the fastest for weights of this shape: as it was measured here the first time."""
    try:
        path = cache_folder() / "kernels" / f"{_machine()}-{shape}.json"
    except RuntimeError as error:  # no home
        logger.debug("not kept: %s", error)
        return _measure(shape)
    if kept := _kept(path):
        return kept
    for _ in range(_TRIES):
        started, switches = time.perf_counter(), _switches()
        measured = _measure(shape)
        if _switches() - switches <= _MOST_SWITCHES * (time.perf_counter() - started):
            return _keep(path, measured)
    logger.debug("%s: not kept, because the processor was busy", shape)
    return measured


def _switches() -> int:
    """How often a thread of this process had to make way for another program."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _kept(path: Path) -> Choice | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_bytes())
        ways = tuple(str(found["ways"][str(tokens)]) for tokens in TOKENS)
        if WAYS.keys() >= set(ways):
            return Choice(ways, bool(found["packed"]))
    return None


def _keep(path: Path, measured: Choice) -> Choice:
    """What is there now: another process may have been first."""
    named = dict(zip(TOKENS, measured.ways, strict=True))
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"ways": named, "packed": measured.packed}))
        try:
            os.link(partial, path)
        except FileExistsError:
            if kept := _kept(path):
                return kept
            partial.replace(path)  # it is damaged
    except OSError as error:
        logger.debug("not kept: %s", error)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return measured


@cache
def _machine() -> str:
    """A digest of all that decides which way is the fastest."""
    cpus = Path("/proc/cpuinfo")
    cpu = re.search(r"model name.*", cpus.read_text() if cpus.exists() else "")
    words = [
        os.uname().machine,
        cpu[0] if cpu else "",
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        *(os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "NUMBA_CPU_NAME")),
        *(file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))),
    ]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


@torch.inference_mode()
def _measure(shape: Shape) -> Choice:
    weights = _weights(shape)
    ways = []
    names = list(WAYS) if not shape.transposed else [name for name in WAYS if name != "rows"]
    for tokens in TOKENS:
        x = torch.ones(tokens, shape.columns, dtype=torch.bfloat16)
        seconds = _least_seconds({name: WAYS[name] for name in names}, x, weights)
        fastest = min(seconds, key=seconds.__getitem__)
        ways.append(fastest if seconds[fastest] < _GAIN * seconds["torch"] else "torch")
        # by rows every token costs as much as the first one
        if "rows" in seconds and seconds["rows"] > 2 * seconds[fastest]:
            names.remove("rows")
        if tokens == 1:
            one = seconds[ways[0]]
    return Choice(tuple(ways), not shape.transposed and _packed_seconds(weights) < _GAIN * one)


def _weights(shape: Shape) -> list[torch.Tensor]:
    rows = min(shape.rows, _ROWS)
    size = rows * shape.columns
    parts = torch.ones(_WEIGHTS, size, dtype=torch.bfloat16)
    if shape.transposed:
        return [part.view(shape.columns, rows).T for part in parts]
    return [part.view(rows, shape.columns) for part in parts]


def _packed_seconds(weights: list[torch.Tensor]) -> float:
    try:
        rearranged = [packed.rearranged(weight) for weight in weights]
    except (AttributeError, RuntimeError):
        return float("inf")
    x = torch.ones(1, weights[0].shape[1], dtype=torch.bfloat16)
    return _least_seconds({"packed": packed.product}, x, rearranged)["packed"]


def _least_seconds(
    ways: dict[str, Product], x: torch.Tensor, weights: list[torch.Tensor]
) -> dict[str, float]:
    """Of each way the least of a few times, after one that may have had to compile something.

    In turn, so that what disturbs one disturbs all, and each by the weight that was used longest
    ago, so that none finds it in a cache.
    """
    for way in ways.values():
        way(x, weights[0])
    least = dict.fromkeys(ways, float("inf"))
    next_weight = cycle(weights)
    for _ in range(_LONG_ROUNDS if len(x) > TOKENS[2] else _ROUNDS):
        for name, way in ways.items():
            weight = next(next_weight)
            started = time.perf_counter()
            way(x, weight)
            least[name] = min(least[name], time.perf_counter() - started)
        if max(least.values()) > _LONG_SECONDS:
            break
    return least
