"""FP8 weights whose last blocks are smaller than the others, such as DeepSeek-V3's kv_a_proj.

transformers takes the size of a block from the shapes, which is right where blocks divide the
weight evenly; else it refuses, or takes a wrong factor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer


def allow(quantizer: FineGrainedFP8HfQuantizer) -> None:
    """From now on `quantizer` dequantises such weights too, by config.json's block size."""
    if size := quantizer.quantization_config.weight_block_size:
        operations = {"dequantize": partial(_Ragged, size=tuple(size))}
        quantizer.get_load_operations = lambda: operations  # type: ignore[method-assign]


class _Ragged(Fp8Dequantize):
    def __init__(self, hf_quantizer: FineGrainedFP8HfQuantizer, size: tuple[int, int]) -> None:
        super().__init__(hf_quantizer)
        self._size = size

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: Any = None
    ) -> torch.Tensor:
        """As transformers', of a weight filled up with zeros to whole blocks."""
        if quantized.dtype != torch.float8_e4m3fn or scales.dim() != 2:
            return super()._dequantize_one(quantized, scales, output_dtype)
        rows, columns = quantized.shape[-2:]
        whole = tuple(count * block for count, block in zip(scales.shape, self._size, strict=True))
        counts = tuple(
            -(-size // block) for size, block in zip((rows, columns), self._size, strict=True)
        )
        # blocks of another size than config.json's are transformers' to judge
        if whole == (rows, columns) or counts != tuple(scales.shape):
            return super()._dequantize_one(quantized, scales, output_dtype)
        filled = quantized.new_zeros(whole, dtype=torch.uint8)
        filled[:rows, :columns] = quantized.view(torch.uint8)
        numbers = super()._dequantize_one(filled.view(quantized.dtype), scales, output_dtype)
        return numbers[:rows, :columns].contiguous()
