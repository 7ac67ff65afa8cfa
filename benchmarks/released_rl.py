"""RL's stages done the released way (as published; written anew): the same model and maths.

Every prompt padded to 512, every rationale to --output_len; k separate passes of sampling without a key-value cache;
the prompt encoded again for each pass, sample and model; fp32; attention by plain products; log-probabilities from
log_softmax of all logits at once; numbers fetched from the device in every minibatch. The losses are those of
`rl.ppo`, with the same denominators as ours, so that both sides can be compared.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares.decoding import action_mask
from benchmarks.endings import end_at
from rl import ppo

INPUT = 512


def padded(prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of prompts, padded to INPUT."""
    wide = {name: F.pad(prompt[name], (0, INPUT - prompt[name].size(1))) for name in ("input_ids", "attention_mask")}
    return {**prompt, **wide}


def all_logprobs(logits: Tensor, actions: Tensor) -> Tensor:
    """(B, T) log-probabilities of actions (B, T + 1) from log_softmax of all logits (B, T, V)."""
    return logits.float().log_softmax(-1).gather(-1, actions[:, 1:, None]).squeeze(-1)


@torch.no_grad()
def score(model: nn.Module, prompt: dict[str, Tensor], actions: Tensor) -> Tensor:
    """Log-probabilities by a policy, values by a value function, (B, T); 0 in padding."""
    out = model(**padded(prompt), decoder_input_ids=actions[:, :-1])
    scores = out if isinstance(out, Tensor) else all_logprobs(out.logits, actions)
    return scores.float() * action_mask(actions)


@torch.no_grad()
def rollouts(
    models: Any, prompt: dict[str, Tensor], k: int, top_k: int, output_len: int, lengths: Tensor
) -> dict[str, Tensor]:
    """k passes over B prompts: text, then policy, reference and value function on it. lengths (B, k). Row order as
    ours: the k rows of a question side by side."""
    passes = []
    for action in range(k):
        actions = models.policy.generate(
            **padded(prompt), use_cache=False, do_sample=True, top_k=top_k, max_length=output_len,
            suppress_tokens=[0], logits_processor=[partial(end_at, lengths[:, action])],
        )  # fmt: skip
        actions = F.pad(actions, (0, output_len - actions.size(1)))
        three = {"logprobs": models.policy, "ref_logprobs": models.reference, "values": models.value_function}
        passes.append({"actions": actions} | {name: score(model, prompt, actions) for name, model in three.items()})
    return {name: torch.stack([one[name] for one in passes], 1).flatten(0, 1).cpu() for name in passes[0]}


def update(trainer: Any, optimizer: torch.optim.Optimizer, step: list, output_len: int, entropy: bool) -> dict:
    """One optimizer step over the minibatches of `step` (one process), as `PpoTrainer._update` makes it.

    Returns the losses, and with `entropy` that of the policy, for comparison: the released code computes none in PPO.
    """
    args, data, roll = trainer.args, trainer.data, trainer.data.rollouts
    policy, value_function, device = trainer.raw.policy, trainer.raw.value_function, trainer.accelerator.device
    rows = [row for minibatches in step for minibatch in minibatches for row in minibatch]
    total = int(roll.lengths[torch.as_tensor(rows)].sum())
    advantages, mask = roll.pad(data.advantages, rows)
    if args.adv_normalization:
        advantages = ppo.masked_whiten(advantages, mask)
    sums: Counter[str] = Counter()
    for (minibatch,) in step:
        T = output_len - 1
        flat = [roll.pad(one, minibatch)[0] for one in (roll.logprobs, data.returns)]
        wide = [F.pad(one, (0, T - one.size(1))).to(device) for one in flat]
        actions = roll.actions(minibatch)[0]
        actions = F.pad(actions, (0, output_len - actions.size(1))).to(device)
        adv = advantages[[rows.index(row) for row in minibatch]]
        adv = F.pad(adv, (0, T - adv.size(1))).to(device)
        mask = action_mask(actions)
        prompt = padded(trainer.prompts.batch([roll.qids[row] for row in minibatch]))

        logits = policy(**prompt, decoder_input_ids=actions[:, :-1], use_cache=False).logits
        logprobs = all_logprobs(logits, actions)
        values = value_function(**prompt, decoder_input_ids=actions[:, :-1])
        policy_loss = ppo.policy_loss(logprobs, wide[0], adv, mask, args.clip_range, denominator=total)
        value_loss = ppo.value_loss(values, wide[1], mask, total)
        (policy_loss + args.vf_coef * value_loss).backward()
        sums.update(policy_loss=policy_loss.item(), value_loss=value_loss.item())
        if entropy:
            entropies = torch.distributions.Categorical(logits=logits.detach().float()).entropy()
            sums.update(entropy=(entropies * mask).sum().item() / total)
    optimizer.step()
    optimizer.zero_grad()
    return sums
