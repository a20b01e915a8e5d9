"""Multiplies many tokens in float32, for processors whose bfloat16 products are slow."""

from __future__ import annotations

import torch

_TILE_ROWS = 512  # they and their results stay in the processor's cache
_ALIKE = 8  # tokens: libraries take almost twice as long for some other numbers


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] times a weight [out, in] of any strides: float32 [n, out].

    So many rows at a time are made float32, which takes a few MB.
    """
    n_tokens = -(-len(x) // _ALIKE) * _ALIKE
    columns = torch.zeros(weight.shape[1], n_tokens)
    columns[:, : len(x)] = x.T
    out = torch.empty(len(weight), n_tokens)
    tile = torch.empty(min(_TILE_ROWS, len(weight)), weight.shape[1])
    for first in range(0, len(weight), _TILE_ROWS):
        rows = weight[first : first + _TILE_ROWS]
        torch.mm(tile[: len(rows)].copy_(rows), columns, out=out[first : first + len(rows)])
    return out.T[: len(x)]
