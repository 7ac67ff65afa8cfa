"""Peak GPU memory of RL and SFT, computed for the settings of the README and prompts and targets of 512 tokens each.

    python benchmarks/rl_memory.py                 # Markdown, the tables of docs/rl.md; half a minute

The models' own code runs on the meta device, where a tensor has a size but no content: one forward and backward pass,
with every live tensor counted at every operation. Assumed:

- One GPU, bf16 autocast: products and attention in bf16, each weight's bf16 copy made once per pass and kept for the
  gradient; weights, gradients, AdamW's two moments, norms and the residual stream in fp32.
- Attention by the memory-efficient kernel, which runs where there is an additive bias: it keeps query, key, value,
  output, log-sum-exp and the bias in bf16 (for each row, where a mask is added to it), and no probabilities.
- RL: the gradients of earlier passes of the update are there, and the policy's gradient of the update before, in bf16
  (for `signal_share`). PPO's rows are of different questions; RLOO's of k = 4 rationales each (`--group_by_question`).
- Sampling: bf16 weights of linear layers, k = 4, every rationale as long as it may get; rollouts lie in the CPU's
  memory. The caches follow from their shapes; encoding and scoring are run.
- SFT: in training mode, the slopes of all logits kept (ares/head.py).

Not counted: CUDA itself and kernels' workspaces (about 1 GB together), what the allocator cannot use; with several
processes, buffers of NCCL, and in SFT the second copy of the gradients that DDP makes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ares import decoding, head
from ares.cli import HelpFormatter, print0, run
from benchmarks.common import VIT, VOCABULARY, config_of
from benchmarks.table import rows
from rl import actor_critic

LENGTH = 512  # tokens of every prompt and of every target
K = 4  # rationales per question
DEVICE = "meta"
BS = {"tiny": 64, "base": 64, "large": 32}  # --bs of sampling
PRINTED = ("base", "large")
CARDS, RESERVE = (24, 40, 80), 2.0  # GB, and what is left free for all that is not counted


class Live(TorchDispatchMode):
    """Counts bytes of live storages on the meta device: `now`, and the largest `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.device.type == "meta":
                self.add(one.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Autocast:
    """In the block: what `torch.autocast("cuda", torch.bfloat16)` and CUDA's kernels do, on the meta device, which has
    neither. `keep` the bf16 copies of weights to the end of the block, as autocast does."""

    def __init__(self, keep: bool = True):
        self.copies: dict[int, Tensor] | None = {} if keep else None
        self.linear, self.patches, self.enabled = F.linear, contextlib.ExitStack(), True

    def __enter__(self) -> None:
        for module, name, function in [
            (F, "linear", lambda x, weight, bias=None: self.linear(*map(self.low, (x, weight, bias)))),
            (F, "scaled_dot_product_attention", self.attention),
            (F, "dropout", lambda x, p=0.5, training=True, *_: torch.native_dropout(x, p, True)[0] if training else x),
            (F, "rms_norm", lambda x, *how: torch.ops.aten._fused_rms_norm(x, *how)[0]),
            (torch.amp, "is_autocast_available", lambda device: True),
            (torch, "is_autocast_enabled", lambda device: True),
            (torch, "get_autocast_dtype", lambda device: torch.bfloat16),
            (torch.amp, "autocast", lambda *args, **kwargs: contextlib.nullcontext()),  # of recomputed blocks
            (torch, "autocast", lambda device, enabled: mock.patch.object(self, "enabled", enabled)),  # of v_head
            *((module, "head_logprobs", self.head_logprobs) for module in (head, actor_critic)),
        ]:
            self.patches.enter_context(mock.patch.object(module, name, function))

    def __exit__(self, *error: Any) -> None:
        self.patches.close()

    def low(self, value: Tensor | None) -> Tensor | None:
        if value is None or value.dtype != torch.float32 or not self.enabled:
            return value
        if self.copies is None or not (value.is_leaf and value.requires_grad):
            return value.bfloat16()
        if id(value) not in self.copies:
            self.copies[id(value)] = value.bfloat16()
        return self.copies[id(value)]

    def head_logprobs(self, states, weight, labels, *, with_entropy=True, keep=None):
        keep = head.KEEP if keep is None else keep
        return head._HeadLogprobs.apply(self.low(states), self.low(weight), labels, with_entropy, keep)

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        query, key, value, bias = map(self.low, (query, key, value, attn_mask))
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


class Measured:
    """`Live` of a real GPU: what PyTorch's allocator counts, without what was there before."""

    def __init__(self):
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    now = property(lambda self: torch.cuda.memory_allocated() - self.before)
    peak = property(lambda self: torch.cuda.max_memory_allocated() - self.before)


@contextlib.contextmanager
def counting() -> Iterator[Live | Measured]:
    """In the block, tensors are made on DEVICE and counted."""
    with torch.device(DEVICE), contextlib.nullcontext(Measured()) if DEVICE == "cuda" else Live() as live:
        yield live


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """In the block, the stages run on this device: "cuda" measures what "meta" computes."""
    with mock.patch.dict(globals(), DEVICE=device):
        yield


def autocast() -> Any:
    return torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else Autocast()


def build(size: str, *, value: bool = False) -> Any:
    """A policy or value function, in eval mode, with a GPU's attention."""
    from model import T5ForMultimodalGeneration, T5ForMultimodalGenerationValueFunction

    kind = T5ForMultimodalGenerationValueFunction if value else T5ForMultimodalGeneration
    model = kind(config_of(size, VOCABULARY, VIT))
    model.set_attn_implementation("sdpa")
    return model.eval()


def prompts(count: int) -> dict[str, Tensor]:
    """A batch of full length."""
    return {
        "input_ids": torch.ones(count, LENGTH, dtype=torch.long),
        "attention_mask": torch.ones(count, LENGTH, dtype=torch.bool),
        "image_ids": torch.zeros(count, *VIT),
    }


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def moments(model: torch.nn.Module) -> list[Tensor]:
    """AdamW's."""
    return [torch.empty_like(p) for p in trained(model) for _ in range(2)]


# -- stages: (bytes between passes, peak) ----------------------------------------------------------------


def reinforce(size: str, minibatch: int, checkpointing: bool = False, rloo: bool = False) -> tuple[int, int]:
    """A pass of PPO, or of RLOO, that is not the update's first."""
    with counting() as live:
        model = actor_critic.ActorCritic(build(size), None if rloo else build(size, value=True))
        if checkpointing:
            actor_critic.checkpoint_gradients(model)
        for parameter in trained(model):
            parameter.grad = torch.empty_like(parameter)
        state = [*moments(model), *(p.grad.bfloat16() for p in trained(model.policy))]
        before = live.now
        questions = minibatch // K if rloo else minibatch
        which = torch.arange(minibatch) if rloo else None
        actions = torch.ones(minibatch, LENGTH, dtype=torch.long)
        with autocast():
            found = model(prompts(questions), which, actions, torch.arange(minibatch * (LENGTH - 1)))
        with contextlib.nullcontext() if DEVICE == "cuda" else Autocast(keep=False):  # checkpointed blocks run again
            sum(one.float().sum() for one in found if one is not None).backward()
        del state
        return before, live.peak


def fine_tune(size: str, rows: int) -> tuple[int, int]:
    """A step of SFT."""
    with counting() as live:
        model = build(size).train()
        state = moments(model)
        before = live.now
        batch, labels = prompts(rows), torch.ones(rows, LENGTH, dtype=torch.long)
        with autocast():
            loss = model(**batch, labels=labels, num_items_in_batch=1, label_index=torch.arange(rows * LENGTH)).loss
        loss.backward()
        del state
        return before, live.peak


@torch.no_grad()
def sample(size: str, questions: int, offload: bool = False) -> tuple[int, int]:
    """Sampling: questions are encoded, caches grow full, one model at a time scores the rationales."""
    from rl.sampling import SCORING_TOKENS

    with counting() as live:
        models = [build(size, value=n == 2).requires_grad_(False) for n in range(3)]
        models = [actor_critic.cast_linears_bf16(model) for model in models]
        config = models[0].config
        if offload:
            del models[1:]
        before, prompt = live.now, prompts(questions)
        inner, rows = config.num_heads * config.d_kv, questions * K
        with autocast():
            states = actor_critic.encode(models[0], prompt)
            # generation: keys and values of rationales and prompts; the logits of a step, in bf16 and three times fp32
            if DEVICE == "cuda":
                decoding.generate(models[0], states, prompt["attention_mask"], K, LENGTH, pick_first, True)
            caches = 2 * 2 * config.num_decoder_layers * inner * LENGTH * (rows + questions)
            generating = live.now + caches + rows * config.vocab_size * (2 + 3 * 4)
            group = SCORING_TOKENS // LENGTH
            which, actions = torch.arange(group) // K, torch.ones(group, LENGTH, dtype=torch.long)
            actor_critic.policy_logprobs(
                models[0], states, prompt["attention_mask"], which, actions, torch.arange(group * (LENGTH - 1)), False
            )
        return before, live.peak if DEVICE == "cuda" else max(live.peak, generating)


def pick_first(logits: Tensor, rows: Tensor, t: int) -> Tensor:
    """Token 2 for every row: no text ends."""
    return torch.full_like(rows, 2)


# -- table -----------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[str], tuple[int, int]]] = {
    "sampling, `--bs 64` (base) or `32` (large)": lambda size: sample(size, BS[size]),
    "the same with `--offload`": lambda size: sample(size, BS[size], offload=True),
    "PPO, `--pass_tokens 8192`: 8 rows a pass": lambda size: reinforce(size, 8),
    "the same with `--gradient_checkpointing`": lambda size: reinforce(size, 8, checkpointing=True),
    "PPO, `--rl_batch_size 2 --pass_tokens 2048`: 2 rows a pass": lambda size: reinforce(size, 2),
    "the same with `--gradient_checkpointing` ": lambda size: reinforce(size, 2, checkpointing=True),
    "`--algo rloo --pass_tokens 8192`: 8 rows, 2 prompts a pass": lambda size: reinforce(size, 8, rloo=True),
    "SFT, `--bs 8`": lambda size: fine_tune(size, 8),
}


def cells(between: int, peak: int) -> list[str]:
    """Both in GB (10^9 bytes), and the smallest card that has room for the peak."""
    card = next((f"{size} GB" for size in CARDS if peak / 1e9 + RESERVE <= size), "none of these")
    return [f"{between / 1e9:.1f}", f"**{peak / 1e9:.1f}**", card]


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter).parse_args(argv)
    heads = [f"{size}: {what}" for size in PRINTED for what in ("between passes", "peak", "card")]
    lines = [
        [name.strip(), *(cell for size in PRINTED for cell in cells(*stage(size)))] for name, stage in STAGES.items()
    ]
    print0("\n".join(rows(["stage", *heads], *lines)))


if __name__ == "__main__":
    run(main)
