"""The loss of T5's head without three tensors of (positions x vocabulary): 27% of an SFT step on a CPU.

    loss = label_loss(states, lm_head.weight, labels)     # sum over the rows of -log softmax(states @ weight.T)[label]

The logits become their own gradient in place, block by block while they are in the cache; pads never get here. Leaves
out entropies and the single log-probabilities, which RL needs (rl/ppo.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE, CHUNK = 2**18, 2**24  # logits in work at a time: what a core's cache holds on a CPU; 64 MB in fp32 on a GPU


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = states @ weight.T  # (N, V), of which nothing but probabilities is left below
        dtype = torch.promote_types(logits.dtype, torch.float32)
        losses = []
        size = max(1, (CACHE if logits.device.type == "cpu" else CHUNK) // logits.size(1))
        for block, label in zip(logits.split(size), labels[:, None].split(size), strict=True):
            x = block.to(dtype)
            top = x.amax(1, keepdim=True)
            chosen = x.gather(1, label)
            x.sub_(top).exp_()
            z = x.sum(1, keepdim=True)
            losses.append((z.log() + top - chosen).sum())
            x.div_(z).scatter_add_(1, label, x.new_full((len(x), 1), -1.0))  # d loss / d logits = softmax - onehot
            if x.data_ptr() != block.data_ptr():
                block.copy_(x)
        ctx.save_for_backward(logits, states, weight)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        slope, states, weight = ctx.saved_tensors
        grad = grad.to(states.dtype)
        grad_states = (slope @ weight).mul_(grad) if ctx.needs_input_grad[0] else None
        grad_weight = slope.T @ (states * grad) if ctx.needs_input_grad[1] else None
        return grad_states, grad_weight, None


def label_loss(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Decoder states (N, d), the head's weight (V, d), labels (N,) -> the summed negative log-likelihood, a scalar, in
    fp32 (fp64 stays fp64), with a gradient. Products run in the states' precision, or autocast's."""
    if len(states) == 0:
        return states.float().sum()
    return with_head(_LabelLoss, states, weight, labels)


def with_head(function: type[torch.autograd.Function], states: Tensor, weight: Tensor, labels: Tensor) -> Any:
    """`function` of them, its products in the states' precision, or autocast's, which it need not know of."""
    device = states.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return function.apply(states.to(low), weight.to(low), labels)
    return function.apply(states, weight, labels)
