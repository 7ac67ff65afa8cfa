"""RL on several processes and machines, in real launches on CPU: world sizes are asserted, never assumed."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import haiku
from rl import rollouts, sharding
from tests.conftest import ROOT, _free_port, run_script
from tests.rl import rl_tools
from tests.rl.rl_tools import DIAGNOSTICS, flags, launch, metrics_of, weights


@pytest.fixture(scope="module")
def world(rl_world):
    return rl_world


def environment(**more) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


@pytest.fixture(scope="module")
def collected(world, sample):
    """Collected by two processes, scored in place by the reference Teacher's own script."""
    run = world.tmp / "collected"
    done = run_script("run_mm_cot_rl.py", *flags(world, run, phase="collect"), nproc=2, env=environment())
    assert "2 process(es) on cpu" in done.stdout and "round 0 is collected\nnext:\n" in done.stdout
    assert not (run / "state").exists() and (run / "questions/mmcot_finished_signal.txt").exists()
    images = sample / "images"
    where = ["--data_root", str(world.data), *(["--images", str(images)] if images.exists() else [])]
    where += ["--questions_dir", str(run / "questions")]
    importlib.import_module("preprocessing_after_RL.processing_sentence_level_feedback").main(where)
    haiku.main([*where, "--teacher", "reference"])
    return run


def test_collect_with_two_processes_score_in_place_train_with_one(world, collected, tmp_path, capsys):
    """Every named diagnostic is there, finite."""
    run = tmp_path / "run"
    shutil.copytree(collected, run)
    launch(world, run, phase="train", report_to=None)
    assert "1 process(es) on cpu" in capsys.readouterr().out
    assert (run / "0/model.safetensors").exists() and list((run / "tensorboard").iterdir())
    (rollout,) = metrics_of(run, "rollout")
    lines = metrics_of(run, "update") + metrics_of(run, "epoch")
    assert len(lines) == 2 * math.ceil(14 / 4) + 2
    for line in lines:
        assert all(math.isfinite(line[name]) for name in (*DIAGNOSTICS, "kl_coef")), line
    assert rollout["share_dropped"] == 0 and rollout["rationales"] == 14
    table = [json.loads(line) for line in (run / "samples_round_0.jsonl").read_text().splitlines()]
    assert len(table) == 14 and {"qid", "prompt", "rationale", "sentences"} <= table[0].keys()
    assert sum(len(row["sentences"]) for row in table) == rollout["sentences"]
    assert all(0 <= one["score"] <= 1 and math.isfinite(one["advantage"]) for r in table for one in r["sentences"])
    assert all(row["prompt"].startswith("Question: ") for row in table)


THREE_UPDATES = {"phase": "train", "rl_epochs": 1, "rl_batch_size": 3}


@pytest.fixture(scope="module")
def two_machines(world, collected):
    """A run trained by two launches of torchrun, --nnodes 2; what they said. The folder they share is all that joins
    them besides the process group."""
    two = world.tmp / "two"
    shutil.copytree(collected, two)
    port = str(_free_port())
    nodes = []
    for node in range(2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
            "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port,
            "run_mm_cot_rl.py", *flags(world, two, ga_step=1, **THREE_UPDATES),
        ]  # fmt: skip
        nodes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return two, said


def test_two_machines_on_loopback_make_the_update_of_one(world, collected, two_machines, tmp_path):
    one, (two, said) = tmp_path / "one", two_machines
    shutil.copytree(collected, one)
    launch(world, one, ga_step=2, **THREE_UPDATES)
    assert "2 process(es) on cpu" in said[0] and "process(es)" not in said[1]
    a, b = weights(one / "0"), weights(two / "0")
    for name in a:  # float32 sums in another order; lr 1e-3 moves weights by up to 1e-3 per update
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=name)


def kill_rank(world, run: Path, rank: int, until: str, **how) -> None:
    """Start RL on two processes, SIGKILL the one of that rank once a file `until` is there, wait for the launcher."""
    launch_two = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(_free_port())]
    launcher = subprocess.Popen(
        [sys.executable, *launch_two, "run_mm_cot_rl.py", *flags(world, run, **how)],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(run.glob(until)):
        assert launcher.poll() is None, launcher.stderr.read()[-3000:]
        time.sleep(0.005)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (victim,) = [pid for pid in children if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    os.kill(int(victim), signal.SIGKILL)
    assert "SIGKILL" in launcher.communicate(timeout=300)[1] and launcher.returncode != 0


def test_one_of_two_processes_killed_while_sampling_loses_only_what_it_had_in_hand(world, collected, tmp_path):
    """The re-run is made by one process: who samples a batch makes no difference."""
    run = tmp_path / "run"
    # rank 0: it has another batch to sample; rank 1 may be done before the signal reaches it
    kill_rank(world, run, 0, "rollouts/round_0/batch_000000.safetensors", phase="collect")
    assert not (run / "questions/mmcot_finished_signal.txt").exists()
    there = {path.name: path.stat().st_mtime_ns for path in run.glob("rollouts/round_0/batch_*")}
    launch(world, run, phase="collect")
    left, right = rollouts.RolloutStore(run, 0).load(), rollouts.RolloutStore(collected, 0).load()
    assert there and all((run / "rollouts/round_0" / name).stat().st_mtime_ns == when for name, when in there.items())
    assert left.keys() == right.keys() and torch.equal(left.tokens, right.tokens)
    torch.testing.assert_close(left.logprobs, right.logprobs, atol=1e-5, rtol=1e-5)


def test_one_of_two_processes_killed_in_ppo_and_again_gives_the_same_weights(world, collected, two_machines, tmp_path):
    run, (two, _) = tmp_path / "run", two_machines
    shutil.copytree(collected, run)
    how = THREE_UPDATES | {"ga_step": 1, "save_minutes": 0}
    kill_rank(world, run, 1, "state/slot_*.pth", **how)
    assert not (run / "0").exists() and list(run.glob("state/slot_*.pth"))
    done = run_script("run_mm_cot_rl.py", *flags(world, run, **how), nproc=2, env=environment())
    assert "going on with PPO at epoch 1, update" in done.stdout
    a, b = weights(two / "0"), weights(run / "0")
    assert all(torch.equal(a[name], b[name]) for name in a), "bit-equal: two terms have one sum"
    assert metrics_of(two, "update") == metrics_of(run, "update")


def test_a_world_smaller_than_asked_for_says_so(world, tmp_path):
    """On CPU `accelerate launch --num_processes 2` starts one process without a word."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2",
        "run_mm_cot_rl.py", *flags(world, tmp_path / "run", phase="train"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert "--phase collect first" in done.stderr  # it ends where there are no rollouts
    assert "accelerate launch was asked for 2 processes, but 1 run(s)" in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr and "1 process(es) on cpu" in done.stdout


def test_nothing_is_said_of_other_launchers():
    assert sharding.asked_processes() is None


@pytest.mark.parametrize("config", ["ddp.yaml", "ddp_two_machines.yaml", "fsdp.yaml"])
def test_configs_are_ones_that_accelerate_reads(config):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(ROOT / "configs" / config))
    assert loaded.num_processes >= 1 and loaded.distributed_type is not None


@pytest.fixture
def fresh_accelerator():
    """Precision is a property of the process: the launches of a test in this process may differ in it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_rloo_and_memory_flags_run_end_to_end_without_a_value_function(world, tmp_path, fresh_accelerator):
    """bf16, checkpointing and offload together; no value function is loaded, saved or asked for to go on."""
    run = tmp_path / "run"
    how = {"algo": "rloo", "precision": "bf16", "gradient_checkpointing": "", "offload": "", "rl_epochs": 1}
    launch(world, run, **how, phase="collect")
    rl_tools.answer(run / "questions")
    launch(world, run, **how, phase="train")
    assert not (run / "0/value_function.pth").exists()
    lines = metrics_of(run, "update")
    wanted = [name for name in DIAGNOSTICS if name not in ("value_loss", "explained_variance")]
    for line in lines:
        assert all(math.isfinite(line[name]) for name in wanted) and "value_loss" not in line
    saved = torch.load(run / "0/optimizer_state.pth", weights_only=True)
    assert all(name.startswith("policy.") for name in saved["names"])
    teacher = rl_tools.Teacher(run / "questions")
    launch(world, run, **how, base_model_dir=run / "0", continue_train=True, run_dir=None, ref_model=None)
    teacher.join(5)
    assert (run / "1/model.safetensors").exists()
