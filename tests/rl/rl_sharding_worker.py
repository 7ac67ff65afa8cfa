"""What each of two CPU processes runs in test_rl_sharding.py: PPO cut by torch's own FSDP2, stopped and gone on with.

torchrun --nproc_per_node 2 -m tests.rl.rl_sharding_worker FOLDER     # writes FOLDER/plain, FOLDER/checkpointing
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from model import save_value_function
from rl import sharding
from rl.optimizer import optimizer_state
from tests.rl.rl_tools import make_trainer


class Stopped(Exception):
    pass


def train(folder: Path, checkpointing: bool) -> None:
    how = {"rows": 9, "save_minutes": 0, "gradient_checkpointing": checkpointing, "max_grad_norm": 0.05, "ga_step": 2}

    def trainer():
        return make_trainer(folder, sharded=sharding.Sharding("cpu", 2), **how)

    first = trainer()
    parts = [p for p in first.raw.parameters() if isinstance(p, DTensor)]
    assert len(parts) == len(list(first.raw.parameters())) > 50
    local, every = (sum(f(p) for p in parts) for f in (lambda p: p.to_local().numel(), torch.Tensor.numel))
    assert abs(local / every - 0.5) < 0.02, (local, every)
    assert first.raw.policy.shared.weight is first.raw.policy.encoder.embed_tokens.weight

    def stop(epoch=first._end_epoch):
        epoch()
        raise Stopped

    first._end_epoch = stop
    try:
        first.train()
    except Stopped:
        pass
    torch.distributed.barrier()  # rank 0 has written the state
    second = trainer()  # a fresh model, as after a kill
    assert second.restore() and second.position.epoch == 1
    second.train()

    rank = torch.distributed.get_rank()
    state = sharding.full_state(second.raw, rank == 0)
    policy = sharding.full_state(second.raw.policy, rank == 0)
    value = sharding.full_state(second.raw.value_function, rank == 0)
    optimizer = optimizer_state(second.optimizer, second.names, rank == 0)
    if rank == 0:
        torch.save({"model": state, "optimizer": optimizer}, folder / "whole.pth")
        second.raw.policy.save_pretrained(folder / "saved", state_dict=policy)
        save_value_function(second.raw.value_function, folder / "saved", value)
    else:
        assert state == policy == value == {}
    torch.distributed.barrier()


if __name__ == "__main__":
    for blocks in ("plain", "checkpointing"):
        train(Path(sys.argv[1]) / blocks, blocks == "checkpointing")
    torch.distributed.destroy_process_group()
