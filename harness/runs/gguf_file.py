"""One GGUF file, which llama.cpp reads: writes a source of weights as one, says what is in it."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from flashmoe import quant
from flashmoe.engines.llama.files import quantisation, writer
from flashmoe.engines.transformers.checkpoints.random_weights import RandomWeights

# What comes nearest to our schemes in bits a weight (8.5 to 8, 4.5 to 5).
_KINDS = {quant.NONE: "bf16", "int8": "q8_0", "int4": "q4_0"}


def write(
    source: RandomWeights, path: Path, scheme: str = quant.NONE, *, head_only: bool = False
) -> None:
    """As `flashmoe.engines.llama.files.writer`; scheme: one of ours, or one of its own."""
    writer.write(source, path, _KINDS.get(scheme, scheme), head_only=head_only)


def embeddings_in_file(embeddings: torch.Tensor, scheme: str) -> torch.Tensor:
    """The float32 values that llama.cpp reads from a file of `scheme` of [tokens, width] others."""
    shape = tuple(embeddings.shape)
    recipe = quantisation.recipe(_KINDS.get(scheme, scheme))
    kind = recipe.kind("token_embd.weight", shape, 0, 0, vectors=False)
    rows = quantisation.encode(embeddings, kind).reshape(shape[0], -1)
    return torch.from_numpy(gguf.quants.dequantize(rows, kind).reshape(shape))


def sizes(model: Path) -> tuple[int, int]:
    """Bytes of the file beside experts, and of the largest expert's matrix."""
    experts = [
        tensor
        for tensor in gguf.GGUFReader(model).tensors
        if "_exps." in tensor.name and tensor.name.endswith(".weight")
    ]
    total = sum(int(tensor.n_bytes) for tensor in experts)
    each = max(int(tensor.n_bytes) // int(tensor.shape[-1]) for tensor in experts)
    return model.stat().st_size - total, each // 4096 * 4096 or 4096
