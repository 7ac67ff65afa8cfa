"""A GPU that is pretended on the CPU: the code takes a GPU's paths, and what would make the host wait is recorded.

    with PretendedGPU(monkeypatch) as gpu:
        gpu.take(model)
        ...
    assert gpu.waits == []

Tensors are "there" if they were copied with `to_device`, made with `device=`, or computed from others that are there.
The host waits when a value is fetched (`.item()`, `.tolist()`, `.cpu()`, `if tensor:`), when the size of a result is
only known there (`nonzero()`, a boolean index, `unique()`), and when a tensor is copied from memory that is not
pinned: by `.to(device)`, `torch.tensor(..., device=)` or by use in one operation with a tensor that is there.
"""

from __future__ import annotations

import traceback

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ares import devices

FACTORIES = ("zeros", "ones", "full", "empty", "arange", "eye", "linspace", "tensor", "as_tensor")
READS = (
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
)  # fmt: skip
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class PretendedGPU(TorchDispatchMode):
    """`waits` holds what made the host wait, with the line of this project's code that asked for it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.there: dict[int, StorageWeakRef] = {}
        self.in_pinned: dict[int, StorageWeakRef] = {}
        self.waits: list[str] = []
        monkeypatch.setattr(devices, "GPUS", ("cuda", "cpu"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self._fetching(name, getattr(torch.Tensor, name)))
        monkeypatch.setattr(torch.Tensor, "pin_memory", self._pinning())
        monkeypatch.setattr(torch.Tensor, "to", self._moving(torch.Tensor.to))
        for name in FACTORIES:
            monkeypatch.setattr(torch, name, self._making(name, getattr(torch, name)))

    def take(self, *values) -> None:
        """Put tensors, or the weights of modules, on the pretended GPU."""
        for value in values:
            tensors = [*value.parameters(), *value.buffers()] if isinstance(value, torch.nn.Module) else [value]
            for tensor in tensors:
                _remember(self.there, tensor)

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.there

    def wait(self, what: str) -> None:
        calls = [call for call in traceback.extract_stack() if "site-packages" not in call.filename]
        call = [call for call in calls if call.filename != __file__][-1]
        self.waits.append(f"{what} at {call.filename}:{call.lineno} {call.line}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Every operation, those of the backward pass too."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = [one for one in tensors if self.holds(one)]
        if there:
            if any(one.ndim and not self.holds(one) for one in tensors):
                self.wait(f"{name} of tensors on both sides")
            if name in READS:
                self.wait(name)
            if name in INDEXING and any(one is not None and one.dtype is torch.bool for one in args[1]):
                self.wait("a boolean index")
        made = func(*args, **kwargs)
        if there:
            self.take(*(one for one in tree_iter(made) if isinstance(one, torch.Tensor)))
        return made

    def _fetching(self, name, plain):
        def fetch(tensor, *args, **kwargs):
            if not self.holds(tensor):
                return plain(tensor, *args, **kwargs)
            self.wait(name)
            with torch.utils._python_dispatch._disable_current_modes():
                return plain(tensor.detach().clone(), *args, **kwargs)

        return fetch

    def _pinning(self):
        def pin(tensor, *device):
            if self.holds(tensor) or tensor.untyped_storage()._cdata in self.in_pinned:
                return tensor
            copy = tensor.clone()
            _remember(self.in_pinned, copy)
            return copy

        return pin

    def _moving(self, plain):
        def to(tensor, *args, **kwargs):
            moves = any(isinstance(one, (str, torch.device)) for one in (*args, kwargs.get("device")))
            if not moves or self.holds(tensor):
                return plain(tensor, *args, **kwargs)
            if not kwargs.get("non_blocking") or tensor.untyped_storage()._cdata not in self.in_pinned:
                self.wait("a copy that blocks")
            copy = tensor.clone()
            self.take(copy)
            return copy

        return to

    def _making(self, name, plain):
        def make(*args, **kwargs):
            made = plain(*args, **kwargs)
            if kwargs.get("device") is not None:
                if "tensor" in name:
                    self.wait(name)
                self.take(made)
            return made

        return make


def _remember(known: dict, tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    known[storage._cdata] = StorageWeakRef(storage)  # keeps its address from being used again
