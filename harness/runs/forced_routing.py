"""Makes a model route as a recorded trace did, for weights that are not the trace's model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from flashmoe.engines.transformers.experts.lookahead import Lookahead
from flashmoe.engines.transformers.model import moe_modules
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace


@contextmanager
def forced_routing(
    model: PreTrainedModel, trace: Trace, lookahead: Lookahead | None = None
) -> Iterator[None]:
    """Within, the n-th token of a model's life takes the n-th token's experts of `trace`.

    And their weights, where the trace has them, as float32: policies look at those too.
    `lookahead` then guesses as the recorded routers did, or not at all where the trace has no
    guesses: those of random weights would be right by chance only. The first layer is not guessed,
    because the tokens are not the trace's. The hidden states stay the model's own. Works for every
    system whose experts are transformers' experts modules. Raises FlashMoEError when the geometry
    differs, and when the trace is used up.
    """
    modules = moe_modules.expert_modules(model)
    counts = set(map(moe_modules.n_experts, modules.values()))
    if len(modules) != trace.n_layers or counts != {trace.n_experts}:
        raise FlashMoEError(
            f"the trace is {trace.n_layers} layers x {trace.n_experts} experts, the model "
            f"{len(modules)} x {sorted(counts)}: routing cannot be replayed"
        )
    experts = trace.experts.astype(np.int64)
    shares = None if trace.weights is None else trace.weights.astype(np.float32)
    used = [0] * len(modules)

    def hook_for(number: int):  # type: ignore[no-untyped-def]
        def hook(
            module: nn.Module, arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, ...]:
            hidden, index, weights = arguments
            first = used[number]
            used[number] += len(index)
            rows = experts[first : used[number], number]
            if rows.shape != tuple(index.shape):
                raise FlashMoEError("the recorded routing is used up: ask for fewer tokens")
            if shares is not None:
                weights = torch.from_numpy(shares[first : used[number], number])
            return hidden, torch.from_numpy(rows), weights

        return hook

    handles = [
        module.register_forward_pre_hook(hook_for(number))
        for number, module in enumerate(modules.values())
    ]
    if lookahead:
        unforced = lookahead.route

        def route(layer: int, hidden: torch.Tensor):  # type: ignore[no-untyped-def]
            if trace.guesses is None or layer >= len(modules):
                return None
            until = used[layer - 1]  # the layer below has just taken these tokens
            index = trace.guesses[until - len(hidden) : until, layer - 1].astype(np.int64)
            routed = unforced(layer, hidden)
            return routed and routed._replace(experts=torch.from_numpy(index))

        lookahead.route = route  # type: ignore[method-assign]
        memory, lookahead.token_memory = lookahead.token_memory, None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if lookahead:
            del lookahead.route
            lookahead.token_memory = memory
