"""What policy and value function say of given rationales: log-probabilities, entropies and values, each prompt encoded
once whatever the number of its rationales.

Shared by sampling (rl/sampling.py) and training (rl/trainer.py). The logits of all positions never exist at once
(`rl.ppo.head_logprobs`), those of padding never at all. Left out: which rationales, and what is made of the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl import ppo

GROUP_COST = 64  # tokens: what one more pass costs besides its tokens (its operations, its gradients of all weights)


def encode(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    """Encoder states (U, S, d) of a batch of prompts, after fusion.

    On a CPU prompts of unlike lengths are encoded in several groups, with less padding; states of padding, which
    nobody reads, are then 0. On a GPU one pass of more tokens is the faster one.
    """
    mask = prompt["attention_mask"]
    groups = length_groups(mask.sum(1).tolist()) if mask.device.type == "cpu" else [[]]
    if len(groups) == 1:
        return model.encode(**prompt | {"attention_mask": for_attention(mask, model)}).last_hidden_state
    parts, order = [], [row for rows in groups for row in rows]
    for rows in groups:
        S = int(mask[rows[0]].sum())
        some = {name: tensor[rows] for name, tensor in prompt.items()}
        some |= {name: some[name][:, :S] for name in ("input_ids", "attention_mask")}
        states = model.encode(**some).last_hidden_state
        parts.append(F.pad(states, (0, 0, 0, mask.size(1) - S)))
    return torch.cat(parts)[torch.argsort(torch.tensor(order))]


def for_attention(mask: Tensor, model: nn.Module, on_gpu: bool | None = None) -> Tensor:
    """A mask (B, S) as `model` takes it: under SDPA on a GPU (B, 1, 1, S). The library would make it so itself, but
    first look whether anything is masked at all, and wait for the GPU with that in every pass."""
    on_gpu = mask.device.type == "cuda" if on_gpu is None else on_gpu
    sdpa = model.config._attn_implementation == "sdpa"  # plain attention would add it to the scores
    return mask[:, None, None].bool() if on_gpu and sdpa else mask


def length_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Rows by falling length, cut into the groups that cost least: each its rows times its longest, and GROUP_COST."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best = [(0, 0)]  # of the first i rows: the least cost, and where their last group begins
    for i in range(1, len(order) + 1):
        best.append(min((best[j][0] + (i - j) * lengths[order[j]] + GROUP_COST, j) for j in range(i)))
    groups, end = [], len(order)
    while end:
        groups.append(order[best[end][1] : end])
        end = best[end][1]
    return groups[::-1]


def halve(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Keep the weights of linear layers in `dtype`, as autocast would make them anew at every call of a frozen model:
    the same numbers for half the memory. Embeddings and norms, which autocast leaves alone, stay."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    return model


def decode(
    model: nn.Module, states: Tensor, attention_mask: Tensor, question: Tensor | None, actions: Tensor
) -> Tensor:
    """Decoder states (B, T, d) of actions (B, T + 1), from encoder states (U, S, d) and mask (U, S) of the prompts.

    `question` (B,) says whose prompt a row has; None: row i's is i. In groups of like length on a CPU, as `encode`.
    """
    T = actions.size(1) - 1
    lengths = ppo.action_mask(actions).sum(1).clamp(min=1)
    groups = length_groups(lengths.tolist()) if actions.device.type == "cpu" else [[]]
    parts = []
    for rows in groups:
        ids, which, S = actions[:, :-1], question, None
        if len(groups) > 1:
            ids = actions[rows, : int(lengths[rows[0]])]
            which = torch.tensor(rows) if question is None else question[rows]
            S = int(attention_mask[which].sum(1).max())
        some, mask = (states, attention_mask) if which is None else (states[which], attention_mask[which])
        # no decoder mask: pads are on the right, and a causal decoder never looks there from a real position
        decoded = model.decoder(
            input_ids=ids,
            encoder_hidden_states=some[:, :S],
            encoder_attention_mask=for_attention(mask[:, :S], model),
            use_cache=False,
        ).last_hidden_state
        parts.append(F.pad(decoded, (0, 0, 0, T - decoded.size(1))))
    if len(groups) == 1:
        return parts[0]
    return torch.cat(parts)[torch.argsort(torch.tensor([row for rows in groups for row in rows]))]


def policy_logprobs(
    policy: nn.Module,
    states: Tensor,
    attention_mask: Tensor,
    question: Tensor | None,
    actions: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the actions under the full softmax, and entropies in nats: (B, T) each, fp32, 0 elsewhere.

    actions (B, T + 1); places (N,) are the positions wanted, counted through the flattened (B, T).
    """
    decoded = decode(policy, states, attention_mask, question, actions)  # (B, T, d)
    wanted = decoded.flatten(0, 1).index_select(0, places) * policy.config.head_scale  # (N, d)
    labels = actions[:, 1:].flatten().index_select(0, places)
    return tuple(
        one.new_zeros(actions[:, 1:].numel()).index_copy(0, places, one).view(actions[:, 1:].shape)
        for one in ppo.head_logprobs(wanted, policy.lm_head.weight, labels)
    )


def values(
    value_function: nn.Module, states: Tensor, attention_mask: Tensor, question: Tensor | None, actions: Tensor
) -> Tensor:
    """Values (B, T) of every position; in padding anything."""
    return value_function.v_head(decode(value_function, states, attention_mask, question, actions)).squeeze(-1)


def places_of(mask: Tensor, device: Any = None) -> Tensor:
    """(B, T) mask on the CPU -> the places of its real positions in the flattened (B, T), on `device`."""
    return to_device(mask.flatten().nonzero()[:, 0], device)


def to_device(tensor: Tensor, device: Any) -> Tensor:
    """Without waiting for the copy where there is a GPU. An expanded view (`VisionFeatures.gather`), which torch
    cannot pin, travels as the part that it repeats and is expanded there."""
    if torch.device(device or "cpu").type != "cuda":
        return tensor.to(device)
    part = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return part.pin_memory().to(device, non_blocking=True).expand(tensor.shape)
