"""How fast a stage could be: FLOPs of real tokens, and the time of its bare matrix products.

    flops = row_flops(model.config, prompt=83, target=80)          # forward pass of one row, pads not counted
    seconds = products(lambda: model(**batch)).seconds(device)     # what its matrix products alone take

Norms, softmax and optimizer are not counted; the share of the products in a stage's time says how much these take.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# FLOP/s of dense bf16 products as the maker states them; another GPU is measured
STATED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def row_flops(config: Any, prompt: int, target: int) -> float:
    """FLOPs (2 per multiply-add) of one forward pass of one row of real lengths; a training step takes three times
    as many. Counts matrix products only; decoder self-attention is counted for the causal half."""
    d, inner, ff = config.d_model, config.num_heads * config.d_kv, config.d_ff
    matrices = 3 if config.is_gated_act else 2
    S, L = prompt, target
    encoder = 8 * S * d * inner + 4 * S * S * inner + 2 * matrices * S * d * ff
    self_attention = 8 * L * d * inner + 2 * L * L * inner
    cross = 4 * L * d * inner + 4 * S * d * inner + 4 * L * S * inner
    decoder = self_attention + cross + 2 * matrices * L * d * ff
    total = config.num_layers * encoder + config.num_decoder_layers * decoder + 2 * L * d * config.vocab_size
    if config.patch_size is not None:
        P, D = config.patch_size
        total += 2 * P * D * d + 4 * P * d * d + 8 * S * d * d + 4 * S * P * d
    return float(total)


def mean_flops(config: Any, dataset: Any) -> float:
    """`row_flops` of a `RationaleDataset`'s prompts and targets: the mean over its rows."""
    rows = zip(dataset.input_ids, dataset.labels, strict=True)
    return sum(row_flops(config, len(prompt), len(target)) for prompt, target in rows) / len(dataset)


class Products(TorchDispatchMode):
    """Counts the matrix products that run under it: operator, sizes, strides, dtype."""

    def __init__(self):
        super().__init__()
        self.seen: Counter = Counter()  # (shapes, strides and type of both sides) -> times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default):
            self._add(*args[-2:])
        elif func is aten.linear.default:  # under inference mode nothing is decomposed
            self._add(args[0].flatten(0, -2), args[1].t())
        elif "scaled_dot_product" in str(func):
            self._attention(func, args)
        return func(*args, **(kwargs or {}))

    def _add(self, left: torch.Tensor, right: torch.Tensor, times: int = 1) -> None:
        key = (*(tuple(t.shape) for t in (left, right)), left.stride(), right.stride(), left.dtype)
        self.seen[key] += times

    def _attention(self, func: Any, args: tuple) -> None:
        """A fused attention as the products inside it: two forward, five backward."""
        backward = "backward" in str(func)
        query, key, value = args[1:4] if backward else args[:3]
        flat = [t.reshape(-1, *t.shape[-2:]) for t in (query, key, value)]
        self._add(flat[0], flat[1].mT, 3 if backward else 1)
        scores = flat[0].new_empty(flat[0].shape[0], flat[0].shape[1], flat[1].shape[1])
        self._add(scores, flat[2], 2 if backward else 1)

    def flops(self) -> float:
        """FLOPs of all that was seen, pads included."""
        return sum(2.0 * math.prod(left) * right[-1] * times for (left, right, *_), times in self.seen.items())

    def seconds(self, device: torch.device | str, repeats: int = 3) -> float:
        """Time of these products alone, on random numbers: the least time over `repeats`, summed over all."""
        total = 0.0
        for (*shapes, left_stride, right_stride, dtype), times in self.seen.items():
            a, b = (
                # as many random numbers as the strides reach
                torch.randn(1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)), device=device)
                .to(dtype)
                .as_strided(shape, stride)
                for shape, stride in zip(shapes, (left_stride, right_stride), strict=True)
            )
            a @ b
            total += times * min(seconds(lambda a=a, b=b: a @ b, device, min(times, 8)) for _ in range(repeats))
        return total


def products(function: Callable[[], Any]) -> Products:
    """The matrix products that one call of `function` runs, its backward passes included."""
    with Products() as seen:
        function()
    return seen


def seconds(function: Callable[[], Any], device: torch.device | str = "cpu", times: int = 1) -> float:
    """Wall seconds of one call, a GPU's work included: the mean of `times` calls."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        function()
    if on_gpu:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / times


def share_of_products(function: Callable[[], Any], device: torch.device | str, units: int, per_unit: float) -> str:
    """How close to the limit `per_unit` seconds are, if `function` does the matrix products of `units` units."""
    return f"bare matrix products take {products(function).seconds(device) / units / per_unit:.0%} of our time"


def utilisation(flops: float, per_unit: float, device: torch.device | str, dtype: torch.dtype) -> str:
    """How close to a GPU's peak a unit of `flops` (of real tokens) in `per_unit` seconds is."""
    share = flops / per_unit / peak_flops(torch.device(device), dtype)
    return f"model FLOP utilisation {share:.1%} of the {str(dtype).removeprefix('torch.')} peak"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of dense products: the stated bf16 peak of a known GPU, else that of a large product, measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, peak in STATED_PEAKS.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))
