"""Greedy decoding that stops paying for texts that are done. Used by sft/predict.py.

    ids = greedy(model, collator(items), max_length=128)       # (B, <= 128), start token first, pads after `</s>`

The same ids as `model.generate(do_sample=False)`: each prompt is encoded once, keys and values are kept, and the
arg-max is appended. Rows that have written `</s>` leave the batch once they are a quarter of it, so that one long text
does not hold the others. Leaves out sampling (rl/rollouts.py) and beams.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

# transformers 5.18 or so renamed the argument
CACHE = "cache" if "cache" in inspect.signature(T5ForConditionalGeneration.forward).parameters else "past_key_values"
LEAVE = 0.75  # rows leave once no more than this share is unfinished: each time keys and values are copied
CHECK_STEPS = 8  # on a GPU: whether rows are done costs a synchronisation


@torch.no_grad()
def greedy(model: Any, inputs: Mapping[str, torch.Tensor], max_length: int) -> torch.Tensor:
    """Ids (B, L), L at most `max_length`, on the inputs' device; in column 0 the start token, after `</s>` pads.

    `inputs`: `input_ids`, `attention_mask` and, for a model with image layers, `image_ids`. `model` may wear a LoRA
    adapter.
    """
    policy = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = policy.config
    mask = inputs["attention_mask"]
    encoded = policy.encode(**inputs)
    every = CHECK_STEPS if mask.device.type == "cuda" else 1
    ids = mask.new_full((len(mask), max_length), config.pad_token_id)
    ids[:, 0] = config.decoder_start_token_id
    rows = torch.arange(len(mask), device=mask.device)  # those still in the batch
    done = torch.zeros_like(rows, dtype=torch.bool)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for t in range(1, max_length):
        logits = policy(
            attention_mask=mask,
            encoder_outputs=encoded,
            decoder_input_ids=ids[rows, t - 1 : t],
            use_cache=True,
            **{CACHE: cache},
        ).logits  # (rows, 1, V)
        chosen = logits[:, -1].argmax(-1).masked_fill(done, config.pad_token_id)
        ids[rows, t] = chosen
        done |= chosen == config.eos_token_id
        if t % every:
            continue
        left = int((~done).sum())
        if left == 0:
            return ids[:, : t + 1]
        if left <= LEAVE * len(rows):
            stay = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(stay)
            encoded = BaseModelOutput(last_hidden_state=encoded[0][stay])
            rows, mask, done = rows[stay], mask[stay], done[stay]
    return ids
