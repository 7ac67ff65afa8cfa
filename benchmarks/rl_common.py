"""What bench_rollout.py and bench_ppo.py share: three models, real prompts, texts that end at real lengths.

Weights that were never trained write no `</s>`; so that both sides write equally much, each text's length is drawn
from those of the real solutions, and both sides are made to end it there.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from rl import sampling
from rl.rollouts import Prompts

PAST_END = 2.0  # in the place of a number in [0, 1): the text is over


@dataclass
class World:
    """Real questions in the split's order, their prompts, and models on the device."""

    args: argparse.Namespace
    device: torch.device
    dataset: Any
    prompts: Prompts
    models: sampling.Models

    def lengths(self, rows: int) -> Tensor:
        """(rows,) lengths of texts, `</s>` counted, drawn from those of the real solutions, cut at --output_len."""
        real = torch.tensor([min(n, self.args.output_len - 1) for _, n in common.lengths(self.dataset)])
        pick = torch.randint(len(real), (rows,), generator=torch.Generator().manual_seed(self.args.seed))
        return real[pick]


def make_world(args: argparse.Namespace, questions: int) -> World:
    from model import T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction

    device = common.set_up(args)
    data = common.load(args, prompt_format="QCM-E")
    folder, shape = common.model_folder(args, data), data.features.shape
    policy, reference = (T5ForMultimodalGeneration.from_pretrained(folder, patch_size=shape) for _ in range(2))
    value = T5ForMultimodalGenerationValueFunction.from_pretrained(folder, patch_size=shape)
    models = [one.to(device).eval() for one in (policy, reference, value)]
    for one in models:
        if device.type == "cpu":
            one.set_attn_implementation("eager")  # as run_mm_cot_rl.py does
    dataset = data.dataset("train", questions)
    return World(args, device, dataset, Prompts(dataset, data.collator(), device), sampling.Models(*models))


@contextlib.contextmanager
def ending(lengths: Tensor) -> Iterator[None]:
    """Within, text i of our sampling ends after lengths[i] tokens, and no sooner."""
    numbers, draw = sampling.uniform_noise, sampling.draw

    def numbers_until(rows: int, length: int, seed: int) -> Tensor:
        return numbers(rows, length, seed).masked_fill(torch.arange(length) >= lengths[:, None], PAST_END)

    def draw_until(logits: Tensor, how: sampling.Sampling, u: Tensor) -> Tensor:
        logits[:, sampling.EOS] = -torch.inf
        return draw(logits, how, u.clamp(max=0.5)).masked_fill(u == PAST_END, sampling.EOS)

    sampling.uniform_noise, sampling.draw = numbers_until, draw_until
    try:
        yield
    finally:
        sampling.uniform_noise, sampling.draw = numbers, draw
