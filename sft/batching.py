"""Batches of samples of similar length: for training, in an order that depends on seed and epoch; for prediction.

    batches = LengthGroupedBatches(lengths(dataset), args.bs, args.seed, rank, world)          # --bs
    batches = TokenBudgetBatches(lengths(dataset), args.max_tokens, args.seed, rank, world)    # --max_tokens
    DataLoader(dataset, batch_sampler=batches, ...)
    prediction_batches(lengths(dataset), args.eval_bs)       # every batch, the longest first

A stored checkpoint continues in the middle of an epoch: what is yielded for a given (seed, epoch) must not change.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from ares.cli import UserError

MEGABATCH = 50  # steps whose samples are sorted by target length together
SORTED_BY_PROMPT = 5  # consecutive steps of these whose samples are then sorted by prompt length
ROUND = 8  # tokens: --max_tokens counts lengths rounded up to a multiple

Lengths = Sequence[tuple[int, int]]  # (prompt, target) of every sample, in tokens: cost in encoder and decoder


def lengths(dataset: Any) -> list[tuple[int, int]]:
    """(prompt, target) tokens of every sample of a `RationaleDataset`."""
    return [(len(item["input_ids"]), len(item["labels"])) for item in (dataset[i] for i in range(len(dataset)))]


def prediction_batches(lengths: Lengths, size: int, done: Collection[int] = ()) -> list[list[int]]:
    """All samples but those in `done`, by prompt and then target length, the longest first, in batches of `size`."""
    order = [i for i in range(len(lengths)) if i not in done]
    order.sort(key=lambda i: (-lengths[i][0], -lengths[i][1]))
    return _chunks(order, size)


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


class DistributedBatches(torch.utils.data.Sampler):
    """One batch for this process in each of the `steps` optimizer steps of an epoch. Set `epoch` before iterating.

    The order is a function of (seed, epoch) alone. The library's sampler draws from the global random state, which
    dropout advances by different amounts on different ranks: samples would be lost and doubled.
    """

    def __init__(self, steps: int, seed: int, rank: int, world: int):
        self.steps, self.seed, self.rank, self.world, self.epoch = steps, seed, rank, world, 0

    def __len__(self) -> int:
        return self.steps

    def permutations(self, *sizes: int) -> list[list[int]]:
        """One random order of each of `sizes` things."""
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.epoch)
        return [torch.randperm(size, generator=generator).tolist() for size in sizes]


class LengthGroupedBatches(DistributedBatches):
    """All samples once per epoch, shuffled, those of one optimizer step of similar length.

    Samples are shuffled, sorted by length within blocks of MEGABATCH steps, cut into steps of `size` samples per
    process, and the steps shuffled; a short last step stays last. A block is sorted by target, and every
    SORTED_BY_PROMPT steps of it by prompt: on ScienceQA 18% of the work is then padding, against 41% with the sum of
    both as the key. The ranks' shares of a step differ by at most one sample. In a last step with fewer samples than
    processes each of the others repeats one: none may be idle.
    """

    def __init__(self, lengths: Lengths, size: int, seed: int, rank: int = 0, world: int = 1):
        self.lengths, self.samples = lengths, size * world  # samples per step, all processes together
        super().__init__(math.ceil(len(lengths) / self.samples), seed, rank, world)

    def __iter__(self) -> Iterator[list[int]]:
        full = len(self.lengths) // self.samples
        order, shuffled = self.permutations(len(self.lengths), full)
        for part, steps in ((1, MEGABATCH), (0, SORTED_BY_PROMPT)):
            blocks = _chunks(order, steps * self.samples)
            order = [i for block in blocks for i in sorted(block, key=lambda i: self.lengths[i][part])]
        batches = _chunks(order, self.samples)
        for step in [*(batches[k] for k in shuffled), *batches[full:]]:
            first, end = (len(step) * r // self.world for r in (self.rank, self.rank + 1))
            yield step[first:end] or [step[self.rank % len(step)]]


class TokenBudgetBatches(DistributedBatches):
    """All samples once per epoch, in batches of similar length whose padded tokens stay within `max_tokens`.

    Lengths count as rounded up to ROUND tokens. Samples are shuffled, sorted by target and then prompt, which leaves
    those of equal rounded lengths in a random order, and cut into batches; the steps (one batch for each process) are
    shuffled. The cuts depend on the lengths alone, so every epoch has as many batches. Raises UserError if there are
    fewer samples than processes.
    """

    def __init__(self, lengths: Lengths, max_tokens: int, seed: int, rank: int = 0, world: int = 1):
        self.keys = [(-(-target // ROUND) * ROUND, -(-prompt // ROUND) * ROUND) for prompt, target in lengths]
        self.cuts = [0]  # where batches begin, in the sorted order
        longest = (0, 0)
        for index, key in enumerate(sorted(self.keys)):
            longest = max(longest[0], key[0]), max(longest[1], key[1])
            if (index + 1 - self.cuts[-1]) * sum(longest) > max_tokens and index > self.cuts[-1]:
                self.cuts.append(index)
                longest = key
        self.cuts.append(len(self.keys))
        while (len(self.cuts) - 1) % world:  # halve the largest batch until every process has as many
            spans = list(zip(self.cuts, self.cuts[1:], strict=False))
            start, end = max(spans, key=lambda span: span[1] - span[0])
            if end - start < 2:
                raise UserError(f"--train_split: {len(self.keys)} samples are too few for {world} processes")
            self.cuts.insert(self.cuts.index(start) + 1, (start + end) // 2)
        super().__init__((len(self.cuts) - 1) // world, seed, rank, world)

    def __iter__(self) -> Iterator[list[int]]:
        order, steps = self.permutations(len(self.keys), self.steps)
        order.sort(key=self.keys.__getitem__)
        for step in steps:
            k = step * self.world + self.rank
            yield order[self.cuts[k] : self.cuts[k + 1]]
