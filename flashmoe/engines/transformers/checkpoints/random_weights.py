"""Random weights of a model's real shapes: the same for the same seed, never all in memory."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import transformers

from flashmoe import quant
from flashmoe.engines.transformers.model import empty_model, moe_modules
from flashmoe.errors import FlashMoEError
from flashmoe.quant import part_name
from flashmoe.quant.published import piece_name

_BLOCK_ELEMENTS = 8 << 20  # the most random numbers that are drawn for one tensor
_ROLL_ELEMENTS = 1_000_003  # a prime, so that no two blocks of a tensor are alike


class RandomWeights:
    """A source for `write_store`: a tensor is drawn when it is asked for, always the same."""

    gives_back = False

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
        return torch.cat(list(blocks(shape, self._generator(name), dtype))).view(shape)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))


class RandomParts(RandomWeights):
    """The same model with its experts' weights as they would be published in a format."""

    def __init__(
        self, config: transformers.PretrainedConfig, seed: int, format: quant.Published
    ) -> None:
        """Raises FlashMoEError as RandomWeights does, and for shapes that are not drawn in it."""
        super().__init__(config, seed)
        self.format = format
        layers = []
        for layer in self.description.layers:
            first = self.expert(layer.module, 0)
            kinds = {name: (part.dtype, tuple(part.shape)) for name, part in first.items()}
            layers.append(replace(layer, parameters=kinds))
        self.description = replace(self.description, layers=tuple(layers), quantisation=format.name)

    def expert(self, module_name: str, expert: int) -> dict[str, torch.Tensor]:
        module = self.experts[module_name]
        drawn: dict[str, torch.Tensor] = {}
        for name, parameter in moe_modules.expert_parameters(module).items():
            shape = tuple(parameter.shape[1:])
            key = f"{module_name}.{name}.{expert}"
            if len(shape) == 1:
                drawn[name] = self._draw(key, shape, parameter.dtype)
                continue
            rows, columns = shape[::-1] if module.is_transposed else shape
            parts = self.format.random(rows, columns, self._generator(key))
            if parts is None:
                raise FlashMoEError(
                    f"a weight of {rows} x {columns} cannot be drawn at random in "
                    f"{self.format.name}: choose another --quant"
                )
            drawn |= {part_name(name, piece_name(0, part)): t for part, t in parts.items()}
        return drawn


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
