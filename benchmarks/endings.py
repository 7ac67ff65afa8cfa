"""A policy that ends its texts where the gold targets end, so that generation is timed at real lengths.

Untrained weights hardly generate `</s>`, and texts would run to --output_len. Here a text gets `</s>` when it has the
length of its prompt's target and no sooner, both in the library's loop and in `ares.decoding.greedy`.

    model = EndingPolicy.from_pretrained(folder)
    model.know(dataset)            # remember the lengths of the targets by prompt
    with model.ending_greedy(): ...
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ares import decoding
from model import T5ForMultimodalGeneration

END = 1  # </s>


def end_at(lengths: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor of logits (B, V) after ids (B, t): text i ends after lengths[i] tokens (`</s>` counted), no sooner.
    The library's loop keeps every row to the end."""
    scores[:, END] = -torch.inf
    scores[lengths <= ids.size(1), END] = torch.finfo(scores.dtype).max
    return scores


class EndingPolicy(T5ForMultimodalGeneration):
    """`lengths`: prompt ids -> length of the text, `</s>` counted."""

    def know(self, *datasets: Any) -> None:
        """Learn the lengths of the targets of `RationaleDataset`s, by their prompts' ids."""
        self.lengths = {
            tuple(ids): len(labels)
            for dataset in datasets
            for ids, labels in zip(dataset.input_ids, dataset.labels, strict=True)
        }

    def encode(self, input_ids, attention_mask=None, image_ids=None, **kwargs):
        prompts = [tuple(id for id in row if id != self.config.pad_token_id) for row in input_ids.tolist()]
        self.encoded_lengths = torch.tensor([self.lengths[prompt] for prompt in prompts], device=input_ids.device)
        return super().encode(input_ids, attention_mask, image_ids, **kwargs)

    def generate(self, inputs=None, **kwargs):
        # not yet the lengths themselves: generation calls `encode`
        return super().generate(inputs, logits_processor=[self._end], **kwargs)

    def _end(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return end_at(self.encoded_lengths, ids, scores)

    @contextlib.contextmanager
    def ending_greedy(self):
        """In the block, `ares.decoding.greedy` ends the texts of this policy, too."""

        def arg_max_or_end(logits: torch.Tensor, rows: torch.Tensor, t: int) -> torch.Tensor:
            logits[:, END] = -torch.inf
            return arg_max(logits, rows, t).masked_fill(self.encoded_lengths[rows] <= t, END)

        arg_max, decoding.arg_max = decoding.arg_max, arg_max_or_end
        try:
            yield
        finally:
            decoding.arg_max = arg_max
