"""Expert products for training on a CPU, as one autograd step registered with transformers.

Tokens are sorted by expert into equal padded groups, so that every product is one bf16 `bmm`
of a shape that recurs: oneDNN compiles a kernel for each shape, so that products of ever-changing
shapes are the slowest way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "flashmoe_training"
GROUP_MULTIPLE = 128  # padded group length; a coarser one wastes products, a finer one recompiles


@torch.compile(dynamic=True)
def _swiglu(gate_up_out: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_out.chunk(2, -1)
    return F.silu(gate) * up * w


@torch.compile(dynamic=True)
def _swiglu_backward(
    grad_weighted: torch.Tensor, gate_up_out: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_up_out.chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_w = (grad_weighted * silu * up).sum(-1)
    grad_inner = grad_weighted * w
    grad_gate = grad_inner * up * (sigmoid + silu - silu * sigmoid)
    return torch.cat((grad_gate, grad_inner * silu), -1), grad_w


class _SwiGLUExperts(torch.autograd.Function):
    """Sum over top_k of weight * down(silu(gate(x)) * up(x)); T tokens, E experts, width D."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        (tokens, top_k), (experts, width) = index.shape, (gate_up.shape[0], hidden.shape[1])
        flat = index.reshape(-1)
        order = torch.argsort(flat)
        count = torch.bincount(flat, minlength=experts)
        group = -(-int(count.max()) // GROUP_MULTIPLE) * GROUP_MULTIPLE
        sorted_expert = flat[order]
        rank = torch.arange(flat.numel()) - (count.cumsum(0) - count)[sorted_expert]
        row = torch.empty_like(order)
        row[order] = sorted_expert * group + rank  # padded row of each (token, choice)
        source = torch.zeros(experts * group, dtype=torch.long)
        source[row[order]] = order // top_k  # padding reads token 0 at weight 0
        x = hidden.index_select(0, source).view(experts, group, width)
        gate_up_out = torch.bmm(x, gate_up.transpose(1, 2))
        w = hidden.new_zeros(experts * group, 1)
        w[row] = weight.reshape(-1, 1)
        w = w.view(experts, group, 1)
        weighted = _swiglu(gate_up_out, w)
        out = torch.bmm(weighted, down.transpose(1, 2)).view(-1, width)
        ctx.save_for_backward(x, gate_up_out, weighted, w, gate_up, down, source, row)
        return out.index_select(0, row).view(tokens, top_k, width).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, gate_up_out, weighted, w, gate_up, down, source, row = ctx.saved_tensors
        experts, group, width = x.shape
        tokens = grads[0].shape[0]
        grad = grads[0].to(x.dtype).index_select(0, source).view(experts, group, width)
        grad_weighted = torch.bmm(grad, down)
        grad_down = torch.bmm(grad.transpose(1, 2), weighted)
        grad_gate_up_out, grad_w = _swiglu_backward(grad_weighted, gate_up_out, w)
        grad_gate_up = torch.bmm(grad_gate_up_out.transpose(1, 2), x)
        grad_x = torch.bmm(grad_gate_up_out, gate_up).view(-1, width)
        grad_hidden = grad_x.index_select(0, row).view(tokens, -1, width).sum(1)
        return grad_hidden, grad_gate_up, grad_down, None, grad_w.view(-1)[row].view(tokens, -1)


def _forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    bf16 = torch.bfloat16
    result: torch.Tensor = _SwiGLUExperts.apply(
        hidden_states.to(bf16),
        self.gate_up_proj.to(bf16),
        self.down_proj.to(bf16),
        top_k_index,
        top_k_weights.to(bf16),
    )
    return result


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
