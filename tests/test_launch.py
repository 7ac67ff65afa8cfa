"""How the training scripts are started: by job launchers, twice in one folder, in a precision, ended with Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest

import main as sft_script
import run_mm_cot_lora as lora_script
import run_mm_cot_rl as rl_script
from ares import launch
from ares.cli import UserError
from tests import rl_tools
from tests.conftest import one_line_error, run_script
from tests.test_rl import flags as rl_flags_of
from tests.test_sft import one_thread  # noqa: F401
from tests.tiny import make_data, make_model

SCRIPTS = {"main.py": sft_script, "run_mm_cot_lora.py": lora_script, "run_mm_cot_rl.py": rl_script}


@pytest.fixture(scope="module")
def world(tmp_path_factory, sample, t5_tokenizer, t5_tokenizer_dir):
    """SFT's and LoRA's data and model (`root`, `tuned`), RL's (`data`, `base`)."""
    tmp = tmp_path_factory.mktemp("launch")
    root = make_data(tmp / "sft", sample, train=8)
    tuned = make_model(tmp / "tuned", patch_size=(5, 8))
    t5_tokenizer.save_pretrained(tuned)
    data = rl_tools.make_data(tmp, sample, 7)
    base = rl_tools.make_model(tmp / "base", data, t5_tokenizer)
    return SimpleNamespace(tmp=tmp, root=root, tuned=tuned, data=data, base=base, tokenizer=t5_tokenizer_dir)


def sft_flags(world, **changes) -> list[str]:
    chosen = {
        "data_root": world.root, "img_type": "vit", "model": world.tuned, "bs": 4, "eval_bs": 4, "lr": 0.003,
        "input_len": 48, "output_len": 8, "epoch": 1, "final_eval": "",
    } | changes  # fmt: skip
    words = [(f"--{key}", str(value)) for key, value in chosen.items() if value is not None]
    return [word for pair in words for word in pair if word]


# -- job launchers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"},
        {"SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "3", "PMI_RANK": "0"},
        {"MV2_COMM_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "SLURM_NTASKS": "4"},
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_tasks_that_would_all_be_rank_0_are_refused(script, environment, world, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    argv = ["--base_model_dir", str(world.base)] if "rl" in script else ["--model", str(world.tuned)]
    with pytest.raises(UserError, match=f"torchrun .*{script}") as refusal:
        SCRIPTS[script].main(argv)
    assert next(iter(environment)) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "4", "WORLD_SIZE": "4", "RANK": "3"},
        {"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0"},
        {"SLURM_NTASKS": "4(x2)"},
        {"PMI_SIZE": "1"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_one_process_and_launched_ones_are_not_refused(environment):
    launch.check_processes("main.py", environment)


def test_a_job_launchers_task_ends_in_one_line(world):
    done = run_script(
        "main.py", *sft_flags(world, run_dir=world.tmp / "srun"), check=False, env={"SLURM_NTASKS": "2"}, timeout=120
    )
    one_line_error(done, "SLURM_NTASKS", "torchrun --nproc_per_node 2 main.py")
    assert not (world.tmp / "srun").exists()


def test_one_process_says_that_it_uses_one_gpu(capsys, monkeypatch):
    launch.note_unused_gpus(4, "run_mm_cot_rl.py")
    assert "4 GPUs are visible" in (said := capsys.readouterr().out) and "--num_processes 4 run_mm_cot_rl.py" in said
    launch.note_unused_gpus(1, "main.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.note_unused_gpus(4, "main.py")
    assert capsys.readouterr().out == ""


# -- two launches in one folder --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["main.py", "--evaluate_dir", "run_mm_cot_lora.py", "run_mm_cot_rl.py"])
def test_a_second_launch_in_one_folder_is_refused(stage, world, tmp_path):
    """It ends before it changes a byte, says who is running, and works once that has ended."""
    folder = tmp_path / "run"
    if stage == "main.py":
        script, argv = sft_script, sft_flags(world, run_dir=folder)
    elif stage == "run_mm_cot_lora.py":
        script, argv = lora_script, sft_flags(world, run_dir=folder, lora_r=2, correction=False)
    elif stage == "--evaluate_dir":
        shutil.copytree(world.tuned, folder)
        script, argv = sft_script, sft_flags(world, evaluate_dir=folder, epoch=None, final_eval=None)
    else:
        script, argv = rl_script, rl_flags_of(world, folder, phase="collect")
    folder.mkdir(exist_ok=True)
    (folder / ".tmp-1-1").write_text("the first launch is writing this")
    with launch.only_one(folder / launch.LOCK, "test"):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(UserError, match=rf"{folder}.*process {os.getpid()} on .*wait for it"):
            script.main(argv)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    script.main(argv)
    assert len(list(folder.rglob("*"))) > len(before)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_second_launch_of_rl_beside_a_real_one(world, tmp_path, nproc):
    import signal
    import subprocess
    import sys
    import time

    from tests.conftest import ROOT

    folder = tmp_path / "run"
    argv = rl_flags_of(world, folder, rl_epochs=1)
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, "run_mm_cot_rl.py", *argv], cwd=ROOT, env=env,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    try:
        while not (folder / "rollouts/round_0/collected.json").exists():
            assert first.poll() is None, first.stdout.read()[-3000:]
            time.sleep(0.1)
        second = run_script("run_mm_cot_rl.py", *argv, nproc=nproc, check=False, env=env, timeout=120)
        lines = [line for line in second.stderr.splitlines() if "error:" in line and "run_mm_cot_rl.py" in line]
        assert second.returncode != 0 and len(lines) == 1 and f"process {first.pid}" in lines[0], second.stderr[-3000:]
        if nproc == 1:
            one_line_error(second, str(folder))
        rl_tools.answer(folder / "questions")
        said = first.communicate(timeout=300)[0]
        assert first.returncode == 0, said[-3000:]
    finally:
        if first.poll() is None:
            first.send_signal(signal.SIGKILL)
    updates = [json.loads(line)["update"] for line in (folder / "metrics.jsonl").read_text().splitlines()
               if '"update"' in line and json.loads(line)["kind"] == "update"]  # fmt: skip
    assert updates == sorted(set(updates))


# -- precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configured", ["fp16", "fp8", "bf8"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_precision_that_t5_overflows_in_is_refused(script, configured, world, monkeypatch):
    """Whatever --precision says: `accelerate config` wrote it, and the user should know."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    argv = ["--base_model_dir", str(world.base)] if "rl" in script else ["--model", str(world.tuned)]
    for precision in ("auto", "fp32", "bf16"):
        with pytest.raises(UserError, match=f"asks for {configured}.*--precision"):
            SCRIPTS[script].parse_args([*argv, "--precision", precision])


@pytest.mark.parametrize("configured", ["no", "bf16"])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("script", ["main.py", "run_mm_cot_lora.py", "run_mm_cot_rl.py"])
def test_precision_decides_and_args_yaml_says_what_ran(
    script, precision, configured, world, tmp_path, monkeypatch, capsys
):
    """Asked of the passes themselves: what they are autocast to."""
    import torch
    import yaml
    from accelerate.state import AcceleratorState

    import model

    seen = []
    forward = model.MultimodalEncoder.forward

    def watched(self, *args, **kwargs):
        if self.training or "rl" in script:
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model.MultimodalEncoder, "forward", watched)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    folder = tmp_path / "run"
    if "rl" in script:
        argv = rl_flags_of(world, folder, phase="collect", precision=precision)
    else:
        argv = sft_flags(world, run_dir=folder, precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process otherwise
    try:
        SCRIPTS[script].main(argv)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    wanted = configured.replace("no", "fp32") if precision == "auto" else precision
    assert yaml.safe_load((folder / "args.yaml").read_text())["precision"] == wanted
    assert set(seen) == {torch.bfloat16 if wanted == "bf16" else torch.float32}
    if "rl" in script:
        assert f"on cpu, {wanted}" in capsys.readouterr().out
