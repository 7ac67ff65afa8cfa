"""T5's layers with fewer kernels and fewer tensors kept for the gradient; weights and their names are the library's.

    fuse(model)      # in place: a layer of the library's becomes a subclass of itself

Numbers are those of the library's layers up to the order of a sum, and dropout draws the same (tests/test_speed.py).
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import T5ForConditionalGeneration
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

# transformers 5.18 or so renamed the argument
CACHE = "cache" if "cache" in inspect.signature(T5ForConditionalGeneration.forward).parameters else "past_key_values"


def fuse(model: nn.Module) -> None:
    """Make the T5 layers in `model` those of this file, in place."""
    for module in model.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            # T5's "gelu_new" by one kernel instead of the library's eight, same formula, same config.json: saves
            # 16% of a forward and backward pass on a CPU, and seven tensors of d_ff per layer that autograd kept
            module.act = nn.GELU(approximate="tanh")


def unfuse(model: nn.Module) -> None:
    """Make the layers of this file the library's again, in place; not the activation."""
    for module in model.modules():
        if type(module) in FUSED.values():
            module.__class__ = type(module).__base__


def has_kernels(x: Tensor) -> bool:
    """Whether PyTorch has a kernel where `x` is for what is a composite of several on a CPU (`F.rms_norm`)."""
    return x.device.type != "cpu"


# -- norm ------------------------------------------------------------------------------------------------


class FusedNorm(T5LayerNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight, eps = self.weight, self.variance_epsilon
        if x.dtype != weight.dtype or not (has_kernels(x) or x.dtype in (torch.float32, torch.float64)):
            return super().forward(x)  # variance in fp32, then in the weight's precision
        if has_kernels(x):
            return F.rms_norm(x, weight.shape, weight, eps)
        return _RmsNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _rms_norm(x, weight, eps)[0]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised x (..., d) and the factor of each position, (..., 1)."""
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
    factor = mean.add_(eps).rsqrt_()
    return (x * factor).mul_(weight), factor


class _RmsNorm(torch.autograd.Function):
    """Keeps x and a number per position. The gradient is layer norm's with a mean of 0, for which a CPU has a kernel,
    without the term that the mean adds: dx = f (g w - x f mean(g w x f)) for the factor f and the output's g."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, factor = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, weight, factor = ctx.saved_tensors
        g, wanted = g.contiguous(), [*ctx.needs_input_grad[:2], False]
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            g, x.contiguous(), list(weight.shape), torch.zeros_like(factor), factor, weight, None, wanted
        )
        if dx is not None:
            dx.add_((g @ weight).unsqueeze(-1).mul_(factor).div_(x.size(-1)))
        return dx, dw, None


# -- attention -------------------------------------------------------------------------------------------


class FusedAttention(T5Attention):
    """Adds mask and position bias once per stack and pass, not in every layer.

    The library passes the first layer's position bias on to the other layers; here it holds the mask, too, and the
    cross-attention's, which has no bias, is the mask alone.
    """

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs):
        """As the library's: states (B, L, d) -> states (B, L, d), what is added to the scores, weights (None if
        fused)."""
        if kwargs.get(CACHE) is not None:  # the library's generate
            return super().forward(hidden_states, mask, key_value_states, position_bias, **kwargs)
        if position_bias is None:
            position_bias = self._biased_mask(hidden_states, mask, key_value_states)
        others = hidden_states if key_value_states is None else key_value_states
        query, key, value = (
            linear(x).unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)  # (B, H, L or S, D)
            for linear, x in ((self.q, hidden_states), (self.k, others), (self.v, others))
        )
        rate, weights = self.dropout if self.training else 0.0, None
        if self.config._attn_implementation == "sdpa":
            out = F.scaled_dot_product_attention(query, key, value, position_bias, rate, scale=1.0)
        else:
            weights = (query @ key.transpose(2, 3) + position_bias).softmax(-1)
            weights = F.dropout(weights, rate, rate > 0)  # (B, H, L, S)
            out = weights @ value
        return self.o(out.transpose(1, 2).flatten(2)), position_bias, weights

    def _biased_mask(self, x: Tensor, mask: Tensor | None, others: Tensor | None) -> Tensor:
        """What is added to the scores of queries from x (B, L, d): broadcasts to (B, H, L, S)."""
        L, S = x.size(1), (x if others is None else others).size(1)
        sdpa, device = self.config._attn_implementation == "sdpa", x.device.type
        # under autocast fused attention would cast it in every layer
        low = sdpa and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else x.dtype
        if mask is None and others is None and self.is_decoder:  # the library leaves it to fused attention
            mask = torch.ones(L, S, dtype=torch.bool, device=x.device).tril_()
        bias = self.compute_bias(L, S, device=x.device) if self.has_relative_attention_bias else None
        if bias is None and (mask is None or mask.dtype != torch.bool):
            return x.new_zeros(1, 1, 1, S, dtype=dtype) if mask is None else mask.to(dtype)
        if mask is not None and mask.dtype == torch.bool:
            bias = torch.where(mask, x.new_zeros((), dtype=dtype) if bias is None else bias, torch.finfo(dtype).min)
        elif mask is not None:
            bias = bias + mask
        return bias.to(dtype).contiguous()  # fused attention does not accept the bias's own strides


FUSED = {T5LayerNorm: FusedNorm, T5Attention: FusedAttention}
