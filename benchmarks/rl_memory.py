"""Memory of RL's two phases per GPU, computed for the settings of the README: a Markdown table.

    python benchmarks/rl_memory.py

Counts, exactly: weights, gradients and AdamW's moments. Counts, on the meta device: the tensors that autograd keeps
for one minibatch of full-length prompts and rationales, in bf16 (bf16 autocast keeps a little more: norms in fp32).
The allocator's waste, kernels' workspaces and CUDA itself (about 1 GB together) are not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import head
from ares.cli import HelpFormatter, print0, run
from benchmarks.common import SIZES, VIT, VOCABULARY, config_of
from benchmarks.table import rows

MINIBATCH = {"base": 8, "large": 2}  # --rl_batch_size of the users' commands
INPUT, OUTPUT = 512, 512
HEADS = [
    "model, parameters", "`--rl_batch_size`", "sampling: weights", "with `--offload`",
    "PPO: weights, gradients, AdamW", "the same, `--algo rloo`", "kept for a minibatch",
    "with `--gradient_checkpointing`", "PPO in all", "PPO in all, checkpointed",
]  # fmt: skip


def build(size: str):
    """Policy and value function of one size, in bf16 on the meta device."""
    from model import T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction

    with torch.device("meta"):
        models = (T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction)
        return [cls(config_of(size, VOCABULARY, VIT)).to(torch.bfloat16).eval() for cls in models]


def kept_bytes(size: str, rows: int, checkpointing: bool) -> int:
    """Bytes of all distinct tensors except weights that autograd keeps for one minibatch."""
    from rl import actor_critic

    model = actor_critic.ActorCritic(*build(size))
    if checkpointing:
        actor_critic.checkpoint_gradients(model)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors are held, so that their places are not used again

    def keep(tensor):
        key = tensor.untyped_storage()._cdata
        if key not in weights:
            kept[key] = tensor
        return tensor

    with torch.device("meta"):
        prompt = {
            "input_ids": torch.ones(rows, INPUT, dtype=torch.long),
            "attention_mask": torch.ones(rows, 1, 1, INPUT, dtype=torch.bool),  # as the library expands it
            "image_ids": torch.zeros(rows, *VIT, dtype=torch.bfloat16),
        }
        actions = torch.ones(rows, OUTPUT, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(prompt, None, actions, torch.arange(rows * (OUTPUT - 1), device="meta"))
    probabilities = rows * (OUTPUT - 1) * VOCABULARY
    logits = 2 * probabilities if probabilities <= head.KEEP else 6 * head.CHUNK  # kept; or a block in bf16 and fp32
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + logits


def row(size: str) -> list[str]:
    """One line of the table, in GB (10^9 bytes)."""
    policy, value = (sum(p.numel() for p in model.parameters()) for model in build(size))
    embedding = VOCABULARY * SIZES[size]["d_model"]
    state = 4 * (policy + value) + 12 * (policy + value - embedding)  # the value function's lm_head is frozen
    frozen = 2 * policy + 2 * embedding  # bf16, the embedding fp32
    plain, less = (kept_bytes(size, MINIBATCH[size], checkpointing) for checkpointing in (False, True))
    amounts = (3 * frozen, frozen, state, 16 * policy, plain, less, state + plain, state + less)
    name = f"{size}, {policy / 1e6:.0f} M"
    return [name, str(MINIBATCH[size]), *(f"{amount / 1e9:.1f}" for amount in amounts)]


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter).parse_args(argv)
    print0("\n".join(rows(HEADS, *map(row, MINIBATCH))))


if __name__ == "__main__":
    run(main)
