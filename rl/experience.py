"""What RL trains on: a round's scored rollouts with their rewards and advantages, and the plan of its updates.

Advantages are GAE's with a value function (`--algo ppo`) or leave-one-out without one (`--algo rloo`); the rewards are
the same. Pure functions of rollouts and scores: no model, no process group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ares import files
from ares.sentences import sentences_from_ids
from rl import ppo
from rl.rollouts import Rollouts


@dataclass
class Experience:
    """Scored rollouts with everything RL needs that does not change while it trains.

    advantages, returns: float32, flat like the fields of `rollouts`; kl_coef: the coefficient in their rewards;
    the rest: (N,), one number per rationale.
    """

    rollouts: Rollouts
    advantages: Tensor
    returns: Tensor
    sentence_reward: Tensor
    kl: Tensor
    score_sum: Tensor
    ended: Tensor
    kl_coef: float

    def __len__(self) -> int:
        return len(self.rollouts)

    def row_stats(self, rows: Sequence[int]) -> dict[str, float]:
        """Means over rationales (and over their sentences, for the score)."""
        index = torch.as_tensor(rows)
        sentences = int(self.rollouts.sentence_counts[index].sum())
        return {
            "mean_sentence_score": float(self.score_sum[index].sum()) / sentences if sentences else math.nan,
            "sentences": sentences,
            "reward": float((self.sentence_reward[index] - self.kl_coef * self.kl[index]).mean()),
            "sentence_reward": float(self.sentence_reward[index].mean()),
            "length": float(self.rollouts.lengths[index].float().mean()),
            "share_ended": float(self.ended[index].float().mean()),
        }


def experience(
    rollouts: Rollouts,
    scores: Sequence[Sequence[float]],
    args: Any,
    kl_coef: float | None = None,
    chunk: int = 1024,
    eos: int = 1,
) -> Experience:
    """Rewards, advantages and returns of every row (SPEC 6), from the scores of its sentences.

    The reward of position t is `-kl_coef (logp - logp_ref)`, plus `score - neutral_score` where a sentence ends at
    column t + 1; the value after the last position is 0. `kl_coef` None is `args.init_kl_coef`. With `--algo rloo`
    the advantage is the return-to-go minus its mean over the other rows of the question.
    """
    kl_coef = args.init_kl_coef if kl_coef is None else kl_coef
    advantages, returns = torch.empty_like(rollouts.values), torch.empty_like(rollouts.values)
    sentence_reward, kl = torch.zeros(len(rollouts)), torch.zeros(len(rollouts))
    for rows in _chunks(rollouts.qids, chunk):
        logprobs, mask = rollouts.pad(rollouts.logprobs, rows)  # (B, T)
        ref_logprobs, values = rollouts.pad(rollouts.ref_logprobs, rows)[0], rollouts.pad(rollouts.values, rows)[0]
        by_sentence, rewards = token_rewards(rollouts, scores, rows, args.neutral_score, kl_coef)
        if args.algo == "rloo":
            places = {qid: i for i, qid in enumerate(dict.fromkeys(rollouts.qids[row] for row in rows))}
            group = torch.tensor([places[rollouts.qids[row]] for row in rows])
            ret = ppo.returns_to_go(rewards, mask, args.gamma)
            adv = ppo.rloo_advantages(ret, group, mask)
        else:
            adv, ret = ppo.gae(rewards, values, mask, args.gamma, args.gae_lambda)
        first = int(rollouts.offsets[rows[0]])
        last = int(rollouts.offsets[rows[-1]] + rollouts.lengths[rows[-1]])
        advantages[first:last], returns[first:last] = adv[mask], ret[mask]
        sentence_reward[rows] = by_sentence.sum(1)
        kl[rows] = ((logprobs - ref_logprobs) * mask).sum(1).float()
    final = rollouts.tokens[(rollouts.offsets + rollouts.lengths - 1).clamp(min=0)] if len(rollouts.tokens) else None
    return Experience(
        rollouts,
        advantages,
        returns,
        sentence_reward,
        kl,
        score_sum=torch.tensor([float(sum(row)) for row in scores]),
        ended=final == eos,
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
    by_sentence = ppo.sentence_rewards(
        [rollouts.row_columns(row) for row in rows],
        [list(scores[row]) for row in rows],
        length=mask.shape[1],
        neutral=neutral,
    )
    return by_sentence, by_sentence + ppo.kl_rewards(logprobs, ref_logprobs, mask, kl_coef)


def _chunks(qids: Sequence[str], size: int) -> list[list[int]]:
    """Rows in runs of about `size` that never part the rows of one question (they lie side by side)."""
    chunks: list[list[int]] = [[]]
    for row, qid in enumerate(qids):
        if len(chunks[-1]) >= size and qid != qids[row - 1]:
            chunks.append([])
        chunks[-1].append(row)
    return [chunk for chunk in chunks if chunk]


def plan_epoch(
    lengths: Sequence[tuple[int, int]], per_process: int, processes: int, accumulation: int, seed: int
) -> list:
    """Which rows each update of one PPO epoch trains on: `plan[update][i][process]` is the i-th minibatch there.

    Rows are shuffled from the seed and cut into optimizer steps of `per_process * processes * accumulation` rows, the
    last one short; inside a step rows of like `lengths` (of rationale and prompt) come together (less padding, the
    same gradient), in minibatches of `per_process`. In the short step a minibatch may be empty, but every process has
    equally many.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    size = per_process * processes * accumulation
    plan = []
    for begin in range(0, len(order), size):
        minibatches = _bucket(order[begin : begin + size], lengths, per_process)
        minibatches += [[] for _ in range(-len(minibatches) % processes)]
        plan.append([minibatches[i : i + processes] for i in range(0, len(minibatches), processes)])
    return plan


def passes(step: list, lengths: Sequence[tuple[int, int]], tokens: int) -> list:
    """An update of `plan_epoch` with its minibatches joined where they are small: `passes[i][process]` are the rows of
    the i-th forward and backward pass, of at most `tokens` tokens of prompt and rationale with their padding.

    A minibatch alone may exceed that. The gradient is the same sum; each pass less saves its launches and a round of
    adding gradients up. Every process has equally many passes, as sharding needs it.
    """

    def padded(rows: Sequence[int]) -> int:
        return len(rows) * sum(max(lengths[row][i] for row in rows) for i in (0, 1)) if rows else 0

    joined: list = []
    for group in step:
        both = [[*before, *rows] for before, rows in zip(joined[-1], group, strict=True)] if joined else []
        if both and max(map(padded, both)) <= tokens:
            joined[-1] = both
        else:
            joined.append(group)
    return joined


def _bucket(rows: Sequence[int], lengths: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """Rows in minibatches with little padding: by falling rationale, or in strips of that order by falling prompt,
    whichever way costs least. Stable sorts: the order of `rows` breaks ties."""
    rows = sorted(rows, key=lambda row: -lengths[row][0])
    found = []
    width = size  # of a strip
    while True:
        strips = [rows[i : i + width] for i in range(0, len(rows), width)]
        if width > size:
            strips = [sorted(strip, key=lambda row: -lengths[row][1]) for strip in strips]
        flat = [row for strip in strips for row in strip]
        minibatches = [flat[i : i + size] for i in range(0, len(flat), size)]
        # decoders and head read a token of the rationale for half as much again as the encoders one of the prompt
        cost = sum(
            len(one) * (3 * max(lengths[row][0] for row in one) + 2 * max(lengths[row][1] for row in one))
            for one in minibatches
        )
        found.append((cost, width, minibatches))
        if width >= len(rows):
            return min(found)[2]
        width *= 2


def write_samples(path: Path, data: Experience, scores: Sequence[Sequence[float]], texts: dict, tokenizer) -> None:
    """Write what was trained on as one JSON line per rationale, atomically: a file to read and to grep.

    A sentence's advantage is that of its last token, before whitening. `texts` are the prompts by question id.
    """
    rows = data.rollouts
    with files.atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, qid in enumerate(rows.qids):
            ids, begin = rows.ids(row), int(rows.offsets[row])
            sentences = [
                {"text": one.text, "score": score, "advantage": float(data.advantages[begin + one.column - 1])}
                for one, score in zip(sentences_from_ids(ids, tokenizer), scores[row], strict=True)
            ]
            line = {
                "qid": qid,
                "action": rows.action[row],
                "prompt": texts[qid],
                "rationale": tokenizer.decode(ids, skip_special_tokens=True),
                "reward": float(data.sentence_reward[row] - data.kl_coef * data.kl[row]),
                "sentences": sentences,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
