"""A few real questions and a T5 of the real kind, both small, for the tests of training; a counter of kernels."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

PATCHES = (5, 8)  # recorded in the features' sidecar, as extract_features.py does for any model but the named four


def make_data(root: Path, sample: Path, train: int = 24, val: int = 6, test: int = 8, shape=PATCHES, prefix="mini"):
    """A data root with `train` + `val` + `test` real questions and random features for those that have an image."""
    source = sample / "ScienceQA/data/scienceqa"
    problems = json.loads((source / "problems.json").read_text())
    splits = json.loads((source / "pid_splits.json").read_text())
    cut = {"train": splits["train"][:train], "val": splits["val"][:val], "test": splits["test"][:test]}
    qids = [qid for part in cut.values() for qid in part]
    cut |= {f"{prefix}{name}": part[: max(2, len(part) // 2)] for name, part in list(cut.items())}
    write(root / "scienceqa/problems.json", {qid: problems[qid] for qid in qids})
    write(root / "scienceqa/pid_splits.json", cut)
    rows = [qid for qid in qids if problems[qid]["image"]]
    write(root / "vision_features/name_map.json", {qid: row for row, qid in enumerate(rows)})
    if tuple(shape) == PATCHES:
        write(root / "vision_features/vit.json", {"shape": list(shape)})
    with open(root / "vision_features/vit.npy", "wb") as file:
        np.save(file, np.random.default_rng(0).standard_normal((len(rows), *shape)).astype("float32"))
    return root


def make_model(folder: Path, *, tied: bool = False, dropout: float = 0.1, patch_size=None) -> Path:
    """A 2 + 2 layer T5 with T5's vocabulary; its loss starts near ln(32128), not at the library's 70."""
    from model import MultimodalT5Config, T5ForMultimodalGeneration

    torch.manual_seed(0)
    config = MultimodalT5Config(
        **dict(vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4),
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        patch_size=patch_size,
    )
    model = T5ForMultimodalGeneration(config)
    with torch.no_grad():
        (model.shared if tied else model.lm_head).weight.mul_(0.05)
    model.save_pretrained(folder)
    return folder


def predictions(folder: Path, split: str = "test") -> dict:
    return json.loads((folder / f"predictions_ans_{split}.json").read_text())


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class Launches(TorchDispatchMode):
    """Counts the operations that would each launch a kernel (or more) on a GPU, on tensors of the CPU.

    Every operation that reaches the dispatcher counts once, the backward pass's too, but views, memory without
    content, and constants. What is one kernel on a GPU and a composite on a CPU counts once forward and once backward:
    fused attention, `F.rms_norm`, `F.dropout`. A boolean mask that attention gets costs one more. With the library's
    layers at base depth in bf16: 563 for a decode step of 256 rows, 7,342 for a PPO pass, 3,892 for an SFT step of 8.
    """

    FREE = {f"aten::{name}" for name in (
        "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "detach", "alias", "scalar_tensor",
        "lift_fresh", "promote_types", "_local_scalar_dense")}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen, self.paused = Counter(), False
        self.attention, self.rms_norm = F.scaled_dot_product_attention, F.rms_norm
        self.patches = [
            mock.patch.object(F, "scaled_dot_product_attention", self._attention),
            mock.patch.object(F, "rms_norm", lambda *args: _OneKernel.apply(self, self.rms_norm, {}, *args)),
            mock.patch.object(F, "dropout", self._dropout),
            mock.patch("ares.devices.GPUS", ("cuda", "cpu")),
            mock.patch("ares.layers.has_kernels", lambda x: True),
        ]

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        how = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
            attn_mask = attn_mask.expand(*query.shape[:3], key.size(2))  # its gradient is a sum where it was expanded
        return _OneKernel.apply(self, self.attention, how, query, key, value, attn_mask)

    @staticmethod
    def _dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if training and p else x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, returns = func._schema.name, func._schema.returns
        view = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if not (self.paused or view or name in self.FREE):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)


class _OneKernel(torch.autograd.Function):
    """`function(*args, **how)`, counted as one operation forward and one backward."""

    @staticmethod
    def forward(ctx, counter, function, how, *args):
        ctx.counter, ctx.function, ctx.how, ctx.args = counter, function, how, args
        counter.seen[function.__name__] += 1
        counter.paused = True
        out = function(*args, **how)
        counter.paused = False
        return out

    @staticmethod
    def backward(ctx, grad):
        ctx.counter.seen[f"{ctx.function.__name__}_backward"] += 1
        ctx.counter.paused = True
        needed = ctx.needs_input_grad[3:]
        args = [x.detach().requires_grad_() if need else x for x, need in zip(ctx.args, needed, strict=True)]
        with torch.enable_grad():
            out = ctx.function(*args, **ctx.how)
        wanted = [x for x, need in zip(args, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        ctx.counter.paused = False
        return None, None, None, *(next(grads) if need else None for need in needed)
