"""What `learned` knows of an expert: scale-free numbers, computed online in compiled code.

Lengths of time are in tokens or in units of the gap E / top_k, after which a balanced router
comes back to an expert, so that one network serves every geometry. docs/policy.md tells what
each feature is worth, and which others were tried and dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashmoe.events import LAYERS_BELOW
from flashmoe.policies.base import Scope
from flashmoe.policies.parts.compiled import helper

FADES_TOKENS = (3.0, 12.0, 40.0, 150.0)  # time constants of the fading counts
FADES_GAPS = (1.0, 5.0)
N_FADES = len(FADES_TOKENS) + len(FADES_GAPS)
SHARE_FADE = N_FADES - 1  # whose count the router weights are averaged over

HISTORY = 512  # events remembered for comparison with the present one
# Votes on what is needed next, by what followed earlier events that were like the present one.
# How likeness (0 to 1) becomes a weight: that of the event alone, loosely and strictly, of it
# and the one before, and of the last three; the more evidence is compared, the stricter.
LOOSE, EVENT, PAIR, TRIPLE = range(4)
POWERS = (2, 5, 6, 7)
# (weighting, factor by which a vote fades with each token between the earlier event and a use)
VOTES = (
    (EVENT, 0.0), (EVENT, 0.6), (EVENT, 0.85), (EVENT, 0.95), (PAIR, 0.0), (PAIR, 0.85),
    (LOOSE, 0.0), (LOOSE, 0.9), (TRIPLE, 0.0), (TRIPLE, 0.9),
)  # fmt: skip
N_VOTES = len(VOTES)
_WEIGHTING = tuple(weighting for weighting, _ in VOTES)
_FADING = tuple(fading for _, fading in VOTES)

NAMES = (
    "recency",
    "frequency",
    *(f"fading count, {t:g} tokens" for t in FADES_TOKENS),
    *(f"fading count, {g:g} gaps" for g in FADES_GAPS),
    "weight at last use",
    "recent mean weight",
    "weights known",
    *(f"vote {weighting}, fading {fading}" for weighting, fading in VOTES),
    "similar events",
    "similar pairs",
    "tokens so far",
    "slots / experts",
    "slots / top_k",
    "experts / top_k",
    "depth",
)
N_FEATURES = len(NAMES)


class Memory(NamedTuple):
    """Statistics of the experts of one cache; arrays that compiled code updates.

    n keys, L layers, E experts a layer.
    """

    tokens: np.ndarray  # [L] seen at each layer
    last_use: np.ndarray  # [n] in the layer's tokens
    uses: np.ndarray  # [n]
    keep: np.ndarray  # [fades] what is left of a count after one token
    faded: np.ndarray  # [fades, n] fading counts
    norm: np.ndarray  # [fades, L] what an expert used by every token would have
    share: np.ndarray  # [n] of the router's weights, at the last use
    shares: np.ndarray  # [n] sum of shares that fades like faded[SHARE_FADE]
    weighted: np.ndarray  # [1] bool: the router's weights are known
    history: np.ndarray  # [L, HISTORY, top_k] int64: experts, -1 for none
    below: np.ndarray  # [L, HISTORY, LAYERS_BELOW * top_k]
    mark: np.ndarray  # [3, E], scratch: above 0 for experts of the present event, the two before
    mark_below: np.ndarray  # [2, LAYERS_BELOW * E], of the present event, the one before
    vote: np.ndarray  # [votes, E] float64, scratch
    whole: np.ndarray  # [3], scratch: what an event, a pair, a triple exactly alike would add up to
    weight: np.ndarray  # [votes], scratch: of the events so far, faded to the one looked at
    total: np.ndarray  # [votes], scratch: sum of the weights

    @classmethod
    def empty(cls, scope: Scope) -> Memory:
        n, layers, experts = scope.n_keys, scope.n_layers, scope.n_experts
        times = np.array([*FADES_TOKENS, *(g * experts / scope.top_k for g in FADES_GAPS)])
        return cls(
            tokens=np.zeros(layers, np.int64),
            last_use=np.full(n, -1),
            uses=np.zeros(n, np.int64),
            keep=np.exp(-1 / times),
            faded=np.zeros((N_FADES, n)),
            norm=np.zeros((N_FADES, layers)),
            share=np.zeros(n),
            shares=np.zeros(n),
            weighted=np.zeros(1, np.bool_),
            history=np.full((layers, HISTORY, scope.top_k), -1),
            below=np.full((layers, HISTORY, LAYERS_BELOW * scope.top_k), -1),
            mark=np.zeros((3, experts)),
            mark_below=np.zeros((2, LAYERS_BELOW * experts)),
            vote=np.zeros((N_VOTES, experts)),
            whole=np.zeros(3),
            weight=np.zeros(N_VOTES),
            total=np.zeros(N_VOTES),
        )


@helper
def remember(memory, event):  # type: ignore[no-untyped-def]
    """Take in `event`, token by token; the layer that it is of.

    A prompt leaves what a decode of it would have left: trained on single tokens, the network
    meets nothing else in the engine. (Of a prompt's last token alone, the votes knew so little
    that the engine at OLMoE's scale read more than LFU: 52.5 and 78.1 % hits to 54.5 and 81.4.)
    """
    experts = memory.mark.shape[1]
    layer = event.keys[0] // experts
    memory.weighted[0] = len(event.weights) > 0
    for token in range(len(event.rows)):
        _fade(memory, layer)
        for i, key in enumerate(event.rows[token]):
            memory.uses[key] += 1
            memory.last_use[key] = memory.tokens[layer]
            for fade in range(N_FADES):
                memory.faded[fade, key] += 1
            if memory.weighted[0]:
                memory.share[key] = event.weights[token, i]
                memory.shares[key] += event.weights[token, i]
        _note(memory.history[layer], memory.tokens[layer], event.rows[token], layer * experts)
        _note(memory.below[layer], memory.tokens[layer], event.below[token], 0)
        memory.tokens[layer] += 1
    return layer


@helper
def _fade(memory, layer):  # type: ignore[no-untyped-def]
    """One token on: every fading count of `layer` by its time constant."""
    experts = memory.mark.shape[1]
    first = layer * experts
    for fade in range(N_FADES):
        memory.norm[fade, layer] = memory.norm[fade, layer] * memory.keep[fade] + 1
        for key in range(first, first + experts):
            memory.faded[fade, key] *= memory.keep[fade]
    for key in range(first, first + experts):
        memory.shares[key] *= memory.keep[SHARE_FADE]


@helper
def _note(history, token, chosen, offset):  # type: ignore[no-untyped-def]
    """Write `chosen`, less `offset`, over the oldest row of a history [HISTORY, width]."""
    row = history[token % HISTORY]
    for i in range(len(row)):
        row[i] = chosen[i] - offset if i < len(chosen) else -1


@helper
def recall(memory, layer):  # type: ignore[no-untyped-def]
    """Fill `memory.vote`: what followed those earlier events that were like the present one.

    The likeness of two events is the share of the present one's experts, here and at the
    layers below, that the earlier one had too; rare experts weigh more. Returns the total
    weight of like events, and of like pairs of events.
    """
    tokens = memory.tokens[layer]
    history, lower = memory.history[layer], memory.below[layer]
    whole, weight, total = memory.whole, memory.weight, memory.total
    for back in range(3):
        whole[back] = 1e-6
    for back in range(min(3, tokens)):
        added = 0.0
        for expert in history[(tokens - 1 - back) % HISTORY]:
            if expert >= 0:
                mark = _rarity(memory, layer, expert)
                memory.mark[back, expert] = mark
                added += mark
        if back < 2:
            for expert in lower[(tokens - 1 - back) % HISTORY]:
                if expert >= 0:
                    memory.mark_below[back, expert] = 1
                    added += 1
        for longer in range(back, 3):
            whole[longer] += added
    for v in range(N_VOTES):
        weight[v], total[v] = 0, 1e-3
        for expert in range(memory.vote.shape[1]):
            memory.vote[v, expert] = 0
    to_first, to_second, to_second_next = 0.0, 0.0, 0.0  # likeness of those before to those before
    for age in range(min(tokens, HISTORY) - 1, -1, -1):
        past = (tokens - 1 - age) % HISTORY
        alike, first, second = 0.0, 0.0, 0.0
        for expert in history[past]:
            if expert >= 0:
                alike += memory.mark[0, expert]
                first += memory.mark[1, expert]
                second += memory.mark[2, expert]
                for v in range(N_VOTES):
                    memory.vote[v, expert] += weight[v]
        for expert in lower[past]:
            if expert >= 0:
                alike += memory.mark_below[0, expert]
                first += memory.mark_below[1, expert]
        weights = (
            (alike / whole[0]) ** POWERS[0],
            (alike / whole[0]) ** POWERS[1],
            ((alike + to_first) / whole[1]) ** POWERS[2],
            ((alike + to_first + to_second) / whole[2]) ** POWERS[3],
        )
        for v in range(N_VOTES):
            total[v] += weight[v]
            weight[v] = weight[v] * _FADING[v] + weights[_WEIGHTING[v]]
        to_first, to_second, to_second_next = first, to_second_next, second
    for v in range(N_VOTES):
        for expert in range(memory.vote.shape[1]):
            memory.vote[v, expert] /= total[v]
    for back in range(min(3, tokens)):
        for expert in history[(tokens - 1 - back) % HISTORY]:
            if expert >= 0:
                memory.mark[back, expert] = 0
        if back < 2:
            for expert in lower[(tokens - 1 - back) % HISTORY]:
                if expert >= 0:
                    memory.mark_below[back, expert] = 0
    return total[0], total[4]


@helper
def _rarity(memory, layer, expert):  # type: ignore[no-untyped-def]
    uses = memory.uses[layer * memory.mark.shape[1] + expert]
    return np.log(1 + (memory.tokens[layer] + 1) / uses)


@helper
def describe(memory, layer, key, similar, pairs, n_slots, depth, out):  # type: ignore[no-untyped-def]
    """Write the features of one expert to `out` [N_FEATURES] (float32), in the order of NAMES."""
    experts, top_k = memory.mark.shape[1], memory.history.shape[2]
    gap = experts / top_k
    tokens = memory.tokens[layer]
    expected = (memory.uses[key] + 0.5) / (tokens + gap)
    out[0] = np.log((tokens - memory.last_use[key]) / gap + 0.02)
    out[1] = np.log(expected * gap + 0.05)
    f = 2
    for fade in range(N_FADES):
        out[f] = np.log(memory.faded[fade, key] / memory.norm[fade, layer] * gap + 0.05)
        f += 1
    if memory.weighted[0]:
        mean = memory.shares[key] / (memory.faded[SHARE_FADE, key] + 1e-3)
        out[f] = memory.share[key] * top_k - 1
        out[f + 1] = np.log(mean * top_k + 0.05)
        out[f + 2] = 1
    else:
        out[f] = out[f + 1] = out[f + 2] = 0
    f += 3
    floor = 0.02 / gap
    for v in range(N_VOTES):
        vote = memory.vote[v, key - layer * experts] + 0.02 * expected
        out[f] = np.log((vote + floor) / (expected + floor))
        f += 1
    out[f] = np.log(similar + 0.01)
    out[f + 1] = np.log(pairs + 0.01)
    out[f + 2] = np.log(tokens / gap + 0.05)
    out[f + 3] = n_slots / (experts * len(memory.tokens))
    out[f + 4] = np.log(n_slots / (top_k * len(memory.tokens)))
    out[f + 5] = np.log(gap)
    out[f + 6] = depth
