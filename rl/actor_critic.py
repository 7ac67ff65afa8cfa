"""Policy and value function on given rationales: log-probabilities, entropies and values.

Shared by sampling (rl/sampling.py) and training (rl/trainer.py). Each prompt is encoded once, whatever the number of
its rationales. Logits of all positions never exist at once (ares/head.py), those of padding not at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares.decoding import action_mask
from ares.devices import expanded_mask, on_gpu
from ares.head import head_logprobs
from rl.minibatches import length_groups


class ActorCritic(nn.Module):
    """Policy and value function as one module, so that a wrapper (DDP, FSDP) sees one forward per pass."""

    def __init__(self, policy: nn.Module, value_function: nn.Module | None):
        super().__init__()
        self.policy, self.value_function = policy, value_function

    def forward(
        self,
        prompt: dict[str, Tensor],
        question: Tensor | None,
        actions: Tensor,
        flat_index: Tensor,
        with_policy: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probabilities of the actions and entropies, (B, T) each and 0 outside `flat_index`, and values (B, T).

        prompt (U, S) holds each question once, question (B,) is the prompt of each row (None: row i's is i); actions
        (B, T + 1); flat_index (N,) are the wanted positions in the flattened (B, T). Values alone (None, None, values)
        unless `with_policy`.
        """
        mask = prompt["attention_mask"]
        logprobs = entropy = values = None
        if with_policy:
            states = encode(self.policy, prompt)
            logprobs, entropy = policy_logprobs(self.policy, states, mask, question, actions, flat_index)
        if self.value_function is not None:
            states = encode(self.value_function, prompt)
            values = state_values(self.value_function, states, mask, question, actions)
        return logprobs, entropy, values


def encode(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    """Encoder states (U, S, d) of a batch of prompts, after fusion.

    On a CPU prompts of different lengths are encoded in several groups with less padding; states of padding, which
    nothing reads, are then 0. On a GPU one pass of more tokens is faster.
    """
    mask = prompt["attention_mask"]
    groups = [[]] if on_gpu(mask.device) else length_groups(mask.sum(1).tolist())
    if len(groups) == 1:
        return model.encode(**prompt).last_hidden_state
    parts = []
    for rows in groups:
        S = int(mask[rows[0]].sum())
        some = {name: tensor[rows] for name, tensor in prompt.items()}
        some |= {name: some[name][:, :S] for name in ("input_ids", "attention_mask")}
        states = model.encode(**some).last_hidden_state
        parts.append(F.pad(states, (0, 0, 0, mask.size(1) - S)))
    return _in_order(parts, groups)


def decode(
    model: nn.Module, states: Tensor, attention_mask: Tensor, question: Tensor | None, actions: Tensor
) -> Tensor:
    """Decoder states (B, T, d) of actions (B, T + 1), from encoder states (U, S, d) and mask (U, S) of the prompts.

    `question` (B,) is the prompt of each row; None: row i's is i. In groups of similar length on a CPU, as `encode`.
    """
    T = actions.size(1) - 1
    lengths = [] if on_gpu(actions.device) else action_mask(actions).sum(1).clamp(min=1).tolist()
    groups = length_groups(lengths) if lengths else [[]]
    parts = []
    for rows in groups:
        ids, which, S = actions[:, :-1], question, None
        if len(groups) > 1:
            ids = actions[rows, : lengths[rows[0]]]
            which = torch.tensor(rows) if question is None else question[rows]
            S = int(attention_mask[which].sum(1).max())
        some, mask = (states, attention_mask) if which is None else (states[which], attention_mask[which])
        # no decoder mask: pads are on the right, and a causal decoder never looks there from a real position
        decoded = model.decoder(
            input_ids=ids,
            encoder_hidden_states=some[:, :S],
            encoder_attention_mask=expanded_mask(mask[:, :S], model),
            use_cache=False,
        ).last_hidden_state
        if len(groups) == 1:
            return decoded
        parts.append(F.pad(decoded, (0, 0, 0, T - decoded.size(1))))
    return _in_order(parts, groups)


def _in_order(parts: list[Tensor], groups: list[list[int]]) -> Tensor:
    """Concatenate the rows of `groups` in the order of their row numbers."""
    return torch.cat(parts)[torch.argsort(torch.tensor([row for rows in groups for row in rows]))]


def policy_logprobs(
    policy: nn.Module,
    states: Tensor,
    attention_mask: Tensor,
    question: Tensor | None,
    actions: Tensor,
    flat_index: Tensor,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the actions under the full soft-max, and entropies in nats (0 unless `with_entropy`):
    (B, T) each, fp32, 0 elsewhere.

    actions (B, T + 1); flat_index (N,) are the wanted positions in the flattened (B, T).
    """
    decoded = decode(policy, states, attention_mask, question, actions)  # (B, T, d)
    # a tied T5 scales the states before the head
    wanted = decoded.flatten(0, 1).index_select(0, flat_index) * policy.config.head_scale  # (N, d)
    labels = actions[:, 1:].flatten().index_select(0, flat_index)
    return tuple(
        one.new_zeros(actions[:, 1:].numel()).index_copy(0, flat_index, one).view(actions[:, 1:].shape)
        for one in head_logprobs(wanted, policy.lm_head.weight, labels, with_entropy=with_entropy)
    )


def state_values(
    value_function: nn.Module, states: Tensor, attention_mask: Tensor, question: Tensor | None, actions: Tensor
) -> Tensor:
    """Values (B, T) of every position; undefined in padding."""
    return value_function.values(decode(value_function, states, attention_mask, question, actions))


# -- memory ------------------------------------------------------------------------------


def cast_linears_bf16(model: nn.Module) -> nn.Module:
    """Store the weights of linear layers in bf16, as autocast would cast them at every call of a frozen model: the
    same numbers for half the memory. What autocast does not cast stays as it is: embeddings, norms, and `v_head`."""
    kept = {model.get_input_embeddings().weight, *(p for name, p in model.named_parameters() if "v_head." in name)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight not in kept:
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    return model


def checkpoint_gradients(model: nn.Module) -> None:
    """Recompute each T5 block in the backward pass, with the numbers of eval mode.

    transformers checkpoints in training mode only, so the model is put into training mode with dropout set to 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5Attention
            module.dropout = 0.0
    for one in model.children():
        enable = getattr(one, "activation_checkpointing_enable", None) or one.gradient_checkpointing_enable  # old name
        enable({"use_reentrant": False, "preserve_rng_state": False})  # nothing is random without dropout
    model.train()
