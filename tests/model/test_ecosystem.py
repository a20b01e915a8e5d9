"""What libraries do to a model: harmless and right, or refused with a sentence beforehand."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import warnings

import accelerate
import peft
import pytest
import safetensors.torch
import torch
import transformers
from tiny import make_checkpoint, prompt

import flashmoe
from baselines.in_memory import with_own_memory
from flashmoe.engines.transformers.model.packed_linear import PackedLinear
from flashmoe.errors import FlashMoEError


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(prompt(17)).logits


def plain(checkpoint) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, experts_implementation="eager"
    )
    return with_own_memory(model.eval())


@pytest.fixture(scope="module")
def expected(checkpoints) -> torch.Tensor:
    return logits(plain(checkpoints()))


def half_of(part):
    def cast(model):
        part(model).half()

    return cast


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to("cpu"), lambda m: m.to(m.device), lambda m: m.to(m.dtype), lambda m: m.cpu(),
        lambda m: m.float(), lambda m: m.eval(), lambda m: m.share_memory(),
        lambda m: m.to(memory_format=torch.channels_last), lambda m: m.model.to("cpu"),
        lambda m: m.requires_grad_(False), lambda m: m.set_experts_implementation("grouped_mm"),
        lambda m: m.tie_weights(), lambda m: m.num_parameters(), lambda m: m.state_dict(),
        lambda m: m.model.layers[0].mlp.experts.half(), lambda m: repr(m),
        lambda m: accelerate.Accelerator(cpu=True).prepare(m),
        lambda m: accelerate.dispatch_model(m, {"": "cpu"}),
        lambda m: torch.compile(m, backend="eager")(prompt(5)),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_let_through(loaded, expected, change):
    model = loaded(slots=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to("meta"),
        lambda m: m.to(torch.float16), lambda m: m.cuda(), lambda m: m.to("cuda"),
        half_of(lambda m: m.model), half_of(lambda m: m.model.layers[1]),
        half_of(lambda m: m.model.layers[1].mlp),
    ],
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="a move to a card may do something")
def test_other_moves_and_casts_are_refused_before_anything_changes(loaded, expected, change):
    model = loaded(slots=3)
    with pytest.raises(FlashMoEError, match="this model cannot go"):
        change(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: copy.deepcopy(m), lambda m: copy.deepcopy(m.model.layers[0]),
        lambda m: pickle.dumps(m), lambda m: torch.save(m, io.BytesIO()),
        lambda m: torch.save(m.state_dict(), io.BytesIO()),
        lambda m: safetensors.torch.save(m.state_dict()),
        lambda m: accelerate.cpu_offload(m),
        lambda m: {name: tensor.to("cpu") for name, tensor in m.state_dict().items()},
        lambda m: sum(p.norm() for p in m.parameters()),
        lambda m: setattr(m.model.layers[0].mlp.experts.down_proj, "data", torch.zeros(3)),
        lambda m: m.model.layers[0].mlp.experts.down_proj.data.add_(1),
        lambda m: torch.nn.utils.parametrizations.weight_norm(
            m.model.layers[0].mlp.experts, "down_proj"
        ),
    ],
)  # fmt: skip
def test_work_on_weights_that_are_not_there_is_refused(loaded, expected, use):
    model = loaded(slots=3)
    with pytest.raises(FlashMoEError, match="they stay on the SSD"):
        use(model)
    assert torch.equal(logits(model), expected)


def test_weights_put_in_the_experts_place_are_not_ignored(loaded):
    model = loaded(slots=3)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(torch.zeros(experts.down_proj.shape))
    with pytest.raises(FlashMoEError, match="were replaced or adapted"):
        logits(model)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("save", ["save_pretrained", "push_to_hub"])
def test_saving_is_refused_before_the_first_byte(tmp_path, over, save):
    source = make_checkpoint("olmoe", tmp_path / "olmoe")
    before = files(source)
    model = flashmoe.load(source, memory="1MiB", policy="lru")
    target = source if over else tmp_path / "new"
    with pytest.raises(FlashMoEError, match="is not saved"):
        getattr(model, save)(target)
    assert files(source) == before
    assert over or not target.exists()
    model.flashmoe.close()


def test_a_trainer_evaluates_as_with_transformers(checkpoints, loaded, tmp_path):
    ids = prompt(9, 4)
    examples = [{"input_ids": row, "labels": row} for row in ids]
    losses = []
    for model in (plain(checkpoints()), loaded(slots=3)):
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = transformers.Trainer(model=model, args=settings)
        losses.append(trainer.evaluate(examples)["eval_loss"])
    assert losses[0] == losses[1]


def test_a_pipeline_generates_as_with_transformers():
    path = flashmoe.demo_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = flashmoe.load(path, memory="8MiB", policy="lru")
    texts = [
        transformers.pipeline("text-generation", model=each, tokenizer=tokenizer)(
            "And it came", max_new_tokens=6, do_sample=False
        )
        for each in (plain(path), model)
    ]
    model.flashmoe.close()
    assert texts[0] == texts[1]


def test_a_plain_model_can_be_made_of_the_configuration(loaded):
    model = loaded(slots=3)
    logits(transformers.AutoModelForCausalLM.from_config(model.config))
    model.flashmoe.close()
    logits(transformers.AutoModelForCausalLM.from_config(model.config))


def test_autocast_computes_as_in_transformers(checkpoints, loaded):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(loaded(slots=3)), logits(plain(checkpoints())))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_code_generates_the_same_tokens(checkpoints, loaded, whole):
    ids = prompt(12)
    ask = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    wanted = plain(checkpoints()).generate(ids, **ask)
    model = loaded(slots=3)
    torch._dynamo.reset()
    if whole:
        assert torch.equal(logits(torch.compile(model, backend="eager")), logits(model))
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, **ask), wanted)
    torch._dynamo.reset()


def test_packed_layers_compile_too(tmp_path):
    folder = make_checkpoint(
        "olmoe", tmp_path / "olmoe", torch.bfloat16, hidden_size=768, num_attention_heads=6,
        num_key_value_heads=6,
    )  # fmt: skip
    model = flashmoe.load(folder, memory="16MiB", policy="lru")
    wanted = logits(model)
    torch._dynamo.reset()
    assert torch.equal(logits(torch.compile(model, backend="eager")), wanted)
    torch._dynamo.reset()
    other = plain(folder)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(logits(model), logits(other))
    model.flashmoe.close()


def adapter(checkpoint, folder, **settings):
    """An adapter that matters, and what the model gives with it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(plain(checkpoint), peft.LoraConfig(r=4, lora_alpha=16, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return logits(model)


ON_ATTENTION = dict(target_modules=["q_proj", "v_proj"])
ON_EXPERTS = dict(target_modules=[], target_parameters=["mlp.experts.down_proj"])


def put_around(model, folder):
    return peft.PeftModel.from_pretrained(model, folder)


def put_in(model, folder):
    model.load_adapter(str(folder))
    return model


def merge(model, folder):
    return put_around(model, folder).merge_and_unload()


@pytest.mark.parametrize("use", [put_around, put_in, merge])
def test_an_adapter_on_attention_counts(checkpoints, loaded, tmp_path, use):
    wanted = adapter(checkpoints(), tmp_path, **ON_ATTENTION)
    model = use(loaded(slots=3), tmp_path)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("use", [put_around, put_in, merge])
def test_an_adapter_on_experts_is_refused(checkpoints, loaded, tmp_path, use):
    adapter(checkpoints(), tmp_path, **ON_EXPERTS)
    with pytest.raises(FlashMoEError):
        logits(use(loaded(slots=3), tmp_path))


def test_an_adapter_is_saved(checkpoints, loaded, tmp_path):
    wanted = adapter(checkpoints(), tmp_path / "made", **ON_ATTENTION)
    put_around(loaded(slots=3), tmp_path / "made").save_pretrained(tmp_path / "saved")
    again = put_around(plain(checkpoints()), tmp_path / "saved")
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-5)


def test_every_weight_has_its_name_and_size(tmp_path, packing):
    folder = make_checkpoint(
        "olmoe", tmp_path / "olmoe", torch.bfloat16, hidden_size=768, num_attention_heads=6,
        num_key_value_heads=6,
    )  # fmt: skip
    model, wanted = flashmoe.load(folder, memory="16MiB", policy="lru"), plain(folder)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert model.num_parameters() == wanted.num_parameters()
    own, theirs = model.state_dict(), wanted.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in own.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    assert all(torch.equal(own[n], t) for n, t in theirs.items() if ".experts." not in n)
    model.flashmoe.close()


def test_no_new_process_gets_half_a_model(loaded):
    model = loaded(slots=3)
    process = multiprocessing.get_context("spawn").Process(target=logits, args=(model,))
    with pytest.raises(FlashMoEError, match="pickling needs all experts"):
        process.start()
