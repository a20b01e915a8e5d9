"""Tiny checkpoints as others publish them, and plain ones of the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import configure, rewrite, tensors_of
from tiny import make_checkpoint

SIZES = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
DEEPSEEK = SIZES | dict(qk_rope_head_dim=16)  # so that blocks of 16 divide every weight
ALWAYS_PLAIN = ("embed_tokens", "lm_head", "norm", ".gate.", "bias", "sinks", "router")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Tensors = dict[str, torch.Tensor]
# (weight [out, in]) -> (its tensors on disk by how their names end, the numbers they stand for)
Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def fp8(weight: torch.Tensor, block: int = 16, scales: torch.dtype = torch.float32):
    rows, columns = weight.shape
    across, down = -(-columns // block), -(-rows // block)
    whole = torch.zeros(down * block, across * block)
    whole[:rows, :columns] = weight
    blocks = whole.view(down, block, across, block)
    factors = blocks.abs().amax((1, 3)).clamp_min(1e-6) / 448
    if scales in (torch.uint8, torch.float8_e8m0fnu):
        exponents = factors.log2().ceil()
        factors, stored = exponents.exp2(), (exponents + 127).to(torch.uint8)
        if scales == torch.float8_e8m0fnu:
            stored = stored.view(scales)
    else:
        stored = factors.to(scales)
        factors = stored.float()
    values = (blocks / factors[:, None, :, None]).to(torch.float8_e4m3fn)
    numbers = values.float() * factors[:, None, :, None]
    cut = values.view(torch.uint8).view(whole.shape)[:rows, :columns].contiguous()
    tensors = {".weight": cut.view(torch.float8_e4m3fn), ".weight_scale_inv": stored}
    return tensors, numbers.view(whole.shape)[:rows, :columns]


def fp4(weight: torch.Tensor):
    """Random numbers of the weight's shape."""
    codes = torch.randint(0, 16, weight.shape)
    exponents = torch.randint(120, 126, (weight.shape[0], weight.shape[1] // 32))
    values = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    factors = (exponents - 127.0).exp2().repeat_interleave(32, 1)
    stored = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    return {".weight": values, ".weight_scale_inv": stored}, E2M1[codes] * factors


def _words(values: torch.Tensor) -> torch.Tensor:
    """[..., 8] of 4 bits -> [...], the first in the lowest bits."""
    return (values.long() << 4 * torch.arange(8)).sum(-1).to(torch.int32)


def _rounded(weight: torch.Tensor, groups: torch.Tensor):
    """Codes [out, in], zero points and factors [out, groups], numbers [out, in]."""
    count = int(groups.max()) + 1
    lows = torch.stack([weight[:, groups == g].amin(1).clamp_max(0) for g in range(count)], 1)
    highs = torch.stack([weight[:, groups == g].amax(1).clamp_min(0) for g in range(count)], 1)
    scales = ((highs - lows) / 15).clamp_min(1e-4).half()
    zeros = (-lows / scales.float()).round().clamp(0, 15)
    codes = (weight / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, 15)
    numbers = (codes - zeros[:, groups]) * scales.float()[:, groups]
    return codes, zeros, scales, numbers


def gptq(weight: torch.Tensor, *, stored_less: int = 1, mixed: bool = False):
    rows, columns = weight.shape
    groups = torch.arange(columns) // 16
    if mixed:
        groups = groups[torch.randperm(columns)]
    codes, zeros, scales, numbers = _rounded(weight, groups)
    stored = _words(zeros.T.reshape(-1, rows // 8, 8)) - stored_less * 0x11111111
    return {
        ".qweight": _words(codes.T.reshape(columns // 8, 8, rows).transpose(1, 2)),
        ".qzeros": stored,
        ".scales": scales.T,
        ".g_idx": groups.to(torch.int32),
    }, numbers


def awq(weight: torch.Tensor):
    rows, columns = weight.shape
    codes, zeros, scales, numbers = _rounded(weight, torch.arange(columns) // 16)

    def packed(values: torch.Tensor) -> torch.Tensor:
        return _words(values.T.reshape(-1, rows // 8, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]])

    return {".qweight": packed(codes), ".qzeros": packed(zeros), ".scales": scales.T}, numbers


def compressed(weight: torch.Tensor, *, group: int = 32):
    """By the library that writes such checkpoints."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme(group)
    weight = weight.bfloat16()
    groups = weight.view(len(weight), -1, group)
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    given = {"weight": weight, "weight_scale": scales.bfloat16(), "weight_zero_point": zeros}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(dict(given), scheme)
    numbers = compressor.decompress(dict(stored), scheme)["weight"]
    return {f".{name}": tensor for name, tensor in stored.items()}, numbers.float()


def _scheme(group: int = 32) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")


def _compressed_settings() -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig(
        config_groups={"group_0": _scheme()},
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head", r"re:.*mlp\.gate$"],
    ).model_dump(mode="json")


@dataclass(frozen=True)
class Format:
    """How one kind of checkpoint is made; `name`: FlashMoE's of its experts' format."""

    name: str
    family: str
    quantise: Quantise | None  # None: mxfp4's, of all experts at once
    settings: Callable[[], dict[str, Any]] | dict[str, Any]
    by_transformers: bool = False  # can it make the plain model itself?
    dtype: torch.dtype = torch.bfloat16
    sizes: dict[str, int] = field(default_factory=lambda: SIZES)


def _fp8(scales: torch.dtype) -> Format:
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
    quantise = lambda w: fp8(w, 16, scales)  # noqa: E731
    return Format("fp8", "deepseek_v2", quantise, settings, True, sizes=DEEPSEEK)


def _gptq(form: str, **options: Any) -> Format:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": form}
    less = int(form == "gptq")
    quantise = lambda w: gptq(w, stored_less=less, **options)  # noqa: E731
    return Format(form.replace("_", "-"), "qwen3_moe", quantise, settings, dtype=torch.float16)


FORMATS = {
    "mxfp4": Format("mxfp4", "gpt_oss", None, {"quant_method": "mxfp4"}, True),
    "fp8": _fp8(torch.float32),
    "fp8-bfloat16": _fp8(torch.bfloat16),
    "fp8-e8m0": _fp8(torch.float8_e8m0fnu),
    "fp8-bytes": _fp8(torch.uint8),
    "fp4": Format(
        "fp4", "qwen3_moe", fp4, {"quant_method": "fp8", "weight_block_size": [16, 16]}, True
    ),
    "compressed": Format("compressed-int4", "olmoe", compressed, _compressed_settings, True),
    "gptq": _gptq("gptq"),
    "gptq-mixed": _gptq("gptq", mixed=True),
    "gptq-v2": _gptq("gptq_v2"),
    "awq": Format(
        "awq", "qwen3_moe", awq, {"quant_method": "awq", "bits": 4, "group_size": 16},
        dtype=torch.float16,
    ),
}  # fmt: skip


def make(kind: str, folder: Path) -> tuple[Path, Path]:
    """Two checkpoints in `folder`: as published, and plain."""
    format = FORMATS[kind]
    published, plain = folder / "published", folder / "plain"
    for path in (published, plain):
        make_checkpoint(format.family, path, format.dtype, **format.sizes)
    torch.manual_seed(1)
    stored: Tensors = {}
    numbers: Tensors = {}
    for name, tensor in tensors_of(plain).items():
        if format.quantise is None and name.endswith(("gate_up_proj", "down_proj")):
            parts, values = mxfp4(tensor)
            stored |= {name + ending: part for ending, part in parts.items()}
        elif format.quantise is None or tensor.dim() < 2 or any(p in name for p in ALWAYS_PLAIN):
            stored[name] = values = tensor
        else:
            parts, values = format.quantise(tensor.float())
            stem = name.removesuffix(".weight")
            stored |= {stem + ending: part for ending, part in parts.items()}
        numbers[name] = values.to(tensor.dtype)
    rewrite(published, stored)
    rewrite(plain, numbers)
    settings = format.settings if isinstance(format.settings, dict) else format.settings()
    configure(published, quantization_config=settings)
    return published, plain


def mxfp4(experts: torch.Tensor):
    """Random numbers of the shape of experts [experts, in, out]."""
    count, columns, rows = experts.shape
    codes = torch.randint(0, 16, (count, rows, columns))
    exponents = torch.randint(118, 126, (count, rows, columns // 32))
    numbers = E2M1[codes] * (exponents - 127.0).exp2().repeat_interleave(32, 2)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {
        "_blocks": blocks.view(count, rows, columns // 32, 16),
        "_scales": exponents.to(torch.uint8),
    }, numbers.transpose(1, 2)


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return settings["quantization_config"]
