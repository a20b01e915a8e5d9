"""Tiny random models of several families, saved by transformers in its hub layout, and stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import flashmoe
from flashmoe.engines.transformers.pack import pack
from flashmoe.reading import reader
from flashmoe.store import manifest

FAMILIES = {
    "olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, head_dim=16),  # biased, transposed
    "deepseek_v2": dict(  # shared experts, a dense first layer
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1, topk_method="greedy",
    ),
}  # fmt: skip


SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def make_checkpoint(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, **sizes: int
) -> Path:
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family] | sizes)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # larger than the default spread, so that routing varies
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def budget(store: Path, slots: int, spares: int = 0) -> int:
    """Bytes for so many slots of every layer, and so many spare ones."""
    layers = manifest.load(store).layers
    return slots * sum(layer.extent_bytes for layer in layers) + spares * layers[0].extent_bytes


def prompt(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.inference_mode()
def generate(model: transformers.PreTrainedModel, ids: torch.Tensor, new: int) -> list[list[int]]:
    """Greedy tokens, the prompts' included."""
    mask = torch.ones_like(ids)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return tokens.tolist()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str = "olmoe", dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = make_checkpoint(family, tmp_path_factory.mktemp(family), dtype)
        return made[family, dtype]

    return get


@pytest.fixture(scope="session")
def stores(checkpoints, tmp_path_factory):
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str = "olmoe", dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            store = tmp_path_factory.mktemp("store") / family
            pack(checkpoints(family, dtype), store)
            made[family, dtype] = store
        return made[family, dtype]

    return get


@pytest.fixture
def loaded(stores):
    """Load from a store at so many slots a layer; closed afterwards."""
    models = []

    def get(family="olmoe", slots=None, policy="lru", dtype=torch.float32):
        store = stores(family, dtype)
        slots = slots or manifest.load(store).top_k
        models.append(flashmoe.load(store, memory=budget(store, slots), policy=policy))
        return models[-1]

    yield get
    for model in models:
        model.flashmoe.close()


@pytest.fixture(scope="session")
def large_store(tmp_path_factory) -> Path:
    """192 MiB of experts: 4 layers x 32 of 1.5 MiB."""
    folder = tmp_path_factory.mktemp("larger")
    make_checkpoint(
        "olmoe", folder / "checkpoint", vocab_size=256, hidden_size=256, intermediate_size=512,
        num_hidden_layers=4, num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip
    pack(folder / "checkpoint", folder / "store")
    return folder / "store"


@pytest.fixture(params=["in groups", "in pieces"])
def reading(request, monkeypatch):
    """Small extents are read in groups; in pieces only large ones, or all for this test."""
    if request.param == "in pieces":
        monkeypatch.setattr(reader, "GROUPED_BELOW_BYTES", 1)
        monkeypatch.setattr(reader, "PIECE_BYTES", 4096)


@pytest.fixture
def own_store(checkpoints, tmp_path):
    """A store of the test's own, to be damaged."""
    store = tmp_path / "own"
    pack(checkpoints(), store)
    return store
