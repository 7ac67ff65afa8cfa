"""FSDP2 for PPO: policy and value function cut over the processes, and whole again where a file is written.

    accelerate launch --config_file configs/fsdp.yaml run_mm_cot_rl.py ...

Each T5 block is a unit, what lies around the blocks (embeddings, norms, image layers, heads) another; torch's own
`fully_shard` does the rest. accelerate's `prepare` is passed by: it swaps parameters under the optimizer, and so what
runs on GPUs is what the tests run on two CPU processes. Weights are gathered in fp32 and autocast computes in bf16, so
the numbers are those of DDP. Files are those of DDP too: every tensor whole. Without sharding each function hands
back what it was given.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Sharding:
    """`reshard_after_forward` True is like ZeRO 3, False like ZeRO 2."""

    device_type: str
    processes: int
    reshard_after_forward: bool = True


def sharding_of(accelerator: Any) -> Sharding | None:
    """What accelerate's configuration asks for; None without FSDP."""
    if not accelerator.is_fsdp2:
        return None
    reshard = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
    return Sharding(accelerator.device.type, accelerator.num_processes, reshard)


def shard(model: nn.Module, how: Sharding) -> nn.Module:
    """Cut `model` over all processes, in place. Its parameters are new objects: make the optimizer afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.models.t5.modeling_t5 import T5Block

    mesh = init_device_mesh(how.device_type, (how.processes,))
    for module in model.modules():
        if isinstance(module, T5Block):
            fully_shard(module, mesh=mesh, reshard_after_forward=how.reshard_after_forward)
    return fully_shard(model, mesh=mesh)


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """`model.state_dict()` with whole tensors; tied names share one tensor, as in the model.

    Collective where the model is sharded. Only a process that is to write asks to `keep`; the others get {}.
    """
    found, state = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            found[id(tensor)] = whole(tensor, keep)
        state[name] = found[id(tensor)]
    return state if keep else {}


def whole(value: Any, keep: bool = True) -> Any:
    """Tensors in nested dicts, made whole (on the CPU) where they are sharded; collective there, alike everywhere."""
    if isinstance(value, dict):
        return {key: whole(one, keep) for key, one in value.items()}
    if isinstance(value, DTensor):
        full = value.detach().full_tensor()
        return full.cpu() if keep else None
    return value.detach() if isinstance(value, Tensor) else value


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, cut as `parameter` is; collective where that is sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(device=parameter.to_local().device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`model.load_state_dict` of what `whole_state` gave."""
    own = model.state_dict(keep_vars=True)
    model.load_state_dict({name: like(tensor, own[name]) if name in own else tensor for name, tensor in state.items()})


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over sharded gradients, over all of their parts."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def no_sync(model: nn.Module, accelerator: Any, how: Sharding | None):
    """Gradients of the backward passes within stay here (`accelerator.no_sync`, which knows its own models only)."""
    if how is None:
        return accelerator.no_sync(model)

    @contextlib.contextmanager
    def held():
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    return held()
