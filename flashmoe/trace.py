"""The trace file: which experts the routers of a model chose, token by token."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.disk import files, plain_npz
from flashmoe.errors import FlashMoEError

_OPTIONAL = ("weights", "probabilities", "step", "guesses", "computed")


@dataclass
class Trace:
    """Recorded routing. Its file is a plain .npz without pickles, beside a description in JSON.

    experts: [tokens, layers, top_k] uint8 or uint16, distinct within a token and layer.
    sequence: [tokens] integers: which prompt, with its answer, a token belongs to; contiguous.
    n_experts: experts in each layer.
    weights: [tokens, layers, top_k] float16, the router's weights of `experts`, or None.
    probabilities: [tokens, layers, n_experts] float16, the router's for all experts, or None.
    step: [tokens] int32, the forward pass that computed the token, or None.
    guesses: [tokens, layers - 1, top_k] uint8 or uint16, or None: the experts that the router of
        each layer but the first chooses, best first, for the hidden state at the layer below.
    computed: [tokens, layers] bool, or None where every layer computed every token: llama.cpp's
        last layer computes only tokens whose output is wanted. Elsewhere `experts` means nothing.
    info: the description: "model", "names" of the sequences, and whatever else was recorded.
    """

    experts: np.ndarray
    sequence: np.ndarray
    n_experts: int
    weights: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    step: np.ndarray | None = None
    guesses: np.ndarray | None = None
    computed: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    def __sizeof__(self) -> int:
        """Bytes with its arrays', by which Dask and Ray see what to send to a machine once."""
        arrays = (self.experts, self.sequence, *(getattr(self, name) for name in _OPTIONAL))
        return object.__sizeof__(self) + sum(a.nbytes for a in arrays if a is not None)

    def sequences(self) -> Iterator[tuple[int, slice]]:
        """Each sequence's number and its range of tokens, in order."""
        yield from _runs(self.sequence)

    def select(self, positions: Sequence[int]) -> Trace:
        """A trace of only these sequences, renumbered from 0; position 0 is the file's first."""
        runs = [tokens for _, tokens in self.sequences()]
        tokens = np.concatenate([np.arange(runs[p].start, runs[p].stop) for p in positions])
        lengths = [runs[p].stop - runs[p].start for p in positions]
        sequence = np.repeat(np.arange(len(positions), dtype=np.int32), lengths)
        parts = {n: a[tokens] for n in _OPTIONAL if (a := getattr(self, n)) is not None}
        info = dict(self.info)
        if "names" in info:
            names = self.names()
            info["names"] = [names[p] for p in positions]
        return replace(self, experts=self.experts[tokens], sequence=sequence, info=info, **parts)

    def names(self) -> list[str]:
        """Each sequence's name in the description, or its number."""
        names = self.info.get("names", [])
        return [
            names[number] if number < len(names) else str(number) for number, _ in self.sequences()
        ]

    def uses(self) -> np.ndarray:
        """How many tokens chose each expert, int64 [layers, experts]."""
        rows = np.ones(self.experts.shape[:2], bool) if self.computed is None else self.computed
        layers = [self.experts[rows[:, n], n].ravel() for n in range(self.n_layers)]
        return np.stack([np.bincount(layer, minlength=self.n_experts) for layer in layers])

    def first(self, tokens: int) -> Trace:
        """A trace of only the first `tokens` tokens."""
        parts = {n: a[:tokens] for n in _OPTIONAL if (a := getattr(self, n)) is not None}
        experts, sequence = self.experts[:tokens], self.sequence[:tokens]
        return replace(self, experts=experts, sequence=sequence, **parts)

    def heads(self, tokens: int) -> Trace:
        """A trace of only the first `tokens` tokens of each sequence."""
        runs = [np.arange(run.start, run.stop)[:tokens] for _, run in self.sequences()]
        kept = np.concatenate(runs)
        parts = {n: a[kept] for n in _OPTIONAL if (a := getattr(self, n)) is not None}
        experts, sequence = self.experts[kept], self.sequence[kept]
        return replace(self, experts=experts, sequence=sequence, **parts)

    def named(self, name: str) -> Trace:
        """A trace of the sequence with this name. Raises FlashMoEError if there is none."""
        names = self.names()
        if name not in names:
            raise FlashMoEError(f"the trace has no sequence called {name!r}")
        return self.select([names.index(name)])

    def without(self, name: str) -> Trace:
        """A trace without the sequence of this name; the whole trace if it has no other."""
        names = self.names()
        rest = [number for number, other in enumerate(names) if other != name]
        return self.select(rest) if rest else self

    def steps(self, tokens: slice) -> Iterator[slice]:
        """Ranges of tokens that one forward pass computed; single tokens where `step` is None."""
        if self.step is None:
            yield from (slice(t, t + 1) for t in range(tokens.start, tokens.stop))
        else:
            for _, run in _runs(self.step[tokens]):
                yield slice(run.start + tokens.start, run.stop + tokens.start)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` (.npz) and, beside it, the description (.json); each atomically.

        Raises FlashMoEError when one of them cannot be written.
        """
        target = Path(path)
        arrays = {"experts": self.experts, "sequence": self.sequence}
        arrays |= {n: a for n in _OPTIONAL if (a := getattr(self, n)) is not None}
        description = {
            "model": self.info.get("model", "unknown"),
            "experts": self.n_experts,
            "layers": self.n_layers,
            "top_k": self.top_k,
            "tokens": len(self.experts),
            "sequences": len(list(self.sequences())),
        } | {k: v for k, v in self.info.items() if k != "model"}
        plain_npz.write(target, arrays)
        text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
        content = text.encode("utf-8", "backslashreplace")
        files.replace(target.with_suffix(".json"), lambda file: file.write(content))


def _runs(labels: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Each label and the range of its run, in order."""
    edges = np.flatnonzero(np.diff(labels)) + 1
    starts = [0, *edges.tolist()] if len(labels) else []
    for start, stop in zip(starts, [*starts[1:], len(labels)], strict=False):
        yield int(labels[start]), slice(start, stop)


def load(path: str | os.PathLike[str]) -> Trace:
    """Read and check a trace, which may come from anywhere.

    Raises FlashMoEError when it is no trace, holds pickled objects, or its shapes, dtypes or
    ranges do not fit together.
    """
    path = Path(path)

    def refuse(what: str) -> FlashMoEError:
        return FlashMoEError(f"trace {path}: {what}; record it anew with `flashmoe record`")

    try:
        arrays = plain_npz.read(path, ("experts", "sequence", *_OPTIONAL))
    except plain_npz.UnreadableError as error:
        raise refuse(str(error)) from None
    if not {"experts", "sequence"} <= arrays.keys():
        raise refuse("lacks the arrays 'experts' and 'sequence'")
    experts, sequence = arrays["experts"], arrays["sequence"]
    if experts.dtype not in (np.uint8, np.uint16) or experts.ndim != 3 or not experts.size:
        raise refuse(
            f"'experts' must be uint8 or uint16 [tokens, layers, top_k] and not empty, "
            f"not {experts.dtype} {list(experts.shape)}"
        )
    tokens = len(experts)
    if sequence.shape != (tokens,) or sequence.dtype.kind not in "iu":
        raise refuse(f"'sequence' must be integers [{tokens}]")
    labels = [label for label, _ in _runs(sequence)]
    if len(labels) != len(set(labels)):
        raise refuse("'sequence' returns to an earlier sequence; its tokens must be contiguous")
    info = _description(path, refuse)
    n_experts = info.pop("experts", None)
    if n_experts is None:
        n_experts = int(experts.max()) + 1
    if not isinstance(n_experts, int) or not 0 < n_experts <= 65536:
        raise refuse(f"the description's number of experts is {n_experts!r}")
    if experts.max() >= n_experts:
        raise refuse(
            f"names expert {experts.max()}, but a layer has {n_experts} (0..{n_experts - 1})"
        )
    ordered = np.sort(experts, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise refuse("a token chooses the same expert twice at one layer")
    shapes = {
        "weights": experts.shape,
        "probabilities": (*experts.shape[:2], n_experts),
        "step": (tokens,),
        "guesses": (tokens, experts.shape[1] - 1, experts.shape[2]),
        "computed": experts.shape[:2],
    }
    for name in _OPTIONAL:
        if name in arrays and arrays[name].shape != shapes[name]:
            raise refuse(f"{name!r} must have shape {list(shapes[name])}")
    guesses = arrays.get("guesses", experts)
    if guesses.dtype not in (np.uint8, np.uint16) or (guesses >= n_experts).any():
        raise refuse(f"'guesses' must be experts of a layer (0..{n_experts - 1})")
    computed = arrays.get("computed", np.ones(1, bool))
    if computed.dtype != bool or not computed.any():
        raise refuse("'computed' must be true or false, and true somewhere")
    optional = {name: arrays.get(name) for name in _OPTIONAL}
    return Trace(experts, sequence, n_experts, info=info, **optional)


def _description(path: Path, refuse: Any) -> dict[str, Any]:
    """What the .json beside `path` says, without what the arrays themselves say."""
    file = path.with_suffix(".json")
    if not file.exists():
        return {}
    try:
        info = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"its description {file.name} is not JSON ({error})") from None
    if not isinstance(info, dict):
        raise refuse(f"its description {file.name} is not an object")
    return {k: v for k, v in info.items() if k not in ("layers", "top_k", "tokens", "sequences")}
