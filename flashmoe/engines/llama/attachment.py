"""FlashMoE under one loaded llama.cpp: what it maps, what it computes, and how it fails."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from flashmoe.engines.llama import aside, decode_event
from flashmoe.engines.llama.backend import GGUFExperts
from flashmoe.engines.llama.decoder import Decoder
from flashmoe.engines.llama.engine import LlamaEngine
from flashmoe.engines.llama.expert_tensors import GGUFContents, contents_of
from flashmoe.engines.llama.ggml import GGML
from flashmoe.engines.llama.hooks import (
    ANSWER,
    ASIDE,
    AWAITED,
    CHECKING,
    DECODE,
    FAILED,
    ON,
    PYTHON,
    TABLE,
    Hooks,
)
from flashmoe.engines.llama.layout import Layout, check_budget
from flashmoe.engines.llama.lookahead import Lookahead
from flashmoe.engines.llama.model_file import ModelFile
from flashmoe.engines.llama.product_check import CHOICE, ProductCheck
from flashmoe.engines.llama.redirect import redirect
from flashmoe.engines.llama.same_file import copies_of
from flashmoe.engines.serving import Watch
from flashmoe.errors import FlashMoEError
from flashmoe.residency.at_once_work import READY
from flashmoe.util.sizes import format_bytes

# Without these there is nothing to stand on; the other imports differ between builds.
NEEDED = ("ggml_backend_sched_set_eval_callback", "ggml_backend_sched_graph_compute_async")
MAP_FAILED = (1 << 64) - 1


def _print(line: str) -> None:
    print(f"flashmoe: {line}", file=sys.stderr, flush=True)


class Attachment:
    """Streams the experts of the model that the library maps, from its first event on.

    A failure ends the call that met it, by the program's own error; never with a wrong token.
    """

    def __init__(
        self,
        library: Path,
        ggml_library: Path,
        *,
        memory: int | str,
        policy: str,
        prefetch: bool = True,
        warm: Path | None = None,
        record: bool = False,
        tell: Callable[[str], object] = _print,
        watch: Watch | None = None,
        also: Sequence[Path] = (),
    ) -> None:
        """library: calls mmap and the scheduler; ggml_library: has the tensors' functions.

        memory: bytes, a size such as "4GiB", or "auto". prefetch: while a layer is computed, read
        what the next one is guessed to need, where that pays. warm: a file that says what was
        resident when an earlier run ended, if it is there. record: every event, for `engine.trace`.
        tell: gets what the user should know. watch: gets the engine. also: see `same_file`.
        Raises FlashMoEError where this build of llama.cpp does not offer what is needed.
        """
        decode_event.rehearse(policy)
        self.memory = memory
        self.policy = policy
        self.prefetch = prefetch
        self.warm = warm
        self.record = record
        self.failure = ""  # of the last request that failed; whoever asks empties it
        self.tell = tell
        self.watch, self.also = watch, also
        self.beside_bytes = 0  # what the program will still take, which "auto" leaves free
        self.engine: LlamaEngine | None = None
        self.ggml = GGML(str(ggml_library))
        self.hooks = Hooks(self.ggml, self._observe, self._prepare, self._decide)
        self.hooks.switches[CHECKING] = 1
        self._known: dict[tuple[int, ...], GGUFContents | None] = {}  # by a file's identity
        self._files: list[tuple[ModelFile, GGUFContents]] = []
        self._has_experts = False  # the model of the last file
        self._layers: dict[int, int] = {}  # the cache's number of a layer, by the file's
        self._products = ProductCheck(self.ggml)
        self._library = library
        missing = set(NEEDED) - redirect(library, self.hooks.addresses)
        if missing:
            self.detach()
            raise FlashMoEError(
                f"{library} does not import {min(missing)}: it is no llama.cpp of 2026, or was not "
                "built of shared libraries"
            )

    def add_file(self, path: Path) -> bool:
        """Stream this file's experts once the program maps it; False where it has none."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self._replace(path, os.fstat(descriptor)) is not None
        finally:
            os.close(descriptor)

    def _contents(self, path: Path, status: os.stat_result) -> GGUFContents | None:
        """As `contents_of`, which takes long where a vocabulary is large, once a file."""
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if key not in self._known:
            self._known[key] = contents_of(self.ggml, path)
        return self._known[key]

    def _replace(self, path: Path, status: os.stat_result) -> ModelFile | None:
        """Memory of our own for the pages of a GGUF file with experts."""
        contents = self._contents(path, status)
        if contents is None:
            return None
        if contents.part == 0:
            self._has_experts = contents.top_k > 0  # a split file's later parts do not say it
        if not contents.tensors and not (self._has_experts and contents.parts > 1):
            self.tell(f"{path} has no experts: it is mapped as without FlashMoE")
            return None
        if any(self._products.expects(tensor.name) for tensor in contents.tensors):
            raise FlashMoEError(
                f"{path}: of two models with experts only one can be streamed: leave this one out"
            )
        self._check_model(path, contents)
        file = ModelFile(path, contents.tensors, copies_of(self.ggml, path, contents, self.also))
        self._files.append((file, contents))
        for tensor in contents.tensors:
            self._products.expect(tensor.name, file.base + tensor.offset_bytes, tensor.layer)
        self.hooks.add_file(status.st_dev, status.st_ino, file.base, file.size_bytes)
        return file

    def _check_model(self, path: Path, contents: GGUFContents) -> None:
        """Raises FlashMoEError for what `start` would refuse, once the model's last file is known.

        That is before anything of this file is read.
        """
        known = [*(one for _, one in self._files), contents]
        if len(known) == contents.parts:
            layout = Layout(self._files[0][0].path if self._files else path, known)
            if layout.numbers and self.memory != "auto":
                check_budget(self.memory, layout.manifest, layout.edge_bytes)

    def _decide(self) -> None:
        """Stand aside where all experts fit: then the program may lay out the weights itself."""
        if self.hooks.switches[ASIDE] or self.record or self._files:
            return
        with suppress(FlashMoEError, OSError):  # whatever it is, mapping the file meets it too
            if aside.all_fit(self.memory, self._contents):
                self.hooks.switches[ASIDE] = 1
                self.tell("all experts fit, so the program runs as without FlashMoE")

    def _prepare(self, descriptor: int) -> int:
        """The address to give out for a file's mapping; 0: map the file itself.

        Where a model cannot be streamed the mapping fails, and so does the program's loading.
        """
        try:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            file = self._replace(path, os.fstat(descriptor))
            return file.base if file else 0
        except BaseException as error:
            self.tell(str(error) or repr(error))
            ctypes.set_errno(errno.ENOMEM)
            return MAP_FAILED

    def _observe(self, tensor: int, ask: bool) -> bool:
        """What llama.cpp asks before a node is computed, and tells after it."""
        try:
            if self.hooks.switches[AWAITED]:  # machine code could not end it
                self._end_awaited()
                return not ask
            name = self.ggml.name_of(tensor)
            if ask:
                self._products.look_at(tensor)
                return name.startswith(CHOICE)
            if name.startswith(CHOICE):
                self._make_ready(int(name.removeprefix(CHOICE)), tensor)
            return True
        except BaseException as error:
            self.hooks.switches[FAILED] = 1
            self._products.forget_graph()
            self.failure = str(error) or repr(error)
            self.tell(f"this request fails: {self.failure}")
            return False  # whatever is still computed, `hooks` makes the whole call fail

    def _end_awaited(self) -> None:
        assert self.engine
        number = int(self.hooks.switches[AWAITED]) - 1
        self.hooks.switches[AWAITED] = 0
        answer = int(self.hooks.switches[ANSWER])
        if answer == decode_event.PYTHON:
            self.engine.at_once.await_late()
        else:
            self.engine.end(self._layers[number], answer)

    def _make_ready(self, number: int, choice: int) -> None:
        answer = int(self.hooks.switches[ANSWER])
        if self.engine and answer not in (READY, decode_event.PYTHON):
            self.engine.end(self._layers[number], answer)
            return
        rows = self.ggml.int_rows(choice)
        if self.engine is None:
            self.start()
        if self.engine is None or number not in self._layers:
            return  # a layer without tensors of ours was read with the dense part
        if len(rows) and self.hooks.switches[CHECKING] and self._products.is_complete(number):
            self.hooks.switches[CHECKING] = 0
        self._products.add_ready(number)
        if not len(rows):  # no output is wanted of this ubatch: its last layer computes nothing
            return
        layer = self._layers[number]
        self.lookahead.learn(layer, choice)
        self.engine.note(layer, rows)
        likely = partial(self.lookahead.likely, layer, choice, rows)
        self.engine.at_once.make_ready(layer, rows, likely)
        self._arm(self.engine)

    def _arm(self, engine: LlamaEngine) -> None:
        """Leave single tokens to machine code, once every layer was looked at."""
        if self.hooks.switches[CHECKING] or not self.lookahead.has_learnt(len(self._layers)):
            return
        with engine.lock:
            decoder = engine.decoder
            if decoder is None:
                products = self._products
                apart = self.hooks.await_apart(products.down_input, products.down_addresses)
                decoder = Decoder(engine, self.ggml, self.lookahead, apart=apart)
                engine.use(decoder)
                self.hooks.switches[TABLE] = decoder.words.ctypes.data
                self.hooks.switches[DECODE] = decoder.code.address
            if not decoder.armed:
                decoder.arm()

    def start(self, beside_bytes: int = 0) -> None:
        """Make the engine: at the first event, or when the program has all its memory.

        `auto` knows then what is left; beside_bytes: what the program has but not touched yet.
        Raises FlashMoEError where the budget is too small.
        """
        if not self._files:
            raise FlashMoEError(
                "this program computes with experts that it did not map from a GGUF file: leave "
                "out --no-mmap and other load modes"
            )
        experts = GGUFExperts(self._files)
        self._layers = {number: layer for layer, number in enumerate(experts.numbers)}
        self.lookahead = Lookahead(self.ggml, self._is_ours)
        self.engine = LlamaEngine(
            experts,
            self.memory,
            self.policy,
            self.beside_bytes + beside_bytes,
            prefetch=self.prefetch,
            computing=self.hooks.computing,
        )
        if self.record:
            self.engine.record()
        if self.warm and self.warm.exists():
            self.engine.restore(self.warm)
        stats, first = self.engine.snapshot(), experts.manifest.layers[0]
        self.tell(
            f"{format_bytes(stats.memory_bytes)} for experts: {stats.slots_per_layer:.4g} of "
            f"{first.n_experts} stay in memory at each of {len(self._layers)} layers; the rest of "
            f"the model takes {format_bytes(experts.manifest.dense_bytes)}"
        )
        if self.memory == "auto":
            self.engine.follow()
        if self.watch:
            self.watch(self.engine)
        started = time.perf_counter()  # last: where a read fails, all else is there
        if self.engine.read_all():
            self.tell(f"all experts were read in {time.perf_counter() - started:.1f} s")

    def _is_ours(self, address: int) -> bool:
        return any(0 <= address - file.base < file.size_bytes for file, _ in self._files)

    def detach(self) -> None:
        """End everything, when the program's model is gone: what is imported is the library's own.

        The memory that stood for the model's files is freed.
        """
        redirect(self._library, self.hooks.originals)
        self.hooks.switches[[ON, PYTHON, DECODE]] = 0  # another model may know our callback still
        if self.engine:
            self.engine.close()
        for file, _ in self._files:
            file.free()
        self._files.clear()
