"""GPTQ in 4 bits: eight weights a word along a column; a factor and a zero point for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from flashmoe.errors import FlashMoEError
from flashmoe.quant import nibbles
from flashmoe.quant.base import Parts
from flashmoe.quant.by_columns import Columns, times_columns
from flashmoe.quant.nibbles import FLOATS
from flashmoe.quant.published import Kinds, Published

_NUMBERS = tuple(float(bits) for bits in range(16))


class GPTQ(Published):
    """The first form of it, which stores a zero point less 1.

    Which group an input belongs to is said for each (`desc_act`). The product is rounded once, to
    the model's dtype, as gptqmodel dequantises.
    """

    name = "gptq"
    method = "gptq"
    form: ClassVar[str] = "gptq"
    ones: ClassVar[int] = 0x11111111  # what is missing in a word of zero points
    has_own_loader = True
    endings: ClassVar = {
        "values": ".qweight", "zeros": ".qzeros", "scales": ".scales", "groups": ".g_idx",
    }  # fmt: skip

    @classmethod
    def reads(cls, settings: Mapping[str, Any]) -> bool:
        form = settings.get("checkpoint_format") or "gptq"
        return super().reads(settings) and settings.get("bits") == 4 and form == cls.form

    def accepts(self, kinds: Kinds, settings: Mapping[str, Any]) -> bool:
        (dtype, values), (zero_dtype, zeros) = kinds["values"], kinds["zeros"]
        (scale_dtype, scales), (group_dtype, groups) = kinds["scales"], kinds["groups"]
        words = {dtype, zero_dtype, group_dtype} == {torch.int32} and scale_dtype in FLOATS
        flat = len(values) == len(zeros) == len(scales) == 2
        return words and flat and scales == (zeros[0], values[1]) and groups == (8 * values[0],)

    def weight(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """As `Published.weight`; it lies in memory as [in, out]."""
        scales, groups = parts["scales"], parts["groups"].long()
        if not groups.is_meta:
            _check(groups, len(scales))
        values = parts["values"].view(torch.uint8).view(*parts["values"].shape, 4)
        values = values.permute(0, 2, 1).contiguous()  # [in / 8, 4, out]
        numbers = torch.stack(list(nibbles.look_up(values, _NUMBERS, torch.float32)), 2)
        numbers = numbers.view(-1, scales.shape[1])
        # whole words, since a zero point of 0 may have been stored as a borrow
        zeros = unpacked(parts["zeros"] + self.ones)  # [groups, out]
        return numbers.sub_(zeros[groups]).mul_(scales[groups]).to(dtype).T

    def weight_products(self, x: torch.Tensor, many: Sequence[Parts]) -> torch.Tensor | None:
        weights = [
            Columns(
                parts["values"], parts["groups"], parts["zeros"], parts["scales"].to(torch.float32)
            )
            for parts in many
        ]
        return times_columns(weights, x, self.ones)

    def weight_shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        words, rows = parts["values"]
        return rows, 8 * words


class GPTQv2(GPTQ):
    """The second form, which stores zero points as they are."""

    name = "gptq-v2"
    form = "gptq_v2"
    ones = 0


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """The eight numbers of each word, float32: [n, words] -> [n, 8 * words]."""
    halves = nibbles.look_up(words.contiguous().view(torch.uint8), _NUMBERS, torch.float32)
    return torch.stack(list(halves), 2).flatten(1)


def _check(groups: torch.Tensor, count: int) -> None:
    """Raises FlashMoEError unless each input belongs to one of `count` groups."""
    if not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise FlashMoEError("GPTQ: g_idx names groups that a weight does not have")
    if count > 1 and not groups.any():
        raise FlashMoEError(
            "GPTQ: g_idx puts all inputs into one group of several, as some old writers do: use "
            "another checkpoint"
        )
