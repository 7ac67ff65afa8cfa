"""A policy that ends its texts where the gold targets end, so that generation is timed at real lengths.

Untrained weights generate no `</s>`, and each text would run to --output_len. Here the gold length of each prompt is
encoded in a few coordinates of its first encoder state, too small to change the attention, and once a text has that
length `</s>` gets the largest logit (the library's loop) or is chosen (`ares.decoding.greedy`).

    model = EndingPolicy.from_pretrained(folder)
    model.know(dataset)            # remember the lengths of the targets by prompt
    model.ending = False           # scoring passes: leave the logits alone
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ares import decoding
from model import T5ForMultimodalGeneration

BITS = 10  # lengths up to 1023
SIZE = 2.0**-6  # of one bit, exact in bf16, where states have a size near 1
END = 1  # </s>


class EndingPolicy(T5ForMultimodalGeneration):
    """`ending`: whether texts end at their targets' lengths (set by `know`)."""

    ending = False

    def know(self, *datasets: Any) -> None:
        """Learn the lengths of the targets (`</s>` counted) of `RationaleDataset`s, by their prompts' ids."""
        self.lengths = {
            tuple(ids): len(labels)
            for dataset in datasets
            for ids, labels in zip(dataset.input_ids, dataset.labels, strict=True)
        }
        self.ending = True

    @contextlib.contextmanager
    def ending_greedy(self):
        """In the block, `ares.decoding.greedy` ends the texts of this policy, too: it does not call `forward`."""

        def arg_max_or_end(logits: torch.Tensor, rows: torch.Tensor, t: int) -> torch.Tensor:
            return arg_max(logits, rows, t).masked_fill(self.encoded_lengths[rows] <= t, END)

        arg_max, decoding.arg_max = decoding.arg_max, arg_max_or_end
        try:
            yield
        finally:
            decoding.arg_max = arg_max

    def encode(self, input_ids, attention_mask=None, image_ids=None, **kwargs):
        outputs = super().encode(input_ids, attention_mask, image_ids, **kwargs)
        if self.ending:
            states = outputs.last_hidden_state
            prompts = [tuple(id for id in row if id != self.config.pad_token_id) for row in input_ids.tolist()]
            lengths = torch.tensor([self.lengths[prompt] for prompt in prompts], device=states.device)
            self.encoded_lengths = lengths
            bits = (lengths[:, None] >> torch.arange(BITS, device=states.device)) & 1  # (B, BITS)
            states[:, 0, :BITS] = (2 * bits - 1).to(states.dtype) * SIZE
        return outputs

    def forward(self, *args, encoder_outputs=None, decoder_input_ids=None, **kwargs):
        if self.ending and encoder_outputs is None:
            raise ValueError("an EndingPolicy that ends texts takes encoder_outputs of encode()")
        outputs = super().forward(
            *args, encoder_outputs=encoder_outputs, decoder_input_ids=decoder_input_ids, **kwargs
        )
        if self.ending:
            bits = (encoder_outputs[0][:, 0, :BITS] > 0).long()
            lengths = (bits << torch.arange(BITS, device=bits.device)).sum(1)
            # transformers renamed the argument
            caches = [kwargs.get(name) for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
            written = caches[0].get_seq_length() if caches else decoder_input_ids.shape[1]
            outputs.logits[lengths <= written, -1, END] = torch.finfo(outputs.logits.dtype).max
        return outputs
