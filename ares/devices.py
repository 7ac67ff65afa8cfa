"""Tensors on their way to a GPU, and what else keeps the host from waiting for one.

    inputs = to_device(batch, device)               # pinned, without waiting for the copy
    for batch in ahead(batches, device): ...        # the next one is made while the GPU works on this one

Whatever decides about shapes stays on the CPU: a boolean index, `nonzero()`, `if tensor:` or `.item()` of a tensor on
the GPU makes the host wait until all kernels before it have run, and the GPU is then idle until the next one arrives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ares.cli import UserError

GPUS = ("cuda", "meta")  # types of devices that take the paths of a GPU (tests add the CPU)
MULTIPLE = 8  # of padded lengths on a GPU, whose fast matrix products and attention need it


def on_gpu(device: Any) -> bool:
    """Whether a device (name, torch.device or None) is a GPU, or stands for one."""
    return torch.device(device or "cpu").type in GPUS


def padded_length(length: int, device: Any) -> int:
    """The length to pad `length` tokens to: on a GPU the next multiple of MULTIPLE."""
    return -(-length // MULTIPLE) * MULTIPLE if on_gpu(device) else length


def pinned(value: Any, device: Any) -> Any:
    """A tensor, or the tensors of a mapping, in memory from which a copy to `device`, if a GPU, is not waited for.

    torch cannot pin an expanded view (`VisionFeatures.gather`): only its repeated part is pinned, then expanded.
    """
    if isinstance(value, Mapping):
        return {name: pinned(one, device) for name, one in value.items()}
    if not isinstance(value, Tensor) or not on_gpu(device):
        return value
    return _repeated(value).pin_memory().expand(value.shape)


def to_device(value: Any, device: Any) -> Any:
    """`value.to(device)` of a tensor, or of the tensors of a mapping, without waiting for the copy to a GPU; of an
    expanded view the repeated part alone is copied."""
    if isinstance(value, Mapping):
        return {name: to_device(one, device) for name, one in value.items()}
    if not isinstance(value, Tensor) or not on_gpu(device) or value.is_cuda:
        return value.to(device) if isinstance(value, Tensor) else value
    return _repeated(pinned(value, device)).to(device, non_blocking=True).expand(value.shape)


def _repeated(view: Tensor) -> Tensor:
    """A tensor with one entry in each dimension that is expanded."""
    return view[tuple(slice(1) if stride == 0 else slice(None) for stride in view.stride())]


def flat_index(mask: Tensor, device: Any = None) -> Tensor:
    """(B, T) mask on the CPU -> the indices (N,) of its real positions in the flattened (B, T), on `device`."""
    return to_device(mask.flatten().nonzero()[:, 0], device)


def expanded_mask(mask: Tensor | None, model: nn.Module) -> Tensor | None:
    """A mask (B, S) for `model`: under SDPA on a GPU (B, 1, 1, S). The library would expand it itself, but would
    first check whether anything is masked at all, and wait for the GPU with that in every pass."""
    if mask is None or mask.ndim != 2 or not on_gpu(mask.device):
        return mask
    # plain attention would add a mask of booleans to the scores
    return mask[:, None, None].bool() if model.config._attn_implementation == "sdpa" else mask


@contextlib.contextmanager
def enough_memory(fault: str) -> Iterator[None]:
    """Raise UserError with the text `fault` if the block runs out of a GPU's memory."""
    lacking = False
    try:
        yield
    except torch.OutOfMemoryError:
        lacking = True
    if lacking:  # outside: the exception would keep the tensors of its frames
        raise UserError(fault)


def ahead(items: Iterable, device: Any) -> Iterator:
    """The items of an iterable. Where `device` is a GPU, a thread makes the next one while this one is in use."""
    if not on_gpu(device):
        yield from items
        return
    iterator, end, current = iter(items), object(), torch.cuda.current_device()
    # a new thread's own current device is GPU 0, and pinning memory starts CUDA there
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(current,)) as pool:
        future = pool.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, iterator, end)
            yield item
