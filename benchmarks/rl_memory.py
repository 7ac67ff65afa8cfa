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

if __name__ == "__main__":  # run as a file, the project is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ares import head
from ares.cli import HelpFormatter, print0, run

SIZES = {
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
}
MINIBATCH = {"base": 8, "large": 2}  # --rl_batch_size of the users' commands
INPUT, OUTPUT, VOCABULARY, PATCHES = 512, 512, 32128, (145, 1024)


def build(size: str):
    """Policy and value function of one size, in bf16 on the meta device."""
    from model import MultimodalT5Config, T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction

    made = []
    for cls in (T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction):
        config = MultimodalT5Config(
            vocab_size=VOCABULARY, d_kv=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            decoder_start_token_id=0, **SIZES[size],
        )  # fmt: skip
        with torch.device("meta"):
            made.append(cls(config, PATCHES).to(torch.bfloat16).eval())
    return made


def kept_bytes(size: str, rows: int, checkpointing: bool) -> int:
    """Bytes of all distinct tensors except weights that autograd keeps for one minibatch."""
    from rl import actor_critic

    model = actor_critic.ActorCritic(*build(size))
    if checkpointing:
        actor_critic.checkpoint_gradients(model)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor):
        key = tensor.untyped_storage()._cdata
        if key not in weights:
            kept[key] = (tensor.untyped_storage().nbytes(), tensor)  # held, so that its place is not used again
        return tensor

    with torch.device("meta"):
        prompt = {
            "input_ids": torch.ones(rows, INPUT, dtype=torch.long),
            "attention_mask": torch.ones(rows, 1, 1, INPUT, dtype=torch.bool),  # as the library expands it
            "image_ids": torch.zeros(rows, *PATCHES, dtype=torch.bfloat16),
        }
        actions = torch.ones(rows, OUTPUT, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(prompt, None, actions, torch.arange(rows * (OUTPUT - 1), device="meta"))
    del out
    probabilities = rows * (OUTPUT - 1) * VOCABULARY
    logits = 2 * probabilities if probabilities <= head.KEEP else 6 * head.CHUNK  # kept; or a block in bf16 and fp32
    return sum(size for size, _ in kept.values()) + logits


def row(size: str) -> str:
    """One line of the table, in GB (10^9 bytes)."""
    policy, value = (sum(p.numel() for p in model.parameters()) for model in build(size))
    trained = policy + value - VOCABULARY * SIZES[size]["d_model"]  # the value function's lm_head is frozen
    state = 4 * (policy + value) + 12 * trained
    frozen = 2 * policy + 2 * VOCABULARY * SIZES[size]["d_model"]  # bf16, the embedding fp32
    plain, less = (kept_bytes(size, MINIBATCH[size], checkpointing) for checkpointing in (False, True))
    cells = [
        f"{size}, {policy / 1e6:.0f} M",
        str(MINIBATCH[size]),
        *(f"{number / 1e9:.1f}" for number in (3 * frozen, frozen, state, 16 * policy)),
        *(f"{number / 1e9:.1f}" for number in (plain, less, state + plain, state + less)),
    ]
    return "| " + " | ".join(cells) + " |"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parse_args(argv)
    heads = [
        "model, parameters", "`--rl_batch_size`", "sampling: weights", "with `--offload`",
        "PPO: weights, gradients, AdamW", "the same, `--algo rloo`", "kept for a minibatch",
        "with `--gradient_checkpointing`", "PPO in all", "PPO in all, checkpointed",
    ]  # fmt: skip
    print0("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for size in SIZES:
        print0(row(size))


if __name__ == "__main__":
    run(main)
