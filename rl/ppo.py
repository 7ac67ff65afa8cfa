"""PPO with a reward per sentence, as pure tensor functions: no model, no file, no process group.

Conventions (B rationales, L columns of decoder ids, T = L - 1 positions):

    actions (B, L)    decoder ids, the start token (pad) in column 0, pads after `</s>`
    position t        the choice of actions[:, t + 1]; logprobs, values, rewards, advantages are (B, T) by position
    mask (B, T) bool  actions[:, 1:] != pad: True on a prefix of every row; nothing outside enters any result,
                      whatever it holds (nan included), so the padded width never matters

Every mean takes a `denominator`: None divides by this call's own real positions (one minibatch, as in the released
code's fixtures); a caller that accumulates minibatches or processes passes the positions of the whole optimizer step
and adds the results up. Left out: sampling, optimizer, models.

Sources: ARES arXiv 2407.00087, sec. 3.1; PPO arXiv 1707.06347, eq. 7 and 9; GAE arXiv 1506.02438, eq. 16;
KL penalty as a reward: Ziegler et al. arXiv 1909.08593, eq. 2; RLOO: Ahmadian et al. arXiv 2402.14740, sec. 3.3;
k3 estimator of KL: Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ares.head import with_head

CHUNK = 2**24  # logits in work at a time: 64 MB in fp32
CACHE = 2**18  # of these, as many as a core's cache holds: passes over them cost no memory traffic on a CPU
KEEP = 2**25  # slopes that are kept for the gradient instead of computed again: 128 MB in fp32


# -- masks and means -------------------------------------------------------------------------------------


def action_mask(actions: Tensor, pad: int = 0) -> Tensor:
    """(B, L) decoder ids -> (B, L - 1) bool: the positions whose choice is a real token, `</s>` included."""
    return actions[:, 1:] != pad


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    # Replaced, not multiplied by zero, and before anything is computed from it: an inf or nan at a pad would come
    # back as nan in the result or, by 0 * inf, in the gradient.
    return x.masked_fill(~mask.bool(), 0)


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Sum over the mask / `denominator` (None: the size of the mask; an empty one gives 0), a scalar."""
    return _keep(x, mask).sum() / (mask.sum().clamp(min=1) if denominator is None else denominator)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: sum, sum of squares and count over the mask. Add those of all minibatches and processes."""
    kept = _keep(x.detach().double(), mask)
    return torch.stack([kept.sum(), kept.square().sum(), mask.sum().double()])


def mean_and_var(total: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (divided by n) from added-up `moments`."""
    mean = total[0] / total[2].clamp(min=1)
    return mean, (total[1] / total[2].clamp(min=1) - mean.square()).clamp(min=0)


def whiten_with(x: Tensor, mean: Tensor | float, var: Tensor | float, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) in x's dtype, for a mean and variance taken over more than `x`."""
    var = torch.as_tensor(var, dtype=torch.float64, device=x.device)
    return ((x - mean) * torch.rsqrt(var + eps)).to(x.dtype)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0, variance 1 (biased) over the mask, and 0 outside it."""
    return _keep(whiten_with(x, *mean_and_var(moments(x, mask))), mask)


# -- log-probabilities -----------------------------------------------------------------------------------


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(states @ weight.T)[label] and its entropy, the logits made block by block and never all at once.

    For the gradient the slopes (probability - 1 at the label) are kept where they are few (KEEP), else the logits are
    computed once more. Not the probabilities: of a sure one half precision would keep 1.0, and no gradient.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(states.dtype, torch.float32)
        logprobs, entropy, log_z = (states.new_empty(len(states), dtype=dtype) for _ in range(3))
        keep = any(ctx.needs_input_grad[:2]) and len(states) * len(weight) <= KEEP
        ctx.kept = []
        for chunk in _chunks(len(states), len(weight), CHUNK):
            logits = states[chunk] @ weight.T  # (n, V)
            for block in _chunks(len(logits), len(weight), CACHE if logits.device.type == "cpu" else CHUNK):
                x, rows = logits[block].to(dtype), slice(chunk.start + block.start, chunk.start + block.stop)
                chosen = x.gather(1, labels[rows, None])
                top = x.amax(1, keepdim=True)
                e = x.sub_(top).exp()  # x is our own: a copy, or a part of logits that is not needed any more
                z = e.sum(1, keepdim=True)  # (rows, 1)
                log_z[rows] = (z.log() + top)[:, 0]
                logprobs[rows] = (chosen - top - z.log())[:, 0]
                entropy[rows] = (z.log() - (e * x).sum(1, keepdim=True) / z)[:, 0]
                if keep:
                    logits[block] = _slopes(e.div_(z), labels[rows])  # from here on they are slopes
            if keep:
                ctx.kept.append(logits)
        ctx.save_for_backward(states, weight, labels, log_z, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_entropy: Tensor | None):
        states, weight, labels, log_z, entropy = ctx.saved_tensors
        grad = torch.zeros_like(log_z) if grad is None else grad
        grad_states, grad_weight = torch.empty_like(states), None
        kept, ctx.kept = ctx.kept, []  # overwritten below: a second backward computes them anew
        for number, chunk in enumerate(_chunks(len(states), len(weight), CHUNK)):
            if kept:
                out = kept[number]
            else:
                out = torch.empty(len(states[chunk]), len(weight), dtype=states.dtype, device=states.device)
                torch.mm(states[chunk], weight.T, out=out)
            for block in _chunks(len(out), len(weight), CACHE if out.device.type == "cpu" else CHUNK):
                rows = slice(chunk.start + block.start, chunk.start + block.stop)
                g, x = grad[rows, None], out[block].to(log_z.dtype)
                if not kept:
                    x = _slopes(x.sub_(log_z[rows, None]).exp_(), labels[rows])
                if grad_entropy is None:
                    x = x.mul_(-g)  # d logp / d logits = onehot - p
                else:  # d entropy / d logits = -p (log p + entropy)
                    p = x.scatter_add(1, labels[rows, None], torch.ones_like(g))
                    log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
                    x = -g * x - grad_entropy[rows, None] * p * (log_p + entropy[rows, None])
                if x.data_ptr() != out[block].data_ptr():
                    out[block] = x
            torch.mm(out, weight, out=grad_states[chunk])
            if grad_weight is None:
                grad_weight = out.T @ states[chunk]
            else:
                grad_weight.addmm_(out.T, states[chunk])
        return grad_states, grad_weight, None


def _slopes(p: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (n, V) - 1 at the labels (n,), in place: d(-log p[label]) / d logits."""
    return p.scatter_add_(1, labels[:, None], p.new_full((len(p), 1), -1.0))


def _chunks(rows: int, columns: int, numbers: int) -> list[slice]:
    """Slices of `rows` rows that hold about `numbers` numbers each."""
    size = max(1, numbers // columns)
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def head_logprobs(states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Decoder states (N, d), the head's weight (V, d), labels (N,) -> log-probabilities of the labels and entropies of
    the full softmax in nats, (N,) each, in fp32 (fp64 stays fp64), both with gradients.

    Logits are products in the states' precision, or autocast's; the softmax is taken in fp32. Of the N x V logits at
    most KEEP numbers live on for the gradient, and no more than CHUNK besides.
    """
    return with_head(_HeadLogprobs, states, weight, labels)


# -- rewards ---------------------------------------------------------------------------------------------


def sentence_rewards(
    columns: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], length: int, neutral: float = 0.5
) -> Tensor:
    """(B, length) float32: `score_j - neutral` at position `column_j - 1`, 0 elsewhere (ARES sec. 3.1).

    `column_j` is the column in `actions` of sentence j's last token, so its reward belongs to the choice of that
    token. Raises ValueError when a row has more or fewer scores than sentences, or a column beyond `length`.
    """
    rewards = torch.zeros(len(columns), length)
    for row, (row_columns, row_scores) in enumerate(zip(columns, scores, strict=True)):
        for column, score in zip(row_columns, row_scores, strict=True):
            if not 1 <= column <= length:
                raise ValueError(f"row {row}: a sentence ends at column {column}, outside 1..{length}")
            rewards[row, column - 1] += score - neutral
    return rewards


def kl_rewards(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coef: float) -> Tensor:
    """(B, T): -coef * (log pi(a_t) - log pi_ref(a_t)) at every real position (arXiv 1909.08593, eq. 2), 0 elsewhere.

    The released code's mask for this term was shifted by one position.
    """
    return _keep(-coef * (logprobs - ref_logprobs), mask)


# -- advantages ------------------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns, both (B, T), 0 outside the mask (arXiv 1506.02438, eq. 11 and 16).

        delta_t = r_t + gamma V_{t+1} - V_t        V after a row's last real position is 0
        A_t     = delta_t + gamma lam A_{t+1}
        R_t     = A_t + V_t

    The released code runs over the padded width, so a short row sees rewards and values of its padding.
    """
    rewards, values = _keep(rewards, mask), _keep(values, mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """(B, T): sum of gamma^(s - t) r_s over s >= t within the mask, 0 outside it."""
    zeros = torch.zeros_like(rewards)
    return gae(rewards, zeros, mask, gamma, lam=1.0)[0]


def rloo_advantages(to_go: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE leave-one-out, by token: `to_go` minus its mean over the other samples of the same question.

    to_go (B, T) from `returns_to_go`; group (B,) one integer per question. The baseline of position t is the others'
    return-to-go at t, 0 where a sample is over: what is left to earn shrinks along a rationale, and a whole
    rationale's return as baseline (arXiv 2402.14740, where the whole is one action) would punish every late token.
    Independent of the row's own choices either way. A sample without a companion has advantage 0. 0 outside the mask.
    """
    to_go = _keep(to_go, mask)
    _, index = group.unique(return_inverse=True)
    sums = to_go.new_zeros(int(index.max()) + 1, to_go.size(1)).index_add_(0, index, to_go)[index]
    others = (torch.bincount(index)[index] - 1).unsqueeze(1)  # (B, 1)
    advantages = to_go - (sums - to_go) / others.clamp(min=1)
    return advantages.masked_fill(~mask.bool() | (others == 0), 0)


# -- losses ----------------------------------------------------------------------------------------------


def _surrogates(logprobs, old_logprobs, advantages, mask, clip_range) -> tuple[Tensor, Tensor]:
    ratio = _keep(logprobs - old_logprobs, mask).exp()
    advantages = _keep(advantages, mask)
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised: mean of max(-A r, -A clip(r, 1 - c, 1 + c))."""
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, mask, clip_range)
    return masked_mean(torch.max(plain, clipped), mask, denominator)


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    denominator: Tensor | float | None = None,
    *,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
) -> Tensor:
    """Mean of (V - R)^2: no factor 0.5. Unclipped, as released, unless `clip_range` is given with `old_values`:
    then the larger of (V - R)^2 and (clip(V, V_old - c, V_old + c) - R)^2."""
    error = _keep(values - returns, mask).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.max(error, _keep(near - returns, mask).square())
    return masked_mean(error, mask, denominator)


# -- diagnostics -----------------------------------------------------------------------------------------


@torch.no_grad()
def clipfrac(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Share of positions where the clipped term is the larger one, that is, where `policy_loss` has no gradient.

    It needs the advantages: a ratio beyond the range still learns when its advantage pulls it back. (The released
    trainer logged the value loss under this name.)
    """
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, mask, clip_range)
    return masked_mean((clipped > plain).to(plain.dtype), mask, denominator)


@torch.no_grad()
def approx_kl(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """KL(old || new) from samples of old by the k3 estimator: mean of (r - 1) - log r. Unbiased and never negative."""
    logratio = _keep(logprobs - old_logprobs, mask)
    return masked_mean(logratio.expm1() - logratio, mask, denominator)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the mask: 1 perfect, 0 no better than a constant, nan when R does not vary."""
    var = mean_and_var(moments(returns, mask))[1]
    unexplained = mean_and_var(moments(returns - values, mask))[1]
    return torch.where(var > 0, 1 - unexplained / var, torch.full_like(var, torch.nan))
