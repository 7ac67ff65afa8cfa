"""PPO with a reward per sentence, in reading order from the Teacher's scores to the loss; no model, no file.

Conventions (B rationales, L columns of decoder ids, T = L - 1 positions):

    actions (B, L)    decoder ids, the start token (pad) in column 0, pads after `</s>`
    position t        the choice of actions[:, t + 1]; logprobs, values, rewards, advantages are (B, T) by position
    mask (B, T) bool  actions[:, 1:] != pad: True on a prefix of every row; values outside it (even nan) never enter
                      any result, so the padded width does not matter

Every mean takes a `denominator`: None divides by this call's own real positions (one minibatch, as in the released
code's fixtures); a caller that accumulates minibatches or processes passes the positions of the whole optimizer step
and adds the results.

Sources: ARES arXiv 2407.00087, sec. 3.1; PPO arXiv 1707.06347, eq. 7 and 9; GAE arXiv 1506.02438, eq. 16;
KL penalty as a reward: Ziegler et al. arXiv 1909.08593, eq. 2; RLOO: Ahmadian et al. arXiv 2402.14740, sec. 3.3;
k3 estimator of KL: Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl.rollouts import Rollouts

EOS = 1
CHUNK_ROWS = 1024  # rationales whose advantages are computed at a time


# -- masked statistics -----------------------------------------------------------------------------------


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    # Replaced, not multiplied by zero, and before anything is computed from it: an inf or nan at a pad would give nan
    # in the result or, by 0 * inf, in the gradient.
    return x.masked_fill(~mask.bool(), 0)


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Sum over the mask / `denominator` (None: the size of the mask; an empty one gives 0), a scalar."""
    return _keep(x, mask).sum() / (mask.sum().clamp(min=1) if denominator is None else denominator)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: sum, sum of squares and count over the mask. Those of minibatches and processes add up."""
    kept = _keep(x.detach().double(), mask)
    return torch.stack([kept.sum(), kept.square().sum(), mask.sum().double()])


def masked_whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the mask, with the biased variance (divided by n); 0 outside the mask."""
    total, squares, n = moments(x, mask)
    mean = total / n.clamp(min=1)
    variance = (squares / n.clamp(min=1) - mean.square()).clamp(min=0)
    return _keep(((x - mean) * torch.rsqrt(variance + eps)).to(x.dtype), mask)


# -- 1. rewards ------------------------------------------------------------------------------------------


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


# -- 2. advantages and returns ---------------------------------------------------------------------------


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


def rloo_advantages(to_go: Tensor, group: Tensor, mask: Tensor, sentence: Tensor | None = None) -> Tensor:
    """REINFORCE leave-one-out, by token: `to_go` minus its mean over the other samples of the same question.

    to_go (B, T) from `returns_to_go`; group (B,) one integer per question. The baseline of position t is the others'
    return-to-go at t, 0 where a sample has ended. (arXiv 2402.14740 treats the whole rationale as one action; its
    whole return as baseline would punish every late token, because the return-to-go shrinks along a rationale.)
    With `sentence` (B, T) from `sentence_numbers` it is their return-to-go at the first token of the sentence of the
    same number, 0 where a sample has fewer sentences. The only sample of a question has advantage 0. 0 outside the
    mask.
    """
    to_go = _keep(to_go, mask)
    _, index = group.unique(return_inverse=True)
    at_step = to_go  # (B, steps): the return-to-go at each token or at the beginning of each sentence
    if sentence is not None:
        begins = torch.ones_like(mask.bool())
        begins[:, 1:] = sentence[:, 1:] != sentence[:, :-1]
        first = begins & mask.bool()
        at_step = to_go.new_zeros(to_go.size(0), int(sentence.max()) + 1)
        at_step[first.nonzero()[:, 0], sentence[first]] = to_go[first]
    sums = at_step.new_zeros(int(index.max()) + 1, at_step.size(1)).index_add_(0, index, at_step)[index]
    others = (torch.bincount(index)[index] - 1).unsqueeze(1)  # (B, 1)
    baseline = (sums - at_step) / others.clamp(min=1)
    if sentence is not None:
        baseline = baseline.gather(1, sentence)
    return (to_go - baseline).masked_fill(~mask.bool() | (others == 0), 0)


def sentence_numbers(columns: Sequence[Sequence[int]], length: int) -> Tensor:
    """(B, length) int64: the number of the sentence that each position belongs to, from the sentences' last columns.

    Positions after the last sentence's end (its `</s>`) belong to a sentence of their own.
    """
    ends = torch.zeros(len(columns), length + 1, dtype=torch.int64)
    for row, row_columns in enumerate(columns):
        ends[row, list(row_columns)] = 1  # the position after a sentence's last token, `column - 1`
    return ends.cumsum(1)[:, :length]


@dataclass
class ScoredRollouts:
    """Scored rollouts with rewards, advantages and returns: all that one round trains on.

    advantages, returns: float32, flat like the fields of `rollouts`; to_go: likewise, the Monte-Carlo returns
    (`returns` follow GAE's lambda); kl_coef: the coefficient in their rewards; scores: per sentence, row by row;
    the rest: (N,), one number per rationale.
    """

    rollouts: Rollouts
    advantages: Tensor
    returns: Tensor
    to_go: Tensor
    sentence_reward: Tensor
    kl: Tensor
    scores: Sequence[Sequence[float]]
    ended: Tensor
    kl_coef: float

    def __len__(self) -> int:
        return len(self.rollouts)

    def with_values(self, values: Tensor, args: Any) -> ScoredRollouts:
        """The same rollouts with other `values`, and advantages and returns computed from them."""
        return compute_advantages(replace(self.rollouts, values=values), self.scores, args, self.kl_coef)

    def explained_variance(self) -> float:
        """1 - Var(R - V) / Var(R) of the rollouts' values against the Monte-Carlo returns, over all positions."""
        returns, values = self.to_go.double(), self.rollouts.values.double()
        variance = returns.var(correction=0)
        return float(1 - (returns - values).var(correction=0) / variance) if variance > 1e-12 else math.nan

    def row_stats(self, rows: Sequence[int]) -> dict[str, float]:
        """Means over rationales (over their sentences for the score)."""
        index = torch.as_tensor(rows)
        sentences = int(self.rollouts.sentence_counts[index].sum())
        return {
            "mean_sentence_score": sum(sum(self.scores[row]) for row in rows) / sentences if sentences else math.nan,
            "sentences": sentences,
            "reward": float((self.sentence_reward[index] - self.kl_coef * self.kl[index]).mean()),
            "sentence_reward": float(self.sentence_reward[index].mean()),
            "length": float(self.rollouts.lengths[index].float().mean()),
            "share_ended": float(self.ended[index].float().mean()),
        }


def compute_advantages(
    rollouts: Rollouts, scores: Sequence[Sequence[float]], args: Any, kl_coef: float
) -> ScoredRollouts:
    """Rewards, advantages and returns of every row, from the scores of its sentences.

    The reward of position t is `-kl_coef (logp - logp_ref)`, plus `score - neutral_score` where a sentence ends at
    column t + 1; the value after the last position is 0. `--algo ppo` uses GAE; with `--algo rloo` the advantage is
    the return-to-go minus its mean over the other rows of the question.
    """
    advantages, returns, to_go = (torch.empty_like(rollouts.values) for _ in range(3))
    sentence_reward = torch.zeros(len(rollouts))
    for rows in _chunks(rollouts.qids, CHUNK_ROWS):
        by_sentence, rewards = token_rewards(rollouts, scores, rows, args.neutral_score, kl_coef)  # (B, T) each
        values, mask = rollouts.pad(rollouts.values, rows)
        monte_carlo = ret = returns_to_go(rewards, mask, args.gamma)
        if args.algo == "rloo":
            number = {qid: i for i, qid in enumerate(dict.fromkeys(rollouts.qids[row] for row in rows))}
            group = torch.tensor([number[rollouts.qids[row]] for row in rows])
            sentence = None
            if args.rloo_baseline == "sentence":
                sentence = sentence_numbers([rollouts.row_columns(row) for row in rows], mask.size(1))
            adv = rloo_advantages(ret, group, mask, sentence)
        else:
            adv, ret = gae(rewards, values, mask, args.gamma, args.gae_lambda)
        first = int(rollouts.offsets[rows[0]])
        last = int(rollouts.offsets[rows[-1]] + rollouts.lengths[rows[-1]])
        advantages[first:last], returns[first:last], to_go[first:last] = adv[mask], ret[mask], monte_carlo[mask]
        sentence_reward[rows] = by_sentence.sum(1)
    return ScoredRollouts(
        rollouts,
        advantages,
        returns,
        to_go,
        sentence_reward,
        kl=kl_per_rationale(rollouts),
        scores=scores,
        ended=rollouts.tokens[rollouts.offsets + rollouts.lengths - 1] == EOS,
        kl_coef=kl_coef,
    )


def token_rewards(
    rollouts: Rollouts, scores: Sequence[Sequence[float]], rows: Sequence[int], neutral: float, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """(B, T) sentence rewards of `rows`, and the same with the KL penalty: the reward of each position.

    `scores` are indexed by row, like `rollouts`.
    """
    logprobs, mask = rollouts.pad(rollouts.logprobs, rows)
    ref_logprobs, _ = rollouts.pad(rollouts.ref_logprobs, rows)
    columns = [rollouts.row_columns(row) for row in rows]
    by_sentence = sentence_rewards(columns, [scores[row] for row in rows], mask.shape[1], neutral)
    return by_sentence, by_sentence + kl_rewards(logprobs, ref_logprobs, mask, kl_coef)


def kl_per_rationale(rollouts: Rollouts) -> Tensor:
    """(N,) float32: sum over a rationale's positions of log pi - log pi_ref, in nats."""
    kl = torch.zeros(len(rollouts))
    for rows in _chunks(rollouts.qids, CHUNK_ROWS):
        difference, _ = rollouts.pad(rollouts.logprobs - rollouts.ref_logprobs, rows)
        kl[rows] = difference.sum(1).float()
    return kl


def _chunks(qids: Sequence[str], size: int) -> list[list[int]]:
    """Rows in chunks of about `size` that keep the rows of one question (which are neighbours) together."""
    chunks: list[list[int]] = [[]]
    for row, qid in enumerate(qids):
        if len(chunks[-1]) >= size and qid != qids[row - 1]:
            chunks.append([])
        chunks[-1].append(row)
    return [chunk for chunk in chunks if chunk]


# -- 3. losses -------------------------------------------------------------------------------------------


def _surrogates(logprobs, old_logprobs, advantages, mask, clip_range) -> tuple[Tensor, Tensor]:
    """The two terms of PPO's maximum, (B, T) each: unclipped and clipped."""
    logratio = _keep(logprobs - old_logprobs, mask)
    ratio = logratio.exp()
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float,
    denominator: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """Clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised: mean of max(-A r, -A clip(r, 1 - c, 1 + c))."""
    unclipped, clipped = _surrogates(logprobs, old_logprobs, advantages, mask, clip_range)
    return masked_mean(torch.max(unclipped, clipped), mask, denominator)


def value_loss(
    values: Tensor, returns: Tensor, mask: Tensor, denominator: Tensor | float | None = None, *,
    old_values: Tensor | None = None, clip_range: float | None = None,
) -> Tensor:  # fmt: skip
    """Mean of (V - R)^2: no factor 0.5. Unclipped, as released, unless `clip_range` is given with `old_values`:
    then the larger of (V - R)^2 and (clip(V, V_old - c, V_old + c) - R)^2."""
    error = _keep(values - returns, mask).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.max(error, _keep(near - returns, mask).square())
    return masked_mean(error, mask, denominator)


# -- 4. diagnostics --------------------------------------------------------------------------------------


@torch.no_grad()
def clipfrac(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float,
    denominator: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """Share of positions where the clipped term is the larger one, that is, where `policy_loss` has no gradient.

    It needs the advantages: a ratio beyond the range still learns if its advantage pulls it back. (The released
    trainer logged the value loss under this name.)
    """
    unclipped, clipped = _surrogates(logprobs, old_logprobs, advantages, mask, clip_range)
    return masked_mean((clipped > unclipped).to(unclipped.dtype), mask, denominator)


@torch.no_grad()
def approx_kl(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """KL(old || new) from samples of old by the k3 estimator: mean of (r - 1) - log r. Unbiased and never negative."""
    logratio = _keep(logprobs - old_logprobs, mask)
    return masked_mean(logratio.expm1() - logratio, mask, denominator)


# Sums over real positions that an update adds up over its passes and processes, in this order
SUMS = ("policy_loss", "value_loss", "approx_kl", "kl_ref", "entropy", "clipfrac", "ret", "ret2", "err", "err2", "n")


def diagnostics(sums: Sequence[float], args: Any) -> dict[str, float]:
    """Means per position from sums in the order of SUMS; those of a value function only where there is one.

    explained_variance is 1 - Var(R - V) / Var(R): 1 perfect, 0 no better than a constant, nan if R does not vary.
    """
    total = dict(zip(SUMS, sums, strict=True))
    n = total["n"]
    out = {key: total[key] / n for key in SUMS[:6]}
    out["positions"] = n
    out["loss"] = out["policy_loss"] - args.entropy_coef * out["entropy"]
    if args.algo == "rloo":
        del out["value_loss"]
        return out
    out["loss"] += args.vf_coef * out["value_loss"]
    variance = total["ret2"] / n - (total["ret"] / n) ** 2
    unexplained = total["err2"] / n - (total["err"] / n) ** 2
    out["explained_variance"] = 1 - unexplained / variance if variance > 1e-12 else math.nan
    return out


# -- 5. the loss of a pass -------------------------------------------------------------------------------


class MiniBatch(NamedTuple):
    """What one pass trains on besides the actions, (B, T) each; advantages are already whitened over the step."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    returns: Tensor
    advantages: Tensor


def ppo_loss(
    logprobs: Tensor, entropy: Tensor, values: Tensor | None, mb: MiniBatch, mask: Tensor, args: Any, total: int
) -> tuple[Tensor, Tensor]:
    """The loss of one pass: sums over its real positions divided by `total`, the positions of the whole step.

    logprobs, entropy, values (None with `--algo rloo`) are the models' (B, T). Also returns the diagnostics of the
    pass, (len(SUMS),) float64.
    """
    entropy = masked_mean(entropy if args.entropy_coef else entropy.detach(), mask, denominator=1)
    pg_loss = policy_loss(logprobs, mb.old_logprobs, mb.advantages, mask, args.clip_range, denominator=total)
    loss = pg_loss - args.entropy_coef * entropy / total
    v_loss = torch.zeros_like(pg_loss)
    if values is not None:
        v_loss = value_loss(values, mb.returns, mask, total, old_values=mb.old_values, clip_range=args.vf_clip_range)
        loss = loss + args.vf_coef * v_loss
    with torch.no_grad():
        spread = moments(mb.returns, mask)
        error = moments(mb.returns - values, mask) if values is not None else spread
        # KL(policy || reference) by the k3 estimator, which is never negative; the ratio corrects for samples that
        # come from the older policy
        to_ref = mb.ref_logprobs - logprobs
        kl_ref = (logprobs - mb.old_logprobs).exp() * (to_ref.expm1() - to_ref)
        sums = [
            pg_loss * total,
            v_loss * total,
            approx_kl(logprobs, mb.old_logprobs, mask, denominator=1),
            masked_mean(kl_ref, mask, denominator=1),
            entropy,
            clipfrac(logprobs, mb.old_logprobs, mb.advantages, mask, args.clip_range, denominator=1),
            *spread[:2],
            *error[:2],
            mask.sum(),
        ]
        return loss, torch.stack([one.double() for one in sums])


def warmup_loss(values: Tensor, to_go: Tensor, mask: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The loss of one pass of the value function alone, against Monte-Carlo returns (B, T), and its sums as
    `ppo_loss` gives them: 0 for what needs a policy."""
    loss = value_loss(values, to_go, mask, total)
    with torch.no_grad():
        zero = torch.zeros_like(loss)
        spread, error = moments(to_go, mask)[:2], moments(to_go - values, mask)[:2]
        sums = [zero, loss * total, *[zero] * 4, *spread, *error, mask.sum()]
        return loss, torch.stack([one.double() for one in sums])
