"""AWQ in 4 bits: eight weights a word along a row of [in, out], in an order of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from flashmoe.quant.base import Parts
from flashmoe.quant.by_columns import Rows, times_rows
from flashmoe.quant.gptq import unpacked
from flashmoe.quant.nibbles import FLOATS
from flashmoe.quant.published import Kinds, Published

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of its eight columns


class AWQ(Published):
    """The `gemm` version, which nearly all are: a factor and a zero point for each group.

    The product is rounded once, to the model's dtype.
    """

    name = "awq"
    method = "awq"
    has_own_loader = True
    endings: ClassVar = {"values": ".qweight", "zeros": ".qzeros", "scales": ".scales"}

    @classmethod
    def reads(cls, settings: Mapping[str, Any]) -> bool:
        version = str(settings.get("version") or "gemm").lower()
        bits = settings.get("bits") or settings.get("w_bit")
        return super().reads(settings) and bits == 4 and version == "gemm"

    def accepts(self, kinds: Kinds, settings: Mapping[str, Any]) -> bool:
        (dtype, values), (zero_dtype, zeros) = kinds["values"], kinds["zeros"]
        scale_dtype, scales = kinds["scales"]
        words = {dtype, zero_dtype} == {torch.int32} and scale_dtype in FLOATS
        flat = len(values) == len(zeros) == len(scales) == 2 and all(zeros)
        return (
            words
            and flat
            and values[0] % zeros[0] == 0
            and (scales[0], values[1]) == zeros
            and scales[1] == 8 * values[1]
        )

    def weight(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """As `Published.weight`; it lies in memory as [in, out]."""
        scales = parts["scales"]  # [groups, out]
        numbers = _in_order(parts["values"]).view(len(scales), -1, scales.shape[1])
        numbers.sub_(_in_order(parts["zeros"])[:, None])
        return numbers.mul_(scales[:, None]).view(-1, scales.shape[1]).to(dtype).T

    def weight_products(self, x: torch.Tensor, many: Sequence[Parts]) -> torch.Tensor | None:
        weights = [
            Rows(parts["values"], parts["zeros"], parts["scales"].to(torch.float32))
            for parts in many
        ]
        return times_rows(weights, x, _PLACES)

    def weight_shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        columns, words = parts["values"]
        return 8 * words, columns


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """[n, words] -> [n, 8 * words], float32."""
    places = torch.tensor(_PLACES, device=words.device)
    return unpacked(words).view(*words.shape, 8).index_select(2, places).flatten(1)
