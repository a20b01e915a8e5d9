"""What is loaded is what `from_pretrained` would load."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
import transformers
from checkpoint_files import configure, output, plain, rewrite, tensors_of
from safetensors.torch import save_file
from tiny import make_checkpoint

import flashmoe
from flashmoe.engines.transformers.checkpoints.pack import pack
from flashmoe.engines.transformers.checkpoints.weight_files import INDEX_NAME
from flashmoe.engines.transformers.model.streamed_parameter import StreamedParameter
from flashmoe.errors import FlashMoEError
from harness import tiny_models
from harness.tables import families
from harness.torture import mutants


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
