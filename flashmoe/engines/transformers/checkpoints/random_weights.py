"""Random weights of a model's real shapes: the same for the same seed, never all in memory."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
import transformers

from flashmoe.engines.transformers.model import empty_model, moe_modules

_BLOCK_ELEMENTS = 8 << 20  # the most random numbers that are drawn for one tensor
_ROLL_ELEMENTS = 1_000_003  # a prime, so that no two blocks of a tensor are alike


class RandomWeights:
    """A source for `write_store`: a tensor is drawn when it is asked for, always the same."""

    def __init__(self, config: transformers.PretrainedConfig, seed: int) -> None:
        """Raises FlashMoEError where transformers makes no MoE model of `config`."""
        self.config = config
        self.model = empty_model.build(config)
        self.experts = moe_modules.expert_modules(self.model)
        self.description = moe_modules.describe(self.model, config)
        self.seed = seed

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        """One expert's parameters by name, without the expert dimension."""
        parameters = moe_modules.expert_parameters(self.experts[module_name])
        return {
            name: self._draw(f"{module_name}.{name}.{expert}", tuple(p.shape[1:]), p.dtype)
            for name, p in parameters.items()
        }

    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that `dense` yields, by name."""
        expert_names = moe_modules.expert_parameter_names(self.model)
        state = self.model.state_dict()
        return {n: tuple(t.shape) for n, t in state.items() if n not in expert_names}

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that belongs to no expert, with its name in the model, one at a time."""
        state = self.model.state_dict()
        for name, shape in self.dense_shapes().items():
            yield name, self._draw(name, shape, state[name].dtype)

    def forget_pages(self) -> None:
        """There are none: nothing is read from a file."""

    def _draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.cat(list(blocks(shape, generator, dtype))).view(shape)


def blocks(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """A tensor's values in order, as blocks [elements]: ones for a vector, which scales a norm.

    Others are uniform, with a spread that keeps activations finite. Every block is the same
    random one, rolled, because drawing billions of numbers would take minutes.
    """
    elements = math.prod(shape)
    if len(shape) == 1:
        yield torch.ones(elements, dtype=dtype)
        return
    scale = math.sqrt(3 / shape[-1])
    block = torch.empty(min(_BLOCK_ELEMENTS, elements)).uniform_(-scale, scale, generator=generator)
    block = block.to(dtype)
    done = 0
    while done < elements:
        piece = block[: elements - done]
        yield piece
        done += piece.numel()
        block = block.roll(_ROLL_ELEMENTS)
