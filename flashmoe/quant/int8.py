"""8 bits a weight: a scale an output row, symmetric, by torch's own CPU kernel."""

from __future__ import annotations

import torch

from flashmoe.quant.base import Parts, Quantiser


class Int8(Quantiser):
    """Rounds each row to -127..127 times its scale; multiplied by without being unpacked."""

    name = "int8"
    device_types = ("cpu",)

    def parts(self, weight: torch.Tensor) -> Parts:
        values = weight.float().contiguous()
        scales = (values.abs().amax(1) / 127).clamp_min(1e-12).to(weight.dtype)
        rounded = (values / scales.float()[:, None]).round().clamp(-127, 127)
        return {"values": rounded.to(torch.int8), "scales": scales}

    def linear(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        return torch._weight_int8pack_mm(x.contiguous(), parts["values"], parts["scales"])

    def shape(self, parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, columns = parts["values"]
        return rows, columns
