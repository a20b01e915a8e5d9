"""The features of an expert that `learned` sees: scale-free, computed online in compiled code.

Times are in tokens or in gaps. A gap is E / top_k tokens, after which a balanced router comes back
to an expert, so that one network serves every geometry. docs/policy.md says what each feature
is worth.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashmoe.events import LAYERS_BELOW
from flashmoe.policies.base import Scope
from flashmoe.util.machine_code import helper

FADES_TOKENS = (3.0, 12.0, 40.0, 150.0)  # time constants of the fading counts, in tokens
FADES_GAPS = (1.0, 5.0)  # and in gaps
N_FADES = len(FADES_TOKENS) + len(FADES_GAPS)
SHARE_FADE = N_FADES - 1  # the fading count over which router weights are averaged

REMEMBERED_EVENTS = 512  # per layer, for comparison with the current event
COMPARED_EVENTS = 3  # the current event and the two before it
# What followed earlier events votes on what is needed next. A vote weighs as much as a likeness
# (0 to 1) to a power: that of the event alone (LOOSE, EVENT), of it and the one before (PAIR), or
# of the last three (TRIPLE). The power grows with the evidence that is compared.
LOOSE, EVENT, PAIR, TRIPLE = range(4)
POWERS = (2, 5, 6, 7)
# (weighting, factor by which a vote fades with each token from the earlier event to a use)
VOTES = (
    (EVENT, 0.0), (EVENT, 0.6), (EVENT, 0.85), (EVENT, 0.95), (PAIR, 0.0), (PAIR, 0.85),
    (LOOSE, 0.0), (LOOSE, 0.9), (TRIPLE, 0.0), (TRIPLE, 0.9),
)  # fmt: skip
N_VOTES = len(VOTES)
_WEIGHTING = tuple(weighting for weighting, _ in VOTES)
_FADING = tuple(fading for _, fading in VOTES)
_EVENT_VOTE, _PAIR_VOTE = VOTES.index((EVENT, 0.0)), VOTES.index((PAIR, 0.0))

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


class RoutingHistory(NamedTuple):
    """Routing statistics of the experts of one cache; arrays that compiled code updates.

    n keys, L layers, E experts in a layer; float64 where no dtype is given.
    """

    tokens: np.ndarray  # [L] int64: tokens that each layer has served
    last_use: np.ndarray  # [n] int64: the layer's token that used the key last, -1 for none
    uses: np.ndarray  # [n] int64
    keep: np.ndarray  # [fades]: what is left of a count after one token
    faded: np.ndarray  # [fades, n]: fading counts of uses
    norm: np.ndarray  # [fades, L]: the count of an expert that every token uses
    share: np.ndarray  # [n]: share of the router's weights at the last use
    shares: np.ndarray  # [n]: sum of these shares, which fades like faded[SHARE_FADE]
    weighted: np.ndarray  # [1] bool: events tell the router's weights
    events: np.ndarray  # [L, REMEMBERED_EVENTS, top_k] int64: experts, -1 for none
    lower_events: np.ndarray  # [L, REMEMBERED_EVENTS, LAYERS_BELOW * top_k] int64: see `told`
    # Scratch of `recall`, by compared event, the current one first.
    mark: np.ndarray  # [COMPARED_EVENTS, E]: rarity of the event's experts, 0 of others
    mark_below: np.ndarray  # [COMPARED_EVENTS - 1, LAYERS_BELOW * E]: 1 for the event's choices
    whole: np.ndarray  # [COMPARED_EVENTS]: the sum for an identical event, pair, triple
    # Scratch of `recall`, by vote.
    vote: np.ndarray  # [E, votes]
    weight: np.ndarray  # [votes]: weights of the events so far, faded to the one looked at
    total: np.ndarray  # [votes]: sum of the weights

    @classmethod
    def empty(cls, scope: Scope) -> RoutingHistory:
        """Before the first event."""
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
            events=np.full((layers, REMEMBERED_EVENTS, scope.top_k), -1),
            lower_events=np.full((layers, REMEMBERED_EVENTS, LAYERS_BELOW * scope.top_k), -1),
            mark=np.zeros((COMPARED_EVENTS, experts)),
            mark_below=np.zeros((COMPARED_EVENTS - 1, LAYERS_BELOW * experts)),
            whole=np.zeros(COMPARED_EVENTS),
            vote=np.zeros((experts, N_VOTES)),
            weight=np.zeros(N_VOTES),
            total=np.zeros(N_VOTES),
        )


@helper
def remember(history, event):
    """Take in `event` token by token; return its layer.

    A prompt leaves the same history as decoding it would, because the network was trained on
    single tokens.
    """
    experts = history.mark.shape[1]
    layer = event.keys[0] // experts
    history.weighted[0] = len(event.weights) > 0
    for token in range(len(event.rows)):
        _fade(history, layer)
        for i, key in enumerate(event.rows[token]):
            history.uses[key] += 1
            history.last_use[key] = history.tokens[layer]
            for fade in range(N_FADES):
                history.faded[fade, key] += 1
            if history.weighted[0]:
                history.share[key] = event.weights[token, i]
                history.shares[key] += event.weights[token, i]
        _record(history.events[layer], history.tokens[layer], event.rows[token], layer * experts)
        _record(history.lower_events[layer], history.tokens[layer], event.below[token], 0)
        history.tokens[layer] += 1
    return layer


@helper
def _fade(history, layer):
    """Let every fading count of `layer` fade by one token."""
    experts = history.mark.shape[1]
    first = layer * experts
    for fade in range(N_FADES):
        history.norm[fade, layer] = history.norm[fade, layer] * history.keep[fade] + 1
        for key in range(first, first + experts):
            history.faded[fade, key] *= history.keep[fade]
    for key in range(first, first + experts):
        history.shares[key] *= history.keep[SHARE_FADE]


@helper
def _record(events, token, choices, offset):
    """Write `choices` - `offset` over the oldest row of `events` [REMEMBERED_EVENTS, width]."""
    row = events[token % REMEMBERED_EVENTS]
    for i in range(len(row)):
        row[i] = choices[i] - offset if i < len(choices) else -1


@helper
def recall(history, layer):
    """Fill `history.vote` by what followed those earlier events that were like the current one.

    The likeness of two events is the share of the current event's experts, here and at the
    layers below, that the earlier one has too; rare experts weigh more. Returns the total
    weight of like events, and of like pairs of events.
    """
    tokens = history.tokens[layer]
    events, lower_events = history.events[layer], history.lower_events[layer]
    whole, weight, total = history.whole, history.weight, history.total
    for back in range(COMPARED_EVENTS):
        whole[back] = 1e-6
    for back in range(min(COMPARED_EVENTS, tokens)):
        event_sum = 0.0
        for expert in events[(tokens - 1 - back) % REMEMBERED_EVENTS]:
            if expert >= 0:
                mark = _rarity(history, layer, expert)
                history.mark[back, expert] = mark
                event_sum += mark
        if back < COMPARED_EVENTS - 1:
            for expert in lower_events[(tokens - 1 - back) % REMEMBERED_EVENTS]:
                if expert >= 0:
                    history.mark_below[back, expert] = 1
                    event_sum += 1
        for longer in range(back, COMPARED_EVENTS):
            whole[longer] += event_sum
    vote = history.vote
    vote[:] = 0
    weight[:] = 0
    total[:] = 1e-3
    # With the current event t and an earlier event s: the likeness of t-1 to s-1, of t-2 to s-2,
    # and of t-2 to s-1, which becomes the second one as s goes on.
    one_before, two_before, next_two_before = 0.0, 0.0, 0.0
    for age in range(min(tokens, REMEMBERED_EVENTS) - 1, -1, -1):
        past = (tokens - 1 - age) % REMEMBERED_EVENTS
        alike, first, second = 0.0, 0.0, 0.0  # of t, t-1 and t-2 to s
        for expert in events[past]:
            if expert >= 0:
                alike += history.mark[0, expert]
                first += history.mark[1, expert]
                second += history.mark[2, expert]
                for v in range(N_VOTES):
                    vote[expert, v] += weight[v]
        for expert in lower_events[past]:
            if expert >= 0:
                alike += history.mark_below[0, expert]
                first += history.mark_below[1, expert]
        weights = (
            (alike / whole[0]) ** POWERS[LOOSE],
            (alike / whole[0]) ** POWERS[EVENT],
            ((alike + one_before) / whole[1]) ** POWERS[PAIR],
            ((alike + one_before + two_before) / whole[2]) ** POWERS[TRIPLE],
        )
        for v in range(N_VOTES):
            total[v] += weight[v]
            weight[v] = weight[v] * _FADING[v] + weights[_WEIGHTING[v]]
        one_before, two_before, next_two_before = first, next_two_before, second
    for expert in range(len(vote)):
        for v in range(N_VOTES):
            vote[expert, v] /= total[v]
    for back in range(min(COMPARED_EVENTS, tokens)):
        for expert in events[(tokens - 1 - back) % REMEMBERED_EVENTS]:
            if expert >= 0:
                history.mark[back, expert] = 0
        if back < COMPARED_EVENTS - 1:
            for expert in lower_events[(tokens - 1 - back) % REMEMBERED_EVENTS]:
                if expert >= 0:
                    history.mark_below[back, expert] = 0
    return total[_EVENT_VOTE], total[_PAIR_VOTE]


@helper
def _rarity(history, layer, expert):
    uses = history.uses[layer * history.mark.shape[1] + expert]
    return np.log(1 + (history.tokens[layer] + 1) / uses)


@helper
def describe(history, layer, key, similar, pairs, n_slots, depth, out):
    """Write the features of one expert to `out` [N_FEATURES] (float32), in the order of NAMES."""
    experts, top_k = history.mark.shape[1], history.events.shape[2]
    gap = experts / top_k
    tokens = history.tokens[layer]
    expected = (history.uses[key] + 0.5) / (tokens + gap)
    out[0] = np.log((tokens - history.last_use[key]) / gap + 0.02)
    out[1] = np.log(expected * gap + 0.05)
    f = 2
    for fade in range(N_FADES):
        out[f] = np.log(history.faded[fade, key] / history.norm[fade, layer] * gap + 0.05)
        f += 1
    if history.weighted[0]:
        mean = history.shares[key] / (history.faded[SHARE_FADE, key] + 1e-3)
        out[f] = history.share[key] * top_k - 1
        out[f + 1] = np.log(mean * top_k + 0.05)
        out[f + 2] = 1
    else:
        out[f] = out[f + 1] = out[f + 2] = 0
    f += 3
    floor = 0.02 / gap
    for v in range(N_VOTES):
        vote = history.vote[key - layer * experts, v] + 0.02 * expected
        out[f] = np.log((vote + floor) / (expected + floor))
        f += 1
    out[f] = np.log(similar + 0.01)
    out[f + 1] = np.log(pairs + 0.01)
    out[f + 2] = np.log(tokens / gap + 0.05)
    out[f + 3] = n_slots / (experts * len(history.tokens))
    out[f + 4] = np.log(n_slots / (top_k * len(history.tokens)))
    out[f + 5] = np.log(gap)
    out[f + 6] = depth
