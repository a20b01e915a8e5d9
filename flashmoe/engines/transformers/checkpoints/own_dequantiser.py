"""Loads plain weights out of formats for which transformers itself needs another library."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer

from flashmoe.quant import Published

_WEIGHT = "weight"


class OwnDequantiser(HfQuantizer):
    """As transformers' quantizers that can dequantise, by one of our formats."""

    def __init__(self, format: Published) -> None:
        settings: Any = SimpleNamespace(quant_method=format.method, dequantize=True)
        super().__init__(settings, pre_quantized=True)
        self.format = format
        # of a weight: its own name, where it is plain, and those of its parts
        names = [ending.removeprefix(".") for ending in (*format.endings.values(), *format.unused)]
        self.serialized_names = {_WEIGHT: [_WEIGHT, *names]}

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": _Dequantise}

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Dequantise(ConversionOps):
    def __init__(self, hf_quantizer: OwnDequantiser) -> None:
        self.hf_quantizer = hf_quantizer

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Any,
        **_: Any,
    ) -> dict[str, Any]:
        """One weight under its own name, or those of experts under the names of a part of each."""
        dtype = model.get_parameter(full_layer_name).dtype
        parts_of: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(dict)
        done: dict[str, Any] = {}
        endings = self.hf_quantizer.format.endings
        for pattern, tensors in input_dict.items():
            listed = tensors if isinstance(tensors, list) else [tensors]
            ending = next((e for e in endings.values() if f".{pattern}".endswith(e)), None)
            if ending is not None:
                parts_of[f".{pattern}".removesuffix(ending)][ending] = listed
            elif f".{pattern}".endswith(f".{_WEIGHT}"):
                done[pattern] = [tensor.to(dtype) for tensor in listed]
        for stem, tensors_of in parts_of.items():
            if tensors_of.keys() != set(endings.values()):
                raise ValueError(f"parts are missing beside {', '.join(sorted(tensors_of))}")
            each = zip(*(tensors_of[ending] for ending in endings.values()), strict=True)
            weights = [
                self.hf_quantizer.format.weight(dict(zip(endings, parts, strict=True)), dtype)
                for parts in each
            ]
            done[f"{stem}{next(iter(endings.values()))}".removeprefix(".")] = weights
        if len(target_patterns) == 1 and source_patterns[0] == _WEIGHT:
            ((weight,),) = done.values()
            return {full_layer_name: weight.contiguous()}
        return done
