"""GPU memory of PPO: how many tokens a pass may hold, and a dry run of the largest update before anybody is paid.

    args.pass_tokens = default_pass_tokens(free, info, args)
    dry_run(load, prompts, args, accelerator, lengths)     # UserError if the memory does not suffice

What a pass keeps for the gradient is computed by benchmarks/rl_memory.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from ares.devices import enough_memory, on_gpu
from rl import ppo, sharding
from rl.rollouts import FIELDS, Prompts, Rollouts
from rl.trainer import PpoTrainer

PASS_TOKENS = 8192  # of a pass on a GPU with memory for it: more tokens fill it no better
# bytes per parameter: weight, gradient and AdamW's moments in fp32; in bf16 the last gradient and a pass's weights
STATE = 20
ACTIVATIONS = 36  # bytes per token, layer and unit of d_model that the backward pass needs (docs/rl.md, Memory)
RESERVED = 2**30  # bytes for CUDA and its libraries


def default_pass_tokens(free: int, info: Any, args: Any) -> int | None:
    """--pass_tokens for a GPU with `free` bytes and a checkpoint (`model.CheckpointInfo`): PASS_TOKENS, or the
    multiple of 1,024 that the memory suffices for; None (a minibatch a pass) if that is 0."""
    models = 1 if args.algo == "rloo" else 2
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of shared.weight
    parameters = sum(math.prod(shape) for name, shape in info.shapes.items() if name not in copies)
    config = info.config
    kept = ACTIVATIONS * config.d_model * (config.num_layers + config.num_decoder_layers)
    kept = kept / 8 if args.gradient_checkpointing else kept
    tokens = (0.9 * free - RESERVED - models * STATE * parameters) / (models * kept)
    return min(PASS_TOKENS, int(tokens) // 1024 * 1024) if tokens >= 1024 else None


def wanted(accelerator: Any) -> bool:
    """Whether `dry_run` can tell something: on a GPU, and where one process holds a whole model."""
    return on_gpu(accelerator.device) and sharding.sharding_of(accelerator) is None


def dry_run(load: Callable[[], tuple], prompts: Prompts, args: Any, accelerator: Any, lengths: Sequence[int]) -> None:
    """Make two updates of the largest size, with models that `load` returns (policy, value function or None) and that
    are then thrown away. `lengths`: tokens of sampled rationales, of which the longest are used with the longest
    prompts. Nothing random is drawn and no file is written.

    Raises UserError if the GPU's memory does not suffice.
    """
    rationale, prompt = max(lengths), max(prompts.lengths.values())
    in_a_pass = max(1, (args.pass_tokens or 0) // (args.rl_batch_size * (rationale + prompt)))
    n = args.rl_batch_size * min(args.ga_step, in_a_pass)
    longest = sorted(prompts.lengths, key=lambda qid: -prompts.lengths[qid])
    rows = _made_up(list(islice(cycle(longest), n)), list(islice(cycle(sorted(lengths, reverse=True)), n)))
    fixes = [] if args.gradient_checkpointing else ["--gradient_checkpointing"]
    fixes += [f"--pass_tokens below {args.pass_tokens}"] if n > args.rl_batch_size else []
    fixes += [f"--rl_batch_size below {args.rl_batch_size} (and more --ga_step: the same update)"]
    fault = (
        f"{fixes[0].split()[0]}: PPO does not fit into this GPU's memory with {n} rationales of up to {rationale} "
        f"tokens in a pass, prompts of up to {prompt}; use {' or '.join(fixes)}; what was sampled is kept"
    )
    with enough_memory(fault):
        _updates(load, prompts, args, accelerator, rows)


def _updates(load: Callable[[], tuple], prompts: Prompts, args: Any, accelerator: Any, rows: Rollouts) -> None:
    policy, value_function = load()
    n = len(rows)
    data = ppo.compute_advantages(rows, [[]] * n, args, 0.0)
    trainer = PpoTrainer(
        policy, value_function, data, prompts, args, _Alone(accelerator), state=Path(), metrics=None, number=0
    )
    passes = [True] if n >= args.rl_batch_size * args.ga_step else [False, True]  # whether it is the update's last
    trainer.position.epoch = 0
    advantages = torch.zeros(n, int(rows.lengths.max()))
    for update in range(2):  # in the second one, AdamW's moments and the gradient of the first are there
        trainer.position.update = update
        inputs = (trainer._inputs(list(range(n)), advantages, int(rows.lengths.sum()), last=last) for last in passes)
        trainer._gradients(inputs)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)


def _made_up(qids: list[str], lengths: list[int]) -> Rollouts:
    """Rollouts of these lengths, without sentences."""
    n, numbers = len(qids), torch.zeros(sum(lengths))
    none = torch.zeros(n, dtype=torch.int64)
    flat = {name: numbers for name in FIELDS[1:]} | {"tokens": torch.full((len(numbers),), 2, dtype=torch.int32)}
    return Rollouts(
        qids, list(range(n)), [0] * n, torch.tensor(lengths), none, torch.zeros(0, dtype=torch.int32), **flat
    )


class _Alone:
    """An accelerator of this process alone: no DDP, whose collectives would need the other processes."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, accelerator: Any):
        self.device, self.autocast = accelerator.device, accelerator.autocast

    def prepare(self, *objects: Any) -> tuple:
        return objects

    def no_sync(self, model: Any) -> Any:
        return contextlib.nullcontext()
