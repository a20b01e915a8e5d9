"""Gradients through streamed experts are transformers' own, or refused with a sentence."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from tiny import FAMILIES, make_checkpoint, prompt

import flashmoe
from flashmoe.engines.transformers.model.packed_linear import PackedLinear
from flashmoe.errors import FlashMoEError


def plain(checkpoint) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, experts_implementation="eager"
    ).eval()


def gradients(model) -> dict[str, torch.Tensor]:
    """Of the loss by the inputs' embeddings, and by every weight that is no expert's."""
    ids = prompt(33)
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=ids).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if ".experts." not in n}
    return {"loss": loss.detach(), "inputs": embedded.grad} | {
        name: gradient for name, gradient in found.items() if gradient is not None
    }


def check(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], most: float) -> None:
    assert given.keys() == wanted.keys()
    assert torch.equal(given["loss"], wanted["loss"])
    for name, gradient in wanted.items():
        assert (given[name] - gradient).norm() <= most * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [None, 5])
def test_they_are_transformers_own_with_fewer_slots_than_experts(
    checkpoints, loaded, family, slots
):
    check(gradients(loaded(family, slots)), gradients(plain(checkpoints(family))), 1e-5)


def test_they_are_transformers_own_in_place(checkpoints):
    model = flashmoe.load(checkpoints(), memory="100KB", policy="lru")
    check(gradients(model), gradients(plain(checkpoints())), 1e-5)
    model.flashmoe.close()


def test_they_pass_through_packed_layers(tmp_path, packing):
    folder = make_checkpoint(
        "olmoe", tmp_path / "olmoe", torch.bfloat16, hidden_size=768, num_attention_heads=6,
        num_key_value_heads=6,
    )  # fmt: skip
    model = flashmoe.load(folder, memory="16MiB", policy="lru")
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    check(gradients(model), gradients(plain(folder)), 0.02)
    model.flashmoe.close()


def test_they_are_those_of_autocast(checkpoints, loaded):
    found = []
    for model in (plain(checkpoints()), loaded(slots=2)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(prompt(21), labels=prompt(21)).loss
        loss.backward()  # outside, as torch recommends
        found.append((loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
    (wanted_loss, wanted), (loss, gradient) = found
    assert torch.equal(loss, wanted_loss)
    assert (gradient - wanted).norm() <= 0.01 * wanted.norm()


def test_recomputing_activations_gives_them_too(checkpoints, loaded):
    wanted = gradients(plain(checkpoints()))
    model = loaded(slots=2).train()
    model.activation_checkpointing_enable()
    check(gradients(model), wanted, 1e-5)


def test_an_adapter_on_attention_learns_as_with_transformers(checkpoints, loaded):
    ids, found = prompt(21, 2), []
    for model in (plain(checkpoints()), loaded(slots=2)):
        torch.manual_seed(5)
        learner = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        optimiser = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=1.0)
        losses = []
        for _ in range(4):
            optimiser.zero_grad()
            loss = learner(input_ids=ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][-1] < found[0][0]


def test_experts_are_not_trained_without_a_word(loaded):
    model = loaded(slots=3)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".experts." in n)
    model.requires_grad_(True)
    with pytest.raises(FlashMoEError, match="cannot be trained"):
        model(prompt(5), labels=prompt(5))
    with torch.no_grad():
        model(prompt(5))
