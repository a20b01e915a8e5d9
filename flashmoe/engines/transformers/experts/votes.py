"""The order in which a layer's experts are guessed, from what each of its tokens may choose."""

from __future__ import annotations

import numpy as np

from flashmoe.cache.serving import LONG_CHOICES
from flashmoe.events import Event

# Only so many of a prompt's last tokens vote: a router's work would double to ask about them all.
VOTING_TOKENS = 512


def in_order(choices: np.ndarray, n_tokens: int, n_experts: int) -> list[int]:
    """The experts that `choices` [voting tokens, top_k] name, -1 of none left out.

    Of one token in the order given; of a few, most votes first. More choices than there are experts
    name nearly all that the n_tokens will need: in the order in which a cache will serve them.
    """
    if choices.size <= n_experts and len(choices) > 1:
        votes = np.bincount(choices[choices >= 0], minlength=n_experts)
        experts = np.argsort(-votes, kind="stable")[: np.count_nonzero(votes)]
    else:
        experts = Event.of_rows(choices).keys
        if n_tokens * choices.shape[1] > LONG_CHOICES:
            experts = np.sort(experts)
    named: list[int] = experts[experts >= 0].tolist()
    return named
