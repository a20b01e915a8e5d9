"""A checkpoint that cannot be loaded as transformers loads it is refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import configure, rewrite, tensors_of

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.checkpoints.weight_files import INDEX_NAME
from flashmoe.errors import FlashMoEError
from harness import tiny_models


def test_nothing_to_tie_to_is_refused(folder, load):
    configure(folder, tie_word_embeddings=True)
    gone = ("lm_head.weight", "model.embed_tokens.weight")
    rewrite(folder, {n: t for n, t in tensors_of(folder).items() if n not in gone})
    with pytest.raises(FlashMoEError, match="lacks the tensor"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["OlmoeForSomething"]}, "'OlmoeForSomething', which transformers"),
        ({"architectures": ["LlamaForCausalLM"]}, "takes a 'llama' configuration"),
        ({"dtype": "int8"}, "its dtype cannot be used"),
        ({"dtype": "many"}, "cannot be used|is not a configuration"),
        ({"num_attention_heads": 5}, "makes no OlmoeForCausalLM|do not match|is not a config"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\), but they are"),
        ({"quantization_config": {}}, "remove that entry"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, load, changes, complaint):
    configure(folder, **changes)
    with pytest.raises(FlashMoEError, match=complaint):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_quantised_weights_are_seen_whatever_the_configuration_says(folder, load, dtype):
    tensors = tensors_of(folder)
    rewrite(folder, {n: t.to(dtype) if ".experts." in n else t for n, t in tensors.items()})
    with pytest.raises(FlashMoEError, match="already quantised") as refused:
        load(folder)
    assert "pack" not in str(refused.value)


def test_a_scale_beside_a_weight_makes_it_quantised(folder, load):
    tensors = tensors_of(folder)
    name = next(n for n in tensors if ".experts.0." in n)
    rewrite(folder, tensors | {name.replace(".weight", ".weight_scale_inv"): torch.ones(1, 1)})
    with pytest.raises(FlashMoEError, match="already quantised"):
        load(folder)


def without_an_expert(tensors):
    return {n: t for n, t in tensors.items() if ".layers.1.mlp.experts.5." not in n}


def without_a_part(tensors):
    return {n: t for n, t in tensors.items() if ".layers.1.mlp.experts.5.up_proj" not in n}


def turned(tensors):
    return {n: t.T if ".experts.5.down_proj" in n else t for n, t in tensors.items()}


@pytest.mark.parametrize("damage", [without_an_expert, without_a_part, turned])
def test_experts_that_do_not_fit_are_refused_without_bad_advice(folder, load, damage):
    rewrite(folder, damage(tensors_of(folder)))
    with pytest.raises(FlashMoEError, match=r"experts are missing|do not match") as refused:
        load(folder)
    assert "flashmoe pack" not in str(refused.value)


def test_a_layout_is_judged_by_more_than_one_experts_values(tmp_path):
    """Its first expert is all zeros, which look the same turned round."""
    tiny_models.make("qwen3_vl_moe").save_pretrained(tmp_path)
    tensors = {
        name: tensor.transpose(1, 2) if ".experts." in name else tensor
        for name, tensor in tensors_of(tmp_path).items()
    }
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor[0] = 0
    rewrite(tmp_path, tensors)
    with pytest.raises(FlashMoEError, match="converted when it is loaded"):
        flashmoe.load(tmp_path, memory="1GiB")


def test_a_file_in_place_of_a_directory_is_named(folder, tmp_path):
    with pytest.raises(FlashMoEError, match=r"holds no config\.json"):
        pack(folder / "config.json", tmp_path / "store")


def pickles_only(folder):
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_index(folder):
    (folder / INDEX_NAME).unlink()


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def nothing(folder):
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (pickles_only, "pytorch_model.bin, of which FlashMoE reads nothing"),
        (no_index, "neither model.safetensors nor model.safetensors.index.json"),
        (adapter, "holds an adapter"),
        (nothing, "no weights to load: fetch model.safetensors"),
    ],
)
def test_directories_without_weights_say_what_is_there(folder, load, damage, complaint):
    damage(folder)
    with pytest.raises(FlashMoEError, match=complaint):
        load(folder)


def test_a_dtype_that_torch_has_not_is_named(folder, load):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"F4" ', 1))
    with pytest.raises(FlashMoEError, match="has the dtype F4, which"):
        load(folder)
