"""Solves the routers of random weights so that they route a known text as a trace recorded it.

For engines whose routing cannot be forced from outside: whoever runs these weights on the prompt
1000, 1001, ... and decodes greedily is led from token to token, and from expert to expert, as the
recorded model was. The embeddings are made so large that what layers add to them hardly turns
the hidden state; each router is then a linear system in the (normalised) embeddings, with fewer
tokens than dimensions, so that it has an exact solution. Bytes and arithmetic stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import transformers

from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights
from flashmoe.engines.transformers.model import moe_modules
from flashmoe.errors import FlashMoEError
from flashmoe.trace import Trace
from harness.runs.job import FIRST_TOKEN

EMBEDDING_SCALE = 1000.0  # beside some 30 outputs of layers of size 1, in random directions
LOGIT, RANK_STEP = 8.0, 0.5  # of the chosen, by rank; 0 for all others
NEXT_TOKEN_LOGIT = 20.0  # beside 50,000 of a normal distribution
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROUTERS = "gate.weight", "router.weight"  # beside a block's experts


class SteeredWeights(RandomWeights):
    """A source for `write_store`. The first token of `trace` is FIRST_TOKEN, and so on."""

    def __init__(
        self,
        config: transformers.PretrainedConfig,
        seed: int,
        trace: Trace,
        stored: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
    ) -> None:
        """stored: what an engine reads, float32, where embeddings [tokens, width] were written.

        Raises FlashMoEError where the model is not laid out as OLMoE, Qwen3-MoE and gpt-oss are.
        """
        super().__init__(config, seed)
        self.trace = trace
        self._stored = stored
        known = self.model.state_dict().keys()
        blocks = [name.removesuffix("experts") for name in self.experts]
        names = [
            next((block + name for name in _ROUTERS if block + name in known), block + _ROUTERS[0])
            for block in blocks
        ]
        missing = {_EMBEDDING, _HEAD, *names} - known
        if missing:
            raise FlashMoEError(f"{config.model_type} cannot be steered: it has no {min(missing)}")
        self._layer_of = {name: layer for layer, name in enumerate(names)}
        self._ids = torch.arange(len(trace.experts)) + FIRST_TOKEN

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        embeddings = next(tensor for name, tensor in super().dense() if name == _EMBEDDING)
        # [tokens, width], as the norms leave it
        normalised = self._stored(embeddings[self._ids] * EMBEDDING_SCALE)
        normalised /= normalised.square().mean(1, keepdim=True).sqrt()
        inverse = torch.linalg.pinv(normalised)  # [width, tokens]
        for name, tensor in super().dense():
            if name == _EMBEDDING:
                tensor = tensor * EMBEDDING_SCALE
            elif name == _HEAD:
                tensor[self._ids + 1] = (normalised * (NEXT_TOKEN_LOGIT / normalised.shape[1])).to(
                    tensor.dtype
                )
            elif name in self._layer_of:
                logits = self._logits(self._layer_of[name])
                tensor = (inverse @ logits).T.contiguous().to(tensor.dtype)
            yield name, tensor

    def _logits(self, layer: int) -> torch.Tensor:
        """What the layer's router is to say of each token, [tokens, experts]."""
        experts = torch.from_numpy(self.trace.experts[:, layer].astype(np.int64))
        ranked = LOGIT - RANK_STEP * torch.arange(experts.shape[1], dtype=torch.float32)
        logits = torch.zeros(
            len(experts), moe_modules.n_experts(list(self.experts.values())[layer])
        )
        return logits.scatter_(1, experts, ranked.expand(len(experts), -1))
