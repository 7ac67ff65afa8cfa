"""Log-probabilities of T5's head without three tensors of (positions x vocabulary): 27% of an SFT step on a CPU.

    logprobs, entropy = head_logprobs(states, lm_head.weight, labels)      # RL: rl/actor_critic.py
    loss = label_loss(states, lm_head.weight, labels)                      # SFT: model.py

Logits are made in chunks, and within a chunk the soft-max runs over blocks of rows while they are in the cache.
Callers pass real positions only, so padding costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # logits that exist at a time: 64 MB in fp32
CACHE = 2**18  # logits per block on a CPU: they fit into a core's cache, so repeated passes cost no memory traffic
KEEP = 2**25  # slopes that are kept for the gradient instead of being computed again: 128 MB in fp32


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(states @ weight.T)[label], and the entropy of the soft-max (0 unless asked for).

    For the gradient, the slopes d(-logprob) / d logits = softmax - onehot are kept in the logits' memory if they are
    at most `keep` numbers; otherwise the logits are computed again. Slopes are kept instead of probabilities because
    a probability near 1 rounds to 1.0 in half precision, which would lose the gradient.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, labels: Tensor, with_entropy: bool, keep: float):
        N, V = len(states), len(weight)
        dtype = torch.promote_types(states.dtype, torch.float32)
        logprobs, log_z = states.new_empty(N, dtype=dtype), states.new_empty(N, dtype=dtype)
        entropy = states.new_zeros(N, dtype=dtype)
        keeps = any(ctx.needs_input_grad[:2]) and N * V <= keep
        ctx.kept = None
        for chunk in _slices(N, V, N * V if keeps else CHUNK):
            logits = states[chunk] @ weight.T  # (n, V)
            for block in _slices(len(logits), V, CACHE if logits.device.type == "cpu" else CHUNK):
                rows = slice(chunk.start + block.start, chunk.start + block.stop)
                x = logits[block].to(dtype)  # a view of logits in fp32, a copy in half precision
                chosen = x.gather(1, labels[rows, None])
                top = x.amax(1, keepdim=True)
                e = x.sub_(top).exp_() if not with_entropy else x.sub_(top).exp()
                z = e.sum(1, keepdim=True)  # (rows, 1)
                log_z[rows] = (z.log() + top)[:, 0]
                logprobs[rows] = (chosen - top - z.log())[:, 0]
                if with_entropy:
                    entropy[rows] = (z.log() - (e * x).sum(1, keepdim=True) / z)[:, 0]
                if keeps:
                    slopes = _slopes(e.div_(z), labels[rows])
                    if slopes.data_ptr() != logits[block].data_ptr():
                        logits[block] = slopes
            ctx.kept = logits if keeps else None
        ctx.save_for_backward(states, weight, labels, log_z, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_entropy: Tensor | None):
        states, weight, labels, log_z, entropy = ctx.saved_tensors
        grad = torch.zeros_like(log_z) if grad is None else grad
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_weight = None
        # without a gradient of the entropy, each row's slopes are only scaled: the d columns of the states are scaled
        # instead of the V columns of the logits
        scale = -grad.to(states.dtype)[:, None] if grad_entropy is None else None  # (N, 1)
        kept = ctx.kept
        if scale is None:
            ctx.kept = None  # overwritten below; a second backward computes them again
        N, V = len(states), len(weight)
        for chunk in _slices(N, V, CHUNK if kept is None else N * V):
            out = states[chunk] @ weight.T if kept is None else kept  # (n, V)
            done = kept is not None and scale is not None
            for block in [] if done else _slices(len(out), V, CACHE if out.device.type == "cpu" else CHUNK):
                rows = slice(chunk.start + block.start, chunk.start + block.stop)
                x = out[block].to(log_z.dtype)
                if kept is None:
                    x = _slopes(x.sub_(log_z[rows, None]).exp_(), labels[rows])
                if scale is None:  # d entropy / d logits = -p (log p + entropy)
                    p = x.scatter_add(1, labels[rows, None], torch.ones_like(log_z[rows, None]))
                    log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
                    x = -grad[rows, None] * x - grad_entropy[rows, None] * p * (log_p + entropy[rows, None])
                if x.data_ptr() != out[block].data_ptr():
                    out[block] = x
            if grad_states is not None:
                torch.mm(out, weight, out=grad_states[chunk])
            if ctx.needs_input_grad[1]:
                scaled = states[chunk] if scale is None else states[chunk] * scale[chunk]
                if grad_weight is None:
                    grad_weight = out.T @ scaled  # (V, d)
                else:
                    grad_weight.addmm_(out.T, scaled)
        if grad_states is not None and scale is not None:
            grad_states.mul_(scale)
        return grad_states, grad_weight, None, None, None


def _slopes(p: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (n, V) - 1 at the labels (n,), in place: d(-log p[label]) / d logits."""
    return p.scatter_add_(1, labels[:, None], p.new_full((len(p), 1), -1.0))


def _slices(rows: int, columns: int, numbers: int) -> list[slice]:
    """Slices of `rows` rows that hold about `numbers` numbers each."""
    size = max(1, numbers // columns)
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def head_logprobs(
    states: Tensor, weight: Tensor, labels: Tensor, *, with_entropy: bool = True, keep: float | None = None
) -> tuple[Tensor, Tensor]:
    """Decoder states (N, d), the head's weight (V, d), labels (N,) -> log-probabilities of the labels and entropies of
    the full soft-max in nats (zeros unless `with_entropy`), (N,) each, in fp32 (fp64 stays fp64), with gradients.

    Logits are products in the states' precision, or autocast's; the soft-max is taken in fp32. Of the N x V logits at
    most `keep` numbers (default KEEP) are kept for the gradient, and CHUNK exist besides.
    """
    keep = KEEP if keep is None else keep
    device = states.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _HeadLogprobs.apply(states.to(low), weight.to(low), labels, with_entropy, keep)
    return _HeadLogprobs.apply(states, weight, labels, with_entropy, keep)


def label_loss(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Decoder states (N, d), the head's weight (V, d), labels (N,) -> the summed negative log-likelihood, a scalar.

    SFT keeps all slopes: its batches are chosen so that they fit, and computing logits twice would cost a third more.
    """
    return -head_logprobs(states, weight, labels, with_entropy=False, keep=float("inf"))[0].sum()
