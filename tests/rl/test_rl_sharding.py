"""PPO sharded by FSDP2: the same numbers, whole files, and what accelerate's configurations ask for."""

from __future__ import annotations

import os

import pytest
import torch

import run_mm_cot_rl
from ares.cli import UserError
from rl import sharding
from tests.conftest import run_script
from tests.rl.rl_tools import make_trainer


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes made, with and without checkpointing of blocks."""
    folder = tmp_path_factory.mktemp("sharded")
    for blocks in ("plain", "checkpointing"):
        (folder / blocks).mkdir()
    run_script("-m", "tests.rl.rl_sharding_worker", folder, nproc=2, env={"OMP_NUM_THREADS": "1"})
    return folder


@pytest.mark.parametrize("blocks", ["plain", "checkpointing"])
def test_two_sharded_processes_make_the_updates_of_one_whole(by_two, tmp_path, blocks):
    """2 processes x 2 accumulation steps, sharded, stopped after an epoch and gone on with from the saved state,
    against 1 x 4 in this process. float64: what is left is the order of sums."""
    got = torch.load(by_two / blocks / "whole.pth", weights_only=True)

    trainer = make_trainer(tmp_path, rows=9, ga_step=4, max_grad_norm=0.05, save_minutes=1e6)
    start = {name: tensor.clone() for name, tensor in trainer.raw.state_dict().items()}
    trainer.train()
    want = trainer.raw.state_dict()
    assert got["model"].keys() == want.keys()
    assert max(float((want[name] - start[name]).abs().max()) for name in want) > 1e-2
    for name, tensor in want.items():
        torch.testing.assert_close(got["model"][name], tensor, atol=1e-8, rtol=1e-8, msg=name)
    state = trainer.optimizer.state_dict()["state"]
    assert got["optimizer"]["names"] == trainer.names and got["optimizer"]["state"].keys() == state.keys()
    for place, moments in state.items():
        for key, tensor in moments.items():
            torch.testing.assert_close(got["optimizer"]["state"][place][key], tensor, atol=1e-9, rtol=1e-6)

    from model import T5ForMultimodalGenerationValueFunction

    loaded = T5ForMultimodalGenerationValueFunction.from_pretrained(by_two / blocks / "saved", dtype=torch.float64)
    for name, tensor in trainer.raw.value_function.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ["FSDP on CPU", "DDP", "without a word"]),
        ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "false"}, ["FSDP 1", "fsdp_version: 2", "configs/"]),
        (
            {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "false", "FSDP_VERSION": "2",
             "FSDP_OFFLOAD_PARAMS": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            ["fsdp_offload_params", "--gradient_checkpointing"],
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["DeepSpeed", "configs/fsdp.yaml"]),
    ],
    ids=["fsdp-cpu", "fsdp-1", "fsdp-options", "deepspeed"],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_its_reason(tmp_path, monkeypatch, env, words):
    for name, value in ({"ACCELERATE_USE_CPU": "true"} | env).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refusal:
        run_mm_cot_rl.parse_args(["--base_model_dir", str(tmp_path)])
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words)


def test_fsdp_that_accelerate_drops_is_refused(monkeypatch):
    """Without a GPU and without saying so: accelerate runs something else."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert sharding.sharding_of(accelerator) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="asks for FSDP, but accelerate runs"):
        sharding.check_processes(accelerator)


@pytest.mark.gpu
def test_on_a_gpu_accelerates_configuration_shards_the_parameters(tmp_path):
    """`accelerate launch` with configs/fsdp.yaml's settings on one GPU: its kind of run, and parameters in parts."""
    code = """
import os, sys, torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from rl import sharding
from rl.actor_critic import ActorCritic
from tests.rl.rl_tools import small_models
accelerator = Accelerator(mixed_precision="bf16")
sharding.check_processes(accelerator)
assert accelerator.distributed_type.value == "FSDP" and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
how = sharding.sharding_of(accelerator)
model = sharding.shard(ActorCritic(*small_models(torch.float32)).to(accelerator.device), how)
assert how.device_type == "cuda" and all(isinstance(p, DTensor) for p in model.parameters())
state = sharding.full_state(model, True)
assert all(not isinstance(t, DTensor) and t.device.type == "cpu" for t in state.values())
sharding.load_full_state(model, state)
print("sharded", len(state))
"""
    (tmp_path / "check.py").write_text(code)
    command = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/fsdp.yaml"]
    env = {"ACCELERATE_USE_CPU": "false", "PYTHONPATH": os.getcwd()}
    done = run_script(*command, "--num_processes", "1", tmp_path / "check.py", env=env)
    assert "sharded" in done.stdout
