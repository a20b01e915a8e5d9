"""Finds in which dtypes a family's own experts compute, by running their forward on an example.

Most families multiply and add in the model's dtype; some add in float32, some do all in it, some
in whichever dtype the router's weights have. Nothing but their code says which. So each experts
module runs that code on a small example, and FlashMoE takes the precision in which its own
arithmetic gives the same bits. Where none does, the family is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from flashmoe.errors import FlashMoEError

# The sizes of the example, whose hidden states are as wide as the model's.
EXPERTS, TOP_K, TOKENS, INTERMEDIATE = 4, 3, 16, 8


class Precision(NamedTuple):
    """The dtypes of a layer's arithmetic."""

    compute_dtype: torch.dtype | None  # of an expert's arithmetic; None: as its inputs are
    sum_dtype: torch.dtype  # of the sum of the experts' outputs
    fast: bool = False  # see `loading.load`'s arithmetic


# (module, hidden [tokens, width], index and weights [tokens, top_k], precision) -> hidden's shape
Arithmetic = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, Precision], torch.Tensor]


def find_precision(
    module: nn.Module, hidden: torch.Tensor, weights: torch.Tensor, arithmetic: Arithmetic
) -> Precision:
    """The precision of `module` for hidden states and router weights of these dtypes.

    It is found once, and kept with the module. arithmetic: the computation that is to equal the
    module's own; raises FlashMoEError where it does so in no precision.
    """
    by_dtypes: dict[tuple[torch.dtype, torch.dtype], Precision]
    by_dtypes = vars(module).setdefault("flashmoe_precision", {})
    dtypes = hidden.dtype, weights.dtype
    if dtypes not in by_dtypes:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            by_dtypes[dtypes] = _try_each(module, hidden, weights, arithmetic)
    return by_dtypes[dtypes]


def _try_each(
    module: nn.Module, hidden: torch.Tensor, weights: torch.Tensor, arithmetic: Arithmetic
) -> Precision:
    # a generator of its own leaves the user's random numbers as they were
    generator = torch.Generator().manual_seed(0)

    def random(like: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    example = Example(module, {
        name: random(hidden, EXPERTS, *shape) / shape[-1] ** 0.5
        for name, shape in _shapes(module, hidden.shape[-1]).items()
    })  # fmt: skip
    states, shares = random(hidden, TOKENS, hidden.shape[-1]), random(weights, TOKENS, TOP_K)
    order = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)
    inputs = states, order[:, :TOP_K].to(hidden.device), shares.sigmoid()
    expected = type(module).forward.__wrapped__(example, *inputs)  # type: ignore[attr-defined]
    wide = torch.float32
    for precision in (Precision(None, hidden.dtype), Precision(None, wide), Precision(wide, wide)):
        if torch.equal(arithmetic(example, *inputs, precision), expected):
            return precision
    raise FlashMoEError(
        f"{type(module).__name__} of transformers computes its experts in a way that FlashMoE does "
        f"not follow in {hidden.dtype}: use transformers itself for this model, and report it"
    )


def _shapes(module: nn.Module, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one expert's parameters, by the names that `expert_output` asks for."""
    gated = bool(module.has_gate)
    up, rows = ("gate_up_proj", 2 * INTERMEDIATE) if gated else ("up_proj", INTERMEDIATE)
    shapes: dict[str, tuple[int, ...]] = {up: (rows, width), "down_proj": (width, INTERMEDIATE)}
    if module.is_transposed:
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    if module.has_bias:
        shapes |= {f"{up}_bias": (rows,), "down_proj_bias": (width,)}
    return shapes


class Example:
    """An experts module of few small experts; everything else is `module`'s."""

    def __init__(self, module: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
        self.module = module
        self.parameters = parameters  # [experts, ...], by name
        self.num_experts = EXPERTS

    def __getattr__(self, name: str) -> Any:
        return self.parameters[name] if name in self.parameters else getattr(self.module, name)

    def expert(self, number: int) -> dict[str, torch.Tensor]:
        """One expert's parameters, by name."""
        return {name: stacked[number] for name, stacked in self.parameters.items()}
