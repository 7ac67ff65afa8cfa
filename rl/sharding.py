"""FSDP2 for PPO: policy and value function sharded over the processes, and gathered where a file is written.

    accelerate launch --config_file configs/fsdp.yaml run_mm_cot_rl.py ...

Each T5 block is a unit, what is around the blocks (embeddings, norms, image layers, heads) another; torch's own
`fully_shard` does the rest. accelerate's `prepare` is not used: it swaps parameters under the optimizer, and without
it the tests run on two CPU processes what runs on GPUs. Weights are gathered in fp32 and autocast computes in bf16, so
the numbers are those of DDP. Files are those of DDP too: every tensor is full. Without sharding each function returns
what it was given. `check_processes` refuses a launch for which accelerate silently runs something else.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ares import cli, files
from ares.cli import UserError


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
    """Shard `model` over all processes, in place. Its parameters are new objects: make the optimizer afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.models.t5.modeling_t5 import T5Block

    mesh = init_device_mesh(how.device_type, (how.processes,))
    for module in model.modules():
        if isinstance(module, T5Block):
            fully_shard(module, mesh=mesh, reshard_after_forward=how.reshard_after_forward)
    return fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def full_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """`model.state_dict()` with full tensors, on the CPU where it is sharded; {} on processes that do not `keep`.

    Collective where the model is sharded; rank 0 is then the one that keeps.
    """
    if not is_sharded(model):
        return model.state_dict() if keep else {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `full_state` returned, on every process."""
    if not is_sharded(model):
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def full_tensors(value: Any, keep: bool = True, on_cpu: bool = True) -> Any:
    """Tensors in nested dicts, gathered where they are sharded: collective there, with the same dict on every
    process. None in place of gathered tensors on processes that do not `keep`."""
    if isinstance(value, dict):
        return {key: full_tensors(one, keep) for key, one in value.items()}
    if isinstance(value, DTensor):
        full = value.detach().full_tensor()
        return (full.cpu() if on_cpu else full) if keep else None
    return value.detach() if isinstance(value, Tensor) else value


def local_part(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a full tensor like `parameter`; collective where that is sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(device=parameter.to_local().device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def no_sync(model: nn.Module, accelerator: Any, how: Sharding | None):
    """No gradient reduction in the block's backward passes (`accelerator.no_sync` handles its own models only)."""
    if how is None:
        return accelerator.no_sync(model)

    @contextlib.contextmanager
    def without_sync():
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    return without_sync()


# -- what accelerate runs --------------------------------------------------------------------------------


def check_processes(accelerator: Any) -> None:
    """Warn if accelerate started another number of processes than asked for; refuse if it silently dropped FSDP."""
    asked, running = asked_processes(), accelerator.num_processes
    if asked is not None and asked != running:
        cli.warn0(
            f"accelerate launch was asked for {asked} processes, but {running} run(s): it starts one without a word "
            f"on CPU; use ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} run_mm_cot_rl.py ..."
        )
    if running != cli.world_size():
        raise UserError(
            f"WORLD_SIZE is {cli.world_size()}, but accelerate runs {running} process(es); "
            "launch with accelerate launch or torchrun (on CPU with ACCELERATE_USE_CPU=true)"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if not accelerator.is_fsdp2:
            raise UserError(
                "the accelerate configuration asks for FSDP, but accelerate runs "
                f"{accelerator.distributed_type.value} on {accelerator.device.type} without a word; "
                "use a configuration without FSDP (configs/)"
            )
        # otherwise transformers leaves the weights empty on all processes but the first, for accelerate to fill
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def asked_processes() -> int | None:
    """The number of processes that `accelerate launch` was asked for on its command line or by its configuration.

    None if unknown: another launcher, or not Linux. The environment does not hold it.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return None
    if "launch" not in words or not any("accelerate" in word for word in words[: words.index("launch")]):
        return None
    given = {}
    for i, word in enumerate(words[:-1]):
        name, _, value = word.partition("=")
        given.setdefault(name.lstrip("-").replace("-", "_"), value or words[i + 1])
    if "num_processes" in given:
        return int(given["num_processes"])
    if Path(given.get("config_file", "")).is_file():
        asked = files.read_yaml(given["config_file"], "--config_file").get("num_processes")
        return asked if type(asked) is int else None
    return None
