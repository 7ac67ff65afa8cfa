"""Where PPO is within a round, and which of its two saved states a killed run resumes from (rl/trainer.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares import cli
from ares.checkpoints import load_torch, refuse_damaged
from ares.cli import UserError, in_one_line
from rl import ppo


@dataclass
class Position:
    """Progress within a round: `update` updates of `epoch` are done, whose diagnostics add up to `sums`.

    Epochs of the value warm-up are negative: -1 is the last one.
    """

    epoch: int = 0
    update: int = 0
    done: int = 0  # PPO's updates since the round began
    sums: list[float] = field(default_factory=lambda: [0.0] * len(ppo.SUMS))
    grad_norm: float = 0.0  # summed over the epoch's updates
    grad_dot: float = 0.0  # of the policy's gradients of updates 0 and 1, 2 and 3, ... of the epoch, summed
    grad_square: float = 0.0  # mean squared norm of the two, summed likewise
    entropy: float | None = None  # of the round's first update, to detect a collapse


def newest_state(slots: Sequence[Path], number: int) -> tuple[int, dict[str, Any]] | None:
    """(slot, what `PpoTrainer.save_state` wrote there) of the newest undamaged saved state of round `number`.

    Its "position" is made a Position. Raises UserError if every saved state is damaged.
    """
    found, damaged = [], []
    for slot, path in enumerate(slots):
        if not path.exists():
            continue
        try:
            refuse_damaged(path, "--run_dir")
            state = load_torch(path, "--run_dir")
            here = state["position"] = Position(**state["position"])
            if state["name"]["round"] == number:
                found.append((here.done, here.epoch, here.update, slot, state))
        except UserError as error:
            damaged.append(str(error))
        except (KeyError, TypeError) as error:
            damaged.append(f"--run_dir: {path} is no saved state ({in_one_line(error, 80)})")
    if damaged and not found:
        raise UserError(f"{damaged[0]}; delete {slots[0].parent} to begin this round's PPO anew")
    for fault in damaged:
        cli.warn0(f"{fault}; going on from the other saved state")
    return max(found, key=lambda entry: entry[:4])[3:] if found else None
