"""The optimizer of PPO: AdamW, its learning rate, and its state on disk (`optimizer_state.pth`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ares.checkpoints import load_torch
from ares.cli import UserError
from model import T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction
from rl import sharding
from rl.actor_critic import ActorCritic


def scheduled_lr(schedule: str, lr: float, done: int, total: int) -> float:
    """Learning rate of the update after `done` of a round's `total` updates: constant, or down to 0 at the end."""
    left = max(0.0, 1 - done / total)
    return lr * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


def parameter_groups(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The trained parameters by name: those with weight decay, then biases and norms, without."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in named if p.ndim < 2 or "bias" in name}  # norms of T5 are vectors
    return [[(n, p) for n, p in named if n not in plain], [(n, p) for n, p in named if n in plain]]


def make_optimizer(model: nn.Module, args: Any, weight_decay: float = 0.01) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW with weight decay on everything but biases and norms, and the parameters' names in its order.

    Policy and value function have groups of their own, with `base_lr` --lr and --vf_lr. In `named_parameters` the
    policy comes first, so the order is that of `parameter_groups`, by which states are saved.
    """
    groups = parameter_groups(model)
    split = []
    for group, decay in zip(groups, (weight_decay, 0.0), strict=True):
        for of_value, lr in ((False, args.lr), (True, args.vf_lr or args.lr)):
            params = [p for name, p in group if name.startswith("value_function.") == of_value]
            if params:
                split.append({"params": params, "weight_decay": decay, "lr": lr, "base_lr": lr})
    # fused: one pass over each tensor, on CPU too: a tiny model's step takes 2.6 ms instead of 9.6
    optimizer = torch.optim.AdamW(split, lr=args.lr, eps=args.adam_eps, fused=True)
    return optimizer, [name for group in groups for name, _ in group]


def optimizer_state(optimizer, names: list[str], keep: bool = True) -> dict[str, Any]:
    """What `optimizer_state.pth` holds: the moments by parameter number, and the parameters' names to check them by.

    Collective where the model is sharded; only a process that writes the file asks to `keep`.
    """
    return {"state": sharding.full_tensors(optimizer.state_dict()["state"], keep), "names": names}


def read_optimizer(path: Path, names: list[str]) -> dict[str, Any]:
    """What `optimizer_state` returned, memory-mapped: only its names are read at once.

    Raises UserError if the file is absent, unreadable or belongs to another model.
    """
    if not path.exists():
        raise UserError(f"--continue_train: {path} does not exist; name a round folder that RL wrote")
    saved = load_torch(path, "--continue_train")
    if not isinstance(saved, dict) or saved.get("names") != names:
        raise UserError(
            f"--continue_train: {path} was not written by this version for this model and --algo (its parameters "
            "differ); start from the same weights with --continue_train False"
        )
    return saved


def check_optimizer(path: Path, info: Any, with_value: bool) -> None:
    """`read_optimizer` before models are loaded, for a checkpoint (`model.CheckpointInfo`) that training goes on from,
    `with_value` function or without."""
    info.config.tie_word_embeddings = info.tied
    with torch.device("meta"):
        policy = T5ForMultimodalGeneration(info.config)
        value_function = T5ForMultimodalGenerationValueFunction(info.config) if with_value else None
    groups = parameter_groups(ActorCritic(policy, value_function))
    read_optimizer(path, [name for group in groups for name, _ in group])


def load_moments(optimizer, state: dict) -> None:
    """Load the moments of `optimizer_state(...)["state"]`; learning rate and weight decay stay those of the flags."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {key: sharding.shard_like(one, parameters[number]) for key, one in moments.items()}
        for number, moments in state.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
