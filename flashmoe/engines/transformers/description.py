"""What a checkpoint or a store takes, read from its headers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from flashmoe.engines.model_facts import ModelFacts
from flashmoe.engines.transformers.checkpoints import backends
from flashmoe.engines.transformers.checkpoints.backends import ModelBackend
from flashmoe.engines.transformers.experts.mixture import most_waiting_bytes
from flashmoe.memory import free_memory
from flashmoe.quant import NONE
from flashmoe.residency import budget
from flashmoe.store.manifest import DTYPE_BYTES, Manifest, dtype_name


class Cached(NamedTuple):
    """Bytes of the KV cache, a token: of all layers that see every token, and of those that do not.

    window_tokens: what the latter see.
    """

    full_bytes: int
    window_bytes: int
    window_tokens: int


def describe(path: Path) -> ModelFacts:
    """Nothing but headers is read. Raises FlashMoEError as `backends.open_path`."""
    backend = backends.open_path(path)
    try:
        return _facts(backend)
    finally:
        backend.close()


def _facts(backend: ModelBackend) -> ModelFacts:
    manifest, model = backend.manifest, backend.build()
    embedding = model.get_input_embeddings()
    table_bytes = 0  # whose rows are looked up, and not multiplied by
    if not model.config.get_text_config().tie_word_embeddings:
        table_bytes = sum(p.numel() * p.element_size() for p in embedding.parameters())
    cached = cache_of(model.config)
    named = list(model.named_parameters())
    modules = tuple(f"{layer.module}." for layer in manifest.layers)
    return ModelFacts(
        engine=__package__.rpartition(".")[2],
        architecture=manifest.architecture,
        weights=_weights(manifest),
        layers=len(manifest.layers),
        n_experts=max(layer.n_experts for layer in manifest.layers),
        top_k=manifest.top_k,
        experts_bytes=sum(layer.n_experts * layer.extent_bytes for layer in manifest.layers),
        dense_bytes=manifest.dense_bytes,
        dense_token_bytes=manifest.dense_bytes - table_bytes,
        beside_bytes=most_waiting_bytes(model),
        parameters=sum(parameter.numel() for _, parameter in named),
        expert_parameters=sum(p.numel() for name, p in named if name.startswith(modules)),
        kv_bytes=cached.full_bytes,
        window_kv_bytes=cached.window_bytes,
        window_tokens=cached.window_tokens,
        least_bytes=budget.least_bytes(manifest),
        reserve_bytes=free_memory.RESERVE_BYTES,
    )


def _weights(manifest: Manifest) -> str:
    """The scheme of the experts, or the dtype of most of their bytes."""
    if manifest.quantisation != NONE:
        return manifest.quantisation
    sizes: Counter[str] = Counter()
    for tensor in manifest.layers[0].tensors:
        sizes[tensor.dtype] += tensor.size_bytes
    return sizes.most_common(1)[0][0]


def cache_of(config: transformers.PretrainedConfig) -> Cached:
    """What transformers keeps of a token, as far as the configuration's usual names tell.

    Layers without attention keep a state of one size, which is left out.
    """
    settings: dict[str, Any] = config.get_text_config().to_dict()
    heads = settings.get("num_attention_heads") or 0
    if latent := settings.get("kv_lora_rank"):  # of which keys and values are made anew
        values = latent + (settings.get("qk_rope_head_dim") or 0)
    else:
        width = settings.get("head_dim") or (settings.get("hidden_size") or 0) // max(heads, 1)
        values = 2 * (settings.get("num_key_value_heads") or heads) * width
    layer_bytes = values * DTYPE_BYTES.get(dtype_name(config.dtype), 4)  # type: ignore[arg-type]
    count = settings.get("num_hidden_layers") or 0
    kinds = Counter(settings.get("layer_types") or ["full_attention"] * count)
    window_tokens = settings.get("sliding_window") or 0
    windows = kinds["sliding_attention"] if window_tokens else 0
    full = kinds.total() - kinds["linear_attention"] - kinds["conv"] - kinds["mamba"] - windows
    return Cached(full * layer_bytes, windows * layer_bytes, window_tokens)
