"""The engine of one model in GGUF files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashmoe.engines.base import Engine
from flashmoe.engines.llama import layout
from flashmoe.engines.llama.arena import PlacedArena
from flashmoe.engines.llama.backend import GGUFExperts
from flashmoe.engines.llama.decode_event import CHANGED
from flashmoe.engines.llama.recorder import Recorder
from flashmoe.engines.stats import Stats
from flashmoe.errors import FlashMoEError
from flashmoe.memory import free_memory
from flashmoe.reading.range_reader import RangeReader
from flashmoe.residency import budget, warm_start
from flashmoe.residency.at_once import AtOnce
from flashmoe.residency.at_once_work import DECIDING, READY, TOTAL, WAIT
from flashmoe.residency.choice_log import Choice
from flashmoe.residency.place_work import BYTES, MOST_BYTES
from flashmoe.trace import Trace
from flashmoe.util.native_lock import NativeLock

if TYPE_CHECKING:
    from flashmoe.engines.llama.decoder import Decoder

# The program has its caches and buffers by then; some are not touched yet.
RESERVE_BYTES = 256 << 20


class LlamaEngine(Engine):
    """What a program of llama.cpp computes with, as far as it fits the budget."""

    arithmetic = "llama.cpp"
    reserve_bytes = RESERVE_BYTES

    def __init__(
        self,
        experts: GGUFExperts,
        memory: int | str,
        policy: str,
        beside_bytes: int = 0,
        *,
        prefetch: bool = True,
        computing: NativeLock | None = None,
    ) -> None:
        """memory: "auto" gives what is free now, less a reserve: the program has all else by then.

        beside_bytes: what it is still to touch of that, beyond the reserve. computing: held by the
        program while it multiplies by experts.

        Raises FlashMoEError where the budget is too small.
        """
        self.experts = experts
        self.beside_bytes = beside_bytes + experts.edge_bytes
        reader = RangeReader(experts)
        super().__init__(
            reader,
            self._places_bytes(memory, 0),
            policy,
            PlacedArena,
            device="cpu",
            prefetch=prefetch,
            whole_events=True,
        )
        self._computing = computing or NativeLock()
        self._recorder: Recorder | None = None
        self.decoder: Decoder | None = None  # once somebody can arm it
        self.at_once = AtOnce(self.residency, reader)

    @property
    def present_bytes(self) -> int:
        return int(self.at_once.places.sizes[BYTES])

    def _budget_bytes(self, memory: int | str) -> int:
        return self._places_bytes(memory, self.present_bytes)

    def _places_bytes(self, memory: int | str, present_bytes: int) -> int:
        """What is left of `memory` for whole places: the pages at their ends stay filled.

        present_bytes: what whole places take now.
        """
        manifest, edge_bytes = self.experts.manifest, self.experts.edge_bytes
        if memory != "auto":
            return layout.check_budget(memory, manifest, edge_bytes) - edge_bytes
        least = budget.least_bytes(manifest, whole_events=True)
        return free_memory.budget_bytes(
            self.beside_bytes, "cpu", least, present_bytes, self.reserve_bytes
        )

    def restore(self, path: Path) -> None:
        """Begin as an earlier run ended. Raises FlashMoEError for a file of another model."""
        with self._by_python():
            try:
                self.residency.reader.stand_still()  # wrong guesses may be on their way still
                warm_start.restore(self.residency, path)
            except BaseException:  # it starts cold then
                self.at_once.trim()
                for file in self.experts.files:
                    file.drop_experts()
                raise
            self.at_once.take_restored()

    def read_all(self) -> int:
        """Read the experts ahead where all fit, as the program alone does; how many."""
        with self._by_python():
            count = self.at_once.read_all()
            if count:
                self.experts.check_unchanged()
        return count

    @contextmanager
    def _by_python(self) -> Iterator[None]:
        """What is changed within, machine code learns of when it is armed anew.

        That is between two graphs: experts that are multiplied by must stay where they are.
        """
        with self._computing, self.lock:
            if self.decoder:
                self.decoder.disarm()
            self.at_once.end_abandoned()
            yield

    def note(self, layer: int, rows: np.ndarray) -> None:
        """An event begins: `rows` [tokens, top_k] are what the layer chose.

        Raises FlashMoEError when the engine was closed, OSError when a file changed.
        """
        with self.lock:
            self._check_open()
            if layer == 0:  # what is read later is checked when it was
                self.experts.check_unchanged()
            if self._logs:
                self._read_log()
            if self._recorder:
                self._recorder.note(layer, rows)

    def next_sequence(self) -> None:
        """What is recorded from now on belongs to another sequence of the trace."""
        with self.lock:
            if self._recorder:
                self._read_log()
                self._recorder.next_sequence()

    def use(self, decoder: Decoder) -> None:
        """Let machine code serve single tokens whenever it is armed. Not without the lock."""
        self.decoder = decoder
        decoder.log(self._logs)

    @property
    def _logs(self) -> bool:
        """Somebody wants the events that machine code serves."""
        return self._recorder is not None or self.residency.routing.log.wanted

    def _read_log(self) -> None:
        """Pass on the events that no Python has seen yet."""
        if self.decoder:
            log = self.decoder.take_log()
            for layer, rows in zip(log[:, 0].tolist(), log[:, None, 1:], strict=True):
                self.residency.routing.log.keep(layer, rows, None)
                if self._recorder:
                    self._recorder.note(layer, rows)

    def watch_choices(self, wanted: bool) -> None:
        with self.lock:
            self._read_log()  # of before
            super().watch_choices(wanted)
            if self.decoder:
                self.decoder.log(self._logs)

    def take_choices(self) -> list[Choice]:
        with self.lock:
            self._read_log()
            return super().take_choices()

    def end(self, layer: int, answer: int) -> None:
        """What machine code left of an event (see `decode_event.decode`).

        Raises FlashMoEError or OSError where the layer cannot be computed.
        """
        with self.lock:
            self.at_once.end(layer, READY if answer == CHANGED else answer)

    def record(self) -> Recorder:
        """Record which experts are chosen, from now on and from nothing."""
        with self.lock:
            self._read_log()
            self._recorder = Recorder(self.manifest)
            if self.decoder:
                self.decoder.log(True)
        return self._recorder

    def trace(self, **info: object) -> Trace:
        """What was recorded, and how to replay it to the same hits (see docs/llama.md).

        info: what else to say of it in the file. Raises FlashMoEError where nothing was recorded.
        """
        if self._recorder is None:
            raise FlashMoEError("no trace: call record() before what is to be recorded")
        with self.lock:
            self._read_log()
        counts = self.snapshot().for_replay()
        return self._recorder.trace({"model": self.path.name} | counts | info)

    def close(self) -> None:
        """Free slots, threads and descriptors; not during generation. The model fails afterwards.

        What is not of experts stays until the model itself is gone.
        """
        with self._by_python():
            super().close()
            for file in self.experts.files:
                file.drop_experts()

    def resize(self, memory: int | str) -> None:
        with self._by_python():
            super().resize(memory)

    def adjust(self, memory_bytes: int) -> None:
        """In the midst of a graph too, of which a prompt's takes long: between two layers' events.

        The experts that are multiplied by stay where they are.
        """
        if not self._computing.try_acquire():
            super().adjust(memory_bytes)
            return
        try:
            with self._by_python():
                super().adjust(memory_bytes)
        finally:
            self._computing.release()

    def _change_budget(self, memory_bytes: int) -> None:
        if self.decoder:
            self.decoder.disarm()
        super()._change_budget(memory_bytes)
        self.at_once.trim()

    def reset(self) -> None:
        with self._by_python():
            super().reset()
            self.at_once.trim()
            self.reset_counts()

    def go_on(self, *, in_child: bool) -> None:
        if in_child:
            self._computing.renew()
            if self.decoder:  # its threads are started by Python
                self.decoder.disarm()
        super().go_on(in_child=in_child)

    def snapshot(self) -> Stats:
        """resident_bytes: what is in memory, be it resident or a prompt's, or guessed."""
        with self.lock:
            places, seconds = self.at_once.places, self.at_once.whole.seconds
            return replace(
                super().snapshot(),
                wait_seconds=float(seconds[WAIT]),
                experts_seconds=float(seconds[TOTAL]),
                policy_seconds=float(seconds[DECIDING]),
                resident_bytes=int(places.sizes[BYTES]),
                peak_resident_bytes=int(places.sizes[MOST_BYTES]),
            )

    def reset_counts(self) -> None:
        with self.lock:
            super().reset_counts()
            self.at_once.whole.seconds.fill(0)
            self.at_once.places.sizes[MOST_BYTES] = self.at_once.places.sizes[BYTES]
