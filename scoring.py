"""What policy and value function say of given rationales: log-probabilities, entropies and values, each prompt encoded
once whatever the number of its rationales.

Shared by sampling (sampling.py) and training (ppo_trainer.py). The logits of all positions never exist at once
(`ares.ppo.head_logprobs`), those of padding never at all. Left out: which rationales, and what is made of the numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ares import ppo


def encode(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    """Encoder states (U, S, d) of a batch of prompts, after fusion."""
    return model.encode(**prompt).last_hidden_state


def head_scale(model: nn.Module) -> float:
    """What T5 multiplies decoder states with before its head: d ** -0.5 where the head is the embedding, else 1."""
    config = model.config
    scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return config.d_model**-0.5 if scaled else 1.0


def by_row(states: Tensor, attention_mask: Tensor, question: Tensor | None) -> tuple[Tensor, Tensor]:
    """States (U, S, d) and mask (U, S) of the prompts, for each of B rows; `question` (B,), None: row i's is i."""
    if question is None:
        return states, attention_mask
    return states[question], attention_mask[question]


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
    states, attention_mask = by_row(states, attention_mask, question)
    # no decoder mask: pads are on the right, and a causal decoder never looks there from a real position
    decoded = policy.decoder(
        input_ids=actions[:, :-1],
        encoder_hidden_states=states,
        encoder_attention_mask=attention_mask,
        use_cache=False,
    ).last_hidden_state  # (B, T, d)
    wanted = decoded.flatten(0, 1).index_select(0, places) * head_scale(policy)  # (N, d)
    labels = actions[:, 1:].flatten().index_select(0, places)
    return tuple(
        one.new_zeros(actions[:, 1:].numel()).index_copy(0, places, one).view(actions[:, 1:].shape)
        for one in ppo.head_logprobs(wanted, policy.lm_head.weight, labels)
    )


def values(
    value_function: nn.Module, states: Tensor, attention_mask: Tensor, question: Tensor | None, actions: Tensor
) -> Tensor:
    """Values (B, T) of every position, padding included."""
    states, attention_mask = by_row(states, attention_mask, question)
    return value_function(encoder_outputs=(states,), attention_mask=attention_mask, decoder_input_ids=actions[:, :-1])


def places_of(mask: Tensor, device: Any = None) -> Tensor:
    """(B, T) mask on the CPU -> the places of its real positions in the flattened (B, T), on `device`."""
    return to_device(mask.flatten().nonzero()[:, 0], device)


def to_device(tensor: Tensor, device: Any) -> Tensor:
    """Without waiting for the copy where there is a GPU."""
    if torch.device(device or "cpu").type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
