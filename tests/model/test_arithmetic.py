"""The sum of a layer's experts: as the family's own `eager` makes it, in any order of experts."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from transformers.integrations.moe import use_experts_implementation
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from flashmoe.engines.transformers.experts.mixture import Mixture, OrderedSum
from flashmoe.errors import FlashMoEError

CONFIG = transformers.OlmoeConfig(
    num_experts=4, num_experts_per_tok=3, hidden_size=32, intermediate_size=16
)
HALVES = [torch.bfloat16, torch.float16]


def experts_of(kind: type[torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    CONFIG._experts_implementation = "eager"
    torch.manual_seed(0)
    module = kind(CONFIG).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


def run(module: torch.nn.Module, *inputs: torch.Tensor, order=(0, 1, 2, 3)) -> torch.Tensor:
    mixture = Mixture(module, *inputs)
    for expert in order:
        if (inputs[1] == expert).any():
            mixture.add(expert, {name: p[expert] for name, p in module.named_parameters()})
    return mixture.total()


def inputs_of(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 32, generator=generator).to(dtype)
    index = torch.rand(tokens, 4, generator=generator).argsort(1)[:, :3]
    return hidden, index, torch.rand(tokens, 3, generator=generator).to(dtype)


class Adding32(OlmoeExperts):
    def forward(self, hidden, index, weights):
        eager = OlmoeExperts.forward.__wrapped__
        parts = [
            eager(self, hidden, torch.where(index == expert, expert, 4), weights).float()
            for expert in range(4)
        ]
        return torch.stack(parts).sum(0).to(hidden.dtype)


class Wide(OlmoeExperts):
    """All in float32, as openai_privacy_filter."""

    def forward(self, hidden, index, weights):
        total = torch.zeros_like(hidden, dtype=torch.float32)
        for expert in range(4):
            position, token = (index == expert).T.nonzero(as_tuple=True)
            states = hidden[token].float() @ self.gate_up_proj[expert].float().T
            gate, up = states.chunk(2, dim=-1)
            states = self.act_fn(gate) * up @ self.down_proj[expert].float().T
            total.index_add_(0, token, states * weights[token, position, None].float())
        return total.to(hidden.dtype)


class Doubled(OlmoeExperts):
    def forward(self, hidden, index, weights):
        return 2 * OlmoeExperts.forward.__wrapped__(self, hidden, index, weights)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_outputs_are_added_in_one_order_whatever_order_experts_come_in(tokens, dtype):
    module, inputs = experts_of(OlmoeExperts, dtype), inputs_of(tokens, dtype)
    expected = module(*inputs)
    for order in itertools.permutations(range(4)):
        assert torch.equal(run(module, *inputs, order=order), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_family_that_adds_in_float32_is_followed(dtype):
    module = experts_of(use_experts_implementation(Adding32), dtype)
    inputs = inputs_of(40, dtype)
    expected = module(*inputs)
    assert not torch.equal(expected, experts_of(OlmoeExperts, dtype)(*inputs))
    assert torch.equal(run(module, *inputs), expected)


def test_a_family_that_computes_in_float32_is_followed_also_if_met_under_autocast():
    module = experts_of(use_experts_implementation(Wide), torch.bfloat16)
    inputs = inputs_of(40, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        run(module, *inputs)
    assert torch.equal(run(module, *inputs), module(*inputs))


def test_a_family_whose_experts_compute_otherwise_is_refused():
    module = experts_of(use_experts_implementation(Doubled), torch.float32)
    with pytest.raises(FlashMoEError, match=r"Doubled .* does not follow"):
        run(module, *inputs_of(5, torch.float32))


def test_a_token_that_chooses_an_expert_twice_gets_it_twice():
    module = experts_of(OlmoeExperts, torch.float32)
    hidden, _, weights = inputs_of(1, torch.float32)
    index = torch.tensor([[2, 0, 2]])
    assert torch.equal(run(module, hidden, index, weights), module(hidden, index, weights))


def test_finding_the_precision_leaves_the_random_numbers_as_they_were():
    module, inputs = experts_of(OlmoeExperts, torch.bfloat16), inputs_of(3, torch.bfloat16)
    before = torch.get_rng_state()
    run(module, *inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_what_comes_before_its_turn_is_kept():
    total = OrderedSum(torch.zeros(3, 2), [1, 4, 6])
    everyone = torch.arange(3)
    for expert, kept in ((4, 1), (6, 2), (1, 0)):
        total.add(expert, everyone, torch.full((3, 2), float(expert)))
        assert len(total.early) == kept
    assert torch.equal(total.value, torch.full((3, 2), 11.0))
