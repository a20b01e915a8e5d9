"""Serves the events of single tokens without Python, in the thread that computes the model.

A token of llama.cpp makes an event at every layer. Python would take a millisecond for each, most
of it because the model's weights have driven Python's own code out of the processor's caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from flashmoe.engines.llama import lookahead
from flashmoe.engines.llama.lookahead import rank
from flashmoe.events import LAYERS_BELOW, Event
from flashmoe.policies.base import Policy
from flashmoe.policies.parts.compiled import c_kernel
from flashmoe.reading.range_work import EACH, seconds_now
from flashmoe.residency import at_once_work, rehearsal
from flashmoe.residency.at_once_work import (
    AWAITED,
    BEGIN,
    EARLY,
    FINISH,
    GUESS,
    N_LIKELY,
    N_NEEDED,
    READS,
    READY,
    SPOILT,
    TOTAL,
    Whole,
)
from flashmoe.residency.guess_record import add_event, add_guess, is_worth_a_call, saves_time
from flashmoe.residency.place_work import FILLED
from flashmoe.residency.routing import Routing
from flashmoe.util import libc
from flashmoe.util.by_address import call, pointer, view
from flashmoe.util.machine_code import helper

# What `decode` answers beside `at_once_work`'s: Python shall do it all, or a file changed.
PYTHON, CHANGED = 64, 65
# Positions in `Decoding.state`. APART: late reads are awaited by a call of their own.
ARMED, LOGS, LOGGED, GUESSES, APART = range(5)
SHAPE, INPUTS = range(2)  # positions in `Decoding.offsets`
# Columns of `Decoding.routers`: addresses, sizes, and how far a choice is from its scores.
WEIGHTS, SCALE, BIAS, SHARE_BIAS, N_EXPERTS, WIDTH, STEPS = range(7)
_LOG_EVENTS = 4096
_SIZE, _SECONDS, _NANOSECONDS = 6, 11, 12  # words of `struct stat` on 64-bit Linux
SOURCES = (Path(__file__), Path(lookahead.__file__), *at_once_work.SOURCES)


class Decoding(NamedTuple):
    """What serving a token's event takes, for L layers of ours."""

    whole: Whole
    whole_words: int  # the address of its table
    work: int  # the address of `at_once_work.work`
    tensor_get: int  # and that of ggml_backend_tensor_get
    mutex: int  # of the engine's lock
    state: np.ndarray  # [5] int64
    layers: np.ndarray  # [numbers] int64: ours, by the file's number of it; -1: none
    first_keys: np.ndarray  # [L] int64
    decisions: np.ndarray  # [L] int64: addresses of tables of decisions about `event`
    event: Event
    n_tokens: np.ndarray  # [L] int64 and
    last: np.ndarray  # [L, top_k] int64: see `Routing`
    files: np.ndarray  # [files, 3] int64: descriptor, bytes, time of the last change
    status: np.ndarray  # [32] int64, scratch
    log: np.ndarray  # [events, 1 + top_k] int64: layer and choice of those not yet recorded
    offsets: np.ndarray  # [2] int64: in a tensor
    routers: np.ndarray  # [L, 7] int64
    choice: np.ndarray  # [top_k] int32, scratch

    @classmethod
    def of(
        cls,
        whole: Whole,
        numbers: Sequence[int],
        n_tokens: np.ndarray,
        last: np.ndarray,
        files: Sequence[tuple[int, int, int]],
    ) -> Decoding:
        """Not armed. Zeros stand for the addresses and for a tensor's offsets."""
        n_layers, top_k = last.shape
        layers = np.full(max(numbers) + 1, -1)
        layers[list(numbers)] = np.arange(n_layers)
        below = np.zeros((1, LAYERS_BELOW * top_k), np.int64)
        return cls(
            whole=whole,
            whole_words=0,
            work=0,
            tensor_get=0,
            mutex=0,
            state=np.zeros(5, np.int64),
            layers=layers,
            first_keys=np.zeros(n_layers, np.int64),
            decisions=np.zeros(n_layers, np.int64),
            event=Event.of_rows(np.arange(top_k)[None], 0, None, below),
            n_tokens=n_tokens,
            last=last,
            files=np.array(files, np.int64).reshape(-1, 3),
            status=np.zeros(32, np.int64),
            log=np.zeros((_LOG_EVENTS, 1 + top_k), np.int64),
            offsets=np.zeros(2, np.int64),
            routers=np.zeros((n_layers, 7), np.int64),
            choice=np.zeros(top_k, np.int32),
        )


def compiled(decoding: Decoding) -> Any:
    """Machine code of `decode`, for any such state."""
    return c_kernel(decode, decoding, Policy, 2, also=SOURCES)


def rehearse(policy: str) -> None:
    """Compile all that serves events before anybody waits for it: a minute, once on a machine.

    Raises FlashMoEError where there is no such policy.
    """
    rehearsal.compile_policy(policy)
    rehearsal.compile_reading()
    whole, routing = rehearsal.compile_events(), Routing(1, 1)
    compiled(Decoding.of(whole, [0], routing.n_tokens, routing.last, []))


def decode(at, number, tensor):
    """Serve the event of the layer that the file calls `number`, whose choice is in `tensor`.

    tensor: 0 awaits what PART left of that event.
    """
    s = view(at)
    if not s.state[ARMED] or number >= len(s.layers) or s.layers[number] < 0:
        return PYTHON
    if libc.try_lock(s.mutex) != 0:
        return PYTHON
    layer = s.layers[number]
    answer = PYTHON
    if s.state[ARMED]:
        awaited = s.whole.counts[AWAITED]
        if not tensor and awaited == layer + 1:
            answer = _serve_rest(s, layer)
        elif tensor and not awaited and _read_choice(s, layer, tensor):
            answer = _serve(s, layer, tensor)
    libc.unlock(s.mutex)
    return answer


@helper
def _read_choice(s, layer, tensor):
    """Read what one token chose; False for anything unusual, and then nothing has happened."""
    choice, top_k = s.choice, len(s.choice)
    shape = numba.carray(pointer(tensor + s.offsets[SHAPE]), (4,), np.int64)
    if shape[0] != top_k or shape[1] * shape[2] * shape[3] != 1:
        return False
    if s.state[LOGS] and s.state[LOGGED] == len(s.log):
        return False
    if layer == 0 and not _unchanged(s):  # what is read later is checked when it was
        return False
    call(s.tensor_get, (tensor, choice.ctypes.data, 0, 4 * top_k))
    n_experts = s.whole.places.first[layer + 1] - s.whole.places.first[layer]
    for i in range(top_k):
        if choice[i] < 0 or choice[i] >= n_experts:
            return False
        for j in range(i):
            if choice[i] == choice[j]:
                return False
    return True


@helper
def _unchanged(s):
    """The files are those that were opened."""
    status = s.status
    for descriptor, size_bytes, changed in s.files:
        if libc.status_of(descriptor, status.ctypes.data) != 0:
            return False
        if status[_SIZE] != size_bytes:
            return False
        if status[_SECONDS] * 1_000_000_000 + status[_NANOSECONDS] != changed:
            return False
    return True


@helper
def _serve(s, layer, tensor):
    clock = np.zeros(2, np.int64)
    started = seconds_now(clock)
    whole = s.whole
    _tell(s, layer)
    answer = call(s.work, (s.whole_words, BEGIN, layer, s.decisions[layer]))
    if answer == SPOILT:  # nothing that Python will not do again
        s.state[LOGGED] -= s.state[LOGS]
        return PYTHON
    if answer == READY:
        if _shall_guess(s, layer):
            asked = seconds_now(clock)
            _guess(s, layer, tensor)
            add_guess(whole.record, seconds_now(clock) - asked)
            call(s.work, (s.whole_words, GUESS, layer, 0))
        step = EARLY if s.state[APART] else FINISH
        answer = _checked(s, call(s.work, (s.whole_words, step, layer, 0)))
        add_event(whole.record, whole.counts[READS])
    whole.seconds[TOTAL] += seconds_now(clock) - started
    return answer


@helper
def _serve_rest(s, layer):
    clock = np.zeros(2, np.int64)
    started = seconds_now(clock)
    answer = _checked(s, call(s.work, (s.whole_words, FINISH, layer, 0)))
    s.whole.seconds[TOTAL] += seconds_now(clock) - started
    return answer


@helper
def _checked(s, answer):
    """CHANGED in place of READY where files were read that are others by now."""
    if answer == READY and s.whole.counts[READS] and not _unchanged(s):
        return CHANGED
    return answer


@helper
def _tell(s, layer):
    """Set the event, and what it needs; note it for the layers above and for the record."""
    event, whole, top_k = s.event, s.whole, len(s.choice)
    first = whole.places.first[layer]
    n_experts = whole.places.first[layer + 1] - first
    for i in range(top_k):
        event.keys[i] = event.rows[0, i] = s.first_keys[layer] + s.choice[i]
        whole.needed[i] = first + s.choice[i]
        s.last[layer, i] = s.choice[i]
    whole.counts[N_NEEDED] = top_k
    s.n_tokens[layer] = 1
    known = True
    for back in range(LAYERS_BELOW):
        below = layer - 1 - back
        known = known and below >= 0 and s.n_tokens[below] == 1
        for i in range(top_k):
            told = s.last[below, i] + back * n_experts if known else -1
            event.below[0, back * top_k + i] = told
    if s.state[LOGS]:
        row = s.log[s.state[LOGGED]]
        row[0] = layer
        for i in range(top_k):
            row[1 + i] = s.choice[i]
        s.state[LOGGED] += 1


@helper
def _shall_guess(s, layer):
    """The layer above can be guessed, lacks experts, and guesses are worth it."""
    above, places, record = layer + 1, s.whole.places, s.whole.record
    if not s.state[GUESSES] or above == len(s.routers):
        return False
    if not is_worth_a_call(record) or not saves_time(record, s.whole.queue.times[EACH]):
        return False
    if not s.routers[layer, WEIGHTS] or not s.routers[above, WEIGHTS]:
        return False
    for number in range(places.first[above], places.first[above + 1]):
        if not places.marks[number] & FILLED:
            return True
    return False


@helper
def _guess(s, layer, tensor):
    """Ask the router above about the hidden state here: as `Lookahead.likely`."""
    router, whole = s.routers[layer + 1], s.whole
    product = tensor
    for _ in range(s.routers[layer, STEPS]):
        product = numba.carray(pointer(product + s.offsets[INPUTS]), (1,), np.int64)[0]
    input = numba.carray(pointer(product + s.offsets[INPUTS]), (2,), np.int64)[1]
    width, n_experts = router[WIDTH], router[N_EXPERTS]
    hidden = np.empty((1, width), np.float32)
    call(s.tensor_get, (input, hidden.ctypes.data, 0, 4 * width))
    experts = rank(
        numba.carray(pointer(router[WEIGHTS]), (n_experts, width), np.float32),
        hidden,
        numba.carray(pointer(s.routers[layer, SCALE]), (width,), np.float32),
        numba.carray(pointer(router[BIAS]), (n_experts,), np.float32),
        numba.carray(
            pointer(router[SHARE_BIAS]), (n_experts if router[SHARE_BIAS] else 0,), np.float32
        ),
        len(s.choice),
    )
    first = whole.places.first[layer + 1]
    for i, expert in enumerate(experts):
        whole.likely[i] = first + expert
    whole.counts[N_LIKELY] = len(experts)
