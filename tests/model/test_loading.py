"""What is loaded is what `from_pretrained` would load, or a sentence says why not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint, prompt

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.checkpoints.weight_files import INDEX_NAME
from flashmoe.engines.transformers.model.streamed_parameter import StreamedParameter
from flashmoe.errors import FlashMoEError
from harness import tiny_models
from harness.tables import families
from harness.torture import mutants


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for shard in sorted(folder.glob("*.safetensors")) for n, t in load_file(shard).items()
    }


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """All weights in one file, in place of what was there."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_checkpoint("olmoe", tmp_path / "olmoe")


@pytest.fixture(params=["in place", "packed"])
def load(request, tmp_path):
    """Load a checkpoint as it lies, or packed; closed afterwards."""
    models = []

    def get(folder: Path) -> transformers.PreTrainedModel:
        if request.param == "packed":
            pack(folder, tmp_path / "store")
            folder = tmp_path / "store"
        models.append(flashmoe.load(folder, memory="1MiB", policy="lru"))
        return models[-1]

    yield get
    for model in models:
        model.flashmoe.close()


@torch.inference_mode()
def output(model: transformers.PreTrainedModel) -> torch.Tensor:
    return tiny_models.output(model(prompt(13)))


def plain(folder: Path, model_class=transformers.AutoModelForCausalLM) -> torch.Tensor:
    model = model_class.from_pretrained(folder, experts_implementation="eager")
    return output(with_own_memory(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", tiny_models.families())
def test_all_but_the_experts_is_as_from_pretrained_has_it(family, dtype, tmp_path):
    """Image and audio parts, ties, buffers in no checkpoint, dtypes: every tensor."""
    if family in families.EXPLAINED:
        pytest.skip("is refused")
    made = tiny_models.make(family).to(dtype)
    made.config.dtype = dtype
    made.save_pretrained(tmp_path / "checkpoint")
    pack(tmp_path / "checkpoint", tmp_path / "store")
    wanted = type(made).from_pretrained(tmp_path / "checkpoint", experts_implementation="eager")
    model = flashmoe.load(tmp_path / "store", memory="4MiB", policy="lru")
    assert type(model) is type(wanted)
    for kind in ("named_parameters", "named_buffers"):
        own = dict(getattr(model, kind)(remove_duplicate=False))
        theirs = dict(getattr(wanted, kind)(remove_duplicate=False))
        assert own.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (own[name].dtype, own[name].shape) == (tensor.dtype, tensor.shape), name
            if not isinstance(own[name], StreamedParameter):
                assert torch.equal(own[name], tensor), name
    model.flashmoe.close()


def test_mutated_checkpoints_give_transformers_output_or_a_sentence():
    """A short form of `python -m harness mutations`."""
    rows = mutants.examine(60, seed=1, say=pytest.fail)
    assert sum(row["equal"] for row in rows) > 5
    assert sum(row["refused"] for row in rows) > 5


def test_a_single_file_goes_before_a_stale_index(folder, load):
    shards = list(folder.glob("*.safetensors"))
    tensors = {name: tensor * 1.5 for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(shards) > 1
    assert (folder / INDEX_NAME).exists()
    assert torch.equal(output(load(folder)), plain(folder))


@pytest.mark.parametrize("missing", [[], ["lm_head.weight"], ["model.embed_tokens.weight"]])
def test_weights_are_tied_as_transformers_ties_them(folder, load, missing):
    configure(folder, tie_word_embeddings=True)
    rewrite(folder, {n: t for n, t in tensors_of(folder).items() if n not in missing})
    assert torch.equal(output(load(folder)), plain(folder))


def test_nothing_to_tie_to_is_refused(folder, load):
    configure(folder, tie_word_embeddings=True)
    gone = ("lm_head.weight", "model.embed_tokens.weight")
    rewrite(folder, {n: t for n, t in tensors_of(folder).items() if n not in gone})
    with pytest.raises(FlashMoEError, match="lacks the tensor"):
        load(folder)


@pytest.mark.parametrize(
    ("architecture", "where"),
    [("OlmoeModel", "model.norm.weight"), ("MixtralForSequenceClassification", "score.weight")],
)
def test_the_class_is_the_one_that_the_configuration_names(tmp_path, load, architecture, where):
    family = "olmoe" if "Olmoe" in architecture else "mixtral"
    model_class = getattr(transformers, architecture)
    config = tiny_models.make(family).config
    torch.manual_seed(3)
    model_class(config).save_pretrained(tmp_path / "made")
    model = load(tmp_path / "made")
    assert type(model) is model_class
    assert torch.equal(output(model), plain(tmp_path / "made", model_class))


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


def test_a_configuration_may_say_that_nothing_is_quantised(folder, load):
    configure(folder, quantization_config=None)
    assert torch.equal(output(load(folder)), plain(folder))


def test_the_dtype_is_that_of_the_weights_where_the_configuration_names_none(tmp_path, load):
    folder = make_checkpoint("olmoe", tmp_path / "olmoe", torch.bfloat16)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "dtype"})
    )
    model = load(folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(output(model), plain(folder))


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


def test_experts_of_several_dtypes_are_cast_by_packing_alone(folder, tmp_path):
    tensors = {
        name: tensor.half() if ".experts.3." in name else tensor
        for name, tensor in tensors_of(folder).items()
    }
    rewrite(folder, tensors)
    with pytest.raises(FlashMoEError, match="converted when it is loaded"):
        flashmoe.load(folder, memory="1MiB", policy="lru")
    pack(folder, tmp_path / "store")
    model = flashmoe.load(tmp_path / "store", memory="1MiB", policy="lru")
    assert torch.equal(output(model), plain(folder))
    model.flashmoe.close()


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


def test_a_missing_router_bias_is_said(tmp_path, load, caplog):
    tiny_models.make("deepseek_v3").save_pretrained(tmp_path / "made")
    tensors = tensors_of(tmp_path / "made")
    rewrite(tmp_path / "made", {n: t for n, t in tensors.items() if "correction_bias" not in n})
    with caplog.at_level(logging.WARNING, "flashmoe"):
        model = load(tmp_path / "made")
    assert "lacks the buffer model.layers.1.mlp.gate.e_score_correction_bias" in caplog.text
    assert torch.equal(output(model), plain(tmp_path / "made"))


def test_another_programs_manifest_makes_no_store(folder):
    (folder / "manifest.json").write_text('{"name": "a web page"}')
    model = flashmoe.load(folder, memory="1MiB", policy="lru")
    assert torch.equal(output(model), plain(folder))
    model.flashmoe.close()


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


def test_a_store_of_before_takes_its_dtype_from_the_configuration(folder, tmp_path):
    pack(folder, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    document = json.loads(path.read_text())
    assert document.pop("dtype") == "float32"
    path.write_text(json.dumps(document))
    model = flashmoe.load(tmp_path / "store", memory="1MiB", policy="lru")
    assert torch.equal(output(model), plain(folder))
    model.flashmoe.close()
    shutil.rmtree(tmp_path / "store")
