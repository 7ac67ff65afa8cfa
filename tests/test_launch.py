"""How the training scripts are started: by job launchers, twice in one folder, in a precision, ended with Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

import main as sft_script
import model
import run_mm_cot_lora as lora_script
import run_mm_cot_rl as rl_script
from ares import launch
from ares.cli import UserError
from tests.conftest import ROOT, _free_port, one_line_error, run_script
from tests.rl import rl_tools
from tests.rl.rl_tools import flags as rl_flags_of

SCRIPTS = {"main.py": sft_script, "run_mm_cot_lora.py": lora_script, "run_mm_cot_rl.py": rl_script}


@pytest.fixture(scope="module")
def world(tmp_path_factory, ready, sample, t5_tokenizer, t5_tokenizer_dir):
    """SFT's and LoRA's data and model (`root`, `tuned`), RL's (`data`, `base`)."""
    tmp = tmp_path_factory.mktemp("launch")
    data = rl_tools.make_data(tmp, sample, 7)
    base = rl_tools.make_model(tmp / "base", data, t5_tokenizer)
    tuned, tokenizer = ready / "model", t5_tokenizer_dir
    return SimpleNamespace(tmp=tmp, root=ready / "data", tuned=tuned, data=data, base=base, tokenizer=tokenizer)


def sft_flags(world, **changes) -> list[str]:
    chosen = {
        "data_root": world.root, "img_type": "vit", "model": world.tuned, "bs": 4, "eval_bs": 4, "lr": 0.003,
        "input_len": 48, "output_len": 8, "epoch": 1, "final_eval": "",
    } | changes  # fmt: skip
    words = [(f"--{key}", str(value)) for key, value in chosen.items() if value is not None]
    return [word for pair in words for word in pair if word]


# -- job launchers ---------------------------------------------------------------------------------------


NOT_LAUNCHED = [
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"},
    {"SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    *({"PMI_SIZE": "3", "PMI_RANK": "0"}, {"MV2_COMM_WORLD_SIZE": "2"}),
    *({"WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "SLURM_NTASKS": "4"}),
]


LAUNCHED = [
    *({}, {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "4(x2)"}, {"PMI_SIZE": "1"}, {"WORLD_SIZE": "1"}),
    {"SLURM_NTASKS": "4", "WORLD_SIZE": "4", "RANK": "3"},
    {"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0"},
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_tasks_that_would_all_be_rank_0_are_refused(script, world, monkeypatch):
    for environment in NOT_LAUNCHED:
        with monkeypatch.context() as patched:
            for name in ("RANK", "WORLD_SIZE"):
                patched.delenv(name, raising=False)
            for name, value in environment.items():
                patched.setenv(name, value)
            with pytest.raises(UserError, match=f"torchrun .*{script}") as refusal:
                SCRIPTS[script].main(model_flag(world, script))
            assert next(iter(environment)) in str(refusal.value) and "\n" not in str(refusal.value)
    for environment in LAUNCHED:
        launch.check_processes(script, environment)


def model_flag(world, script) -> list[str]:
    return ["--base_model_dir", str(world.base)] if "rl" in script else ["--model", str(world.tuned)]


def test_a_job_launchers_task_ends_in_one_line(world, capsys, monkeypatch):
    done = run_script(
        "main.py", *sft_flags(world, run_dir=world.tmp / "srun"), check=False, env={"SLURM_NTASKS": "2"}, timeout=120
    )
    one_line_error(done, "SLURM_NTASKS", "torchrun --nproc_per_node 2 main.py")
    assert not (world.tmp / "srun").exists()
    launch.note_unused_gpus(4, "run_mm_cot_rl.py")  # one process says that it uses one GPU
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
    if stage == "--evaluate_dir":
        shutil.copytree(world.tuned, folder)
        argv = sft_flags(world, evaluate_dir=folder, epoch=None, final_eval=None)
    elif stage == "run_mm_cot_rl.py":
        argv = rl_flags_of(world, folder, phase="collect")
    else:
        argv = sft_flags(world, run_dir=folder, **({"lora_r": 2, "correction": False} if "lora" in stage else {}))
    script = SCRIPTS.get(stage, sft_script)
    folder.mkdir(exist_ok=True)
    (folder / ".tmp-1-1").write_text("the first launch is writing this")
    with launch.only_one(folder / launch.LOCK, "test"):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(UserError, match=rf"{folder}.*process {os.getpid()} on .*wait for it"):
            script.main(argv)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    script.main(argv)
    assert set(folder.rglob("*")) - before.keys() and not (folder / launch.LOCK).exists()


def test_a_second_launch_of_rl_beside_a_real_one(world, tmp_path):
    """Of one process and of two: each ends in one line, and the first one finishes."""
    folder = tmp_path / "run"
    argv = rl_flags_of(world, folder, rl_epochs=1)
    first = start("run_mm_cot_rl.py", argv, stderr=subprocess.STDOUT)
    try:
        while not (folder / "rollouts/round_0/collected.json").exists():
            assert first.poll() is None, first.stdout.read()[-3000:]
            time.sleep(0.1)
        for nproc in (1, 2):
            second = run_script("run_mm_cot_rl.py", *argv, nproc=nproc, check=False, timeout=120)
            lines = [line for line in second.stderr.splitlines() if "error:" in line and "run_mm_cot_rl.py" in line]
            assert second.returncode != 0 and len(lines) == 1 and f"process {first.pid}" in lines[0], second.stderr
            if nproc == 1:
                one_line_error(second, str(folder))
        rl_tools.answer(folder / "questions")
        said = first.communicate(timeout=300)[0]
        assert first.returncode == 0, said[-3000:]
    finally:
        if first.poll() is None:
            first.send_signal(signal.SIGKILL)
    updates = [line["update"] for line in rl_tools.metrics_of(folder, "update")]
    assert updates and updates == sorted(set(updates))


# -- precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_precision_that_t5_overflows_in_is_refused(script, world, monkeypatch):
    """Whatever --precision says: `accelerate config` wrote it, and the user should know."""
    for configured in ("fp16", "fp8", "bf8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
        for precision in ("auto", "fp32", "bf16"):
            with pytest.raises(UserError, match=f"asks for {configured}.*--precision"):
                SCRIPTS[script].parse_args([*model_flag(world, script), "--precision", precision])


@pytest.mark.parametrize(
    ("precision", "configured", "wanted"),
    [("auto", "no", "fp32"), ("auto", "bf16", "bf16"), ("fp32", "bf16", "fp32"), ("bf16", "no", "bf16")],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_precision_decides_and_args_yaml_says_what_ran(
    script, precision, configured, wanted, world, tmp_path, monkeypatch, capsys
):
    """Asked of the passes themselves: what they are autocast to."""
    seen, folder = [], tmp_path / "run"
    forward = model.MultimodalEncoder.forward

    def watched(self, *args, **kwargs):
        if self.training or "rl" in script:
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model.MultimodalEncoder, "forward", watched)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    if "rl" in script:
        argv = rl_flags_of(world, folder, phase="collect", precision=precision)
    else:
        argv = sft_flags(world, run_dir=folder, precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process otherwise
    try:
        SCRIPTS[script].main(argv)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert yaml.safe_load((folder / "args.yaml").read_text())["precision"] == wanted
    assert set(seen) == {torch.bfloat16 if wanted == "bf16" else torch.float32}
    if "rl" in script:
        assert f"on cpu, {wanted}" in capsys.readouterr().out


def read(path):
    return json.loads(path.read_text())


# -- data that changed since -----------------------------------------------------------------------------


def change_features(data, qid: str | None = None) -> None:
    """Other numbers, same shape: of all images, or of one question's last patch alone."""
    path = data / "vision_features/vit.npy"
    array = np.load(path)
    if qid is None:
        array = array[::-1] * 0.5
    else:
        array[read(data / "vision_features/name_map.json")[qid], -1, -1] += 1
    np.save(path, array)


def swap_rows(data, qids: list[str]) -> None:
    """The name map with the rows of the first two of `qids` swapped."""
    path = data / "vision_features/name_map.json"
    rows = read(path)
    path.write_text(json.dumps({**rows, qids[0]: rows[qids[1]], qids[1]: rows[qids[0]]}))


def pictured(data, split: str) -> list[str]:
    name_map = read(data / "vision_features/name_map.json")
    return [qid for qid in read(data / "scienceqa/pid_splits.json")[split] if qid in name_map]


CHANGES = {
    "features": lambda data, qids: change_features(data),
    "one number": lambda data, qids: change_features(data, qids[-1]),
    "name map": swap_rows,
}


def forget_fingerprints(folder) -> None:
    """Write the run folder as a version before fingerprints did."""
    if (folder / "args.yaml").exists():
        args = yaml.safe_load((folder / "args.yaml").read_text())
        recorded = ("train_features", "eval_features", "tokenizer_pieces", "features")
        known = {key: value for key, value in args.items() if key not in recorded}
        assert len(known) < len(args)
        (folder / "args.yaml").write_text(yaml.safe_dump(known))
    for path in [*folder.glob("predictions_ans_*.json"), *folder.glob("rollouts/*/flags_sampling.json")]:
        data = read(path)
        part = data.get("settings", data)
        for key in ("features", "tokenizer", "tokenizer_pieces"):
            if part is not data or key != "tokenizer":
                part.pop(key, None)
        path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("stage", "change"),
    [*((stage, "one number") for stage in SCRIPTS), ("main.py", "features"), ("run_mm_cot_rl.py", "name map")],
)
def test_changed_features_are_not_the_same_run(stage, change, world, tmp_path, capsys):
    folder, data, main = tmp_path / "run", tmp_path / "data", SCRIPTS[stage].main
    shutil.copytree(world.data if "rl" in stage else world.root, data)
    if "rl" in stage:
        argv = rl_flags_of(world, folder, phase="collect", data_root=data)
    else:
        argv = sft_flags(world, run_dir=folder, data_root=data)
    main(argv)
    moved = shutil.copytree(data, tmp_path / "moved")
    main([*argv, "--data_root", str(moved)])  # neither the same command nor moved data change anything
    CHANGES[change](data, pictured(data, "train"))
    with pytest.raises(UserError, match=r"--vision_features or --name_map.*the features are not those"):
        main(argv)
    if "rl" in stage:
        rl_tools.answer(folder / "questions")
        with pytest.raises(UserError, match=r"--vision_features or --name_map"):
            main([*argv, "--phase", "train"])
    forget_fingerprints(folder)
    capsys.readouterr()
    main(argv)  # begun by a version that recorded none
    assert ("training is complete" in capsys.readouterr().out) or "rl" in stage


def test_predictions_of_changed_features_are_made_anew(world, tmp_path, capsys):
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(world.root, data)
    shutil.copytree(world.tuned, folder)
    argv = sft_flags(world, evaluate_dir=folder, data_root=data, epoch=None, final_eval=None)

    def kept(*more) -> bool:
        capsys.readouterr()
        sft_script.main([*argv, *more])
        return "already there" in capsys.readouterr().out

    assert not kept() and kept()
    forget_fingerprints(folder)
    assert kept() and not kept("--overwrite")
    for change in CHANGES.values():
        change(data, pictured(data, "test"))
        assert not kept()


def test_another_tokenizer_is_not_the_same_run(world, tmp_path):
    """Equal ids of the prompts, other pieces: what is written means something else."""
    argv = sft_flags(world, run_dir=tmp_path / "run", tokenizer=world.tokenizer)
    sft_script.main(argv)
    other = shutil.copytree(world.tokenizer, tmp_path / "tokenizer")
    data = read(other / "tokenizer.json")
    data["model"]["vocab"][31000][0] += "x"  # a piece that no prompt has
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="--tokenizer"):
        sft_script.main([*argv, "--tokenizer", str(other)])


# -- Ctrl-C, what comes next, help -----------------------------------------------------------------------


def start(script: str, argv: list[str], nproc: int = 1, stderr=subprocess.PIPE):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(nproc), "--master_port", str(_free_port())]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *(launcher if nproc > 1 else []), script, *argv], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True)  # fmt: skip


def press_ctrl_c(process, until) -> str:
    """SIGINT to the whole group, as a terminal sends it, once `until()`; a lone process gets a second one at once, as
    torchrun sends its processes. Returns stderr."""
    while not until():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    if process.poll() is None and "torch.distributed.run" not in process.args:
        os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=120)[1]


@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_saves_sft(world, tmp_path, nproc):
    folder = tmp_path / "run"
    process = start("main.py", sft_flags(world, run_dir=folder, epoch=4000, bs=1, lr=1e-4), nproc)
    err = press_ctrl_c(process, lambda: list(folder.glob("checkpoint-*/complete")))
    assert "stopped (Ctrl-C): training is saved at step" in err, err[-3000:]
    assert 'main.py", line' not in err and err.count("stopped (Ctrl-C)") == 1
    if nproc == 1:
        assert process.returncode == 130 and "Traceback" not in err
    step = int(err.partition("saved at step ")[2].split()[0])
    assert (folder / f"checkpoint-{step}/complete").exists() and not (folder / "metrics.json").exists()


@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_saves_ppo(world, tmp_path, nproc):
    folder = tmp_path / "run"
    rl_tools.Teacher(folder / "questions")
    process = start("run_mm_cot_rl.py", rl_flags_of(world, folder, rl_epochs=4000, lr=1e-5), nproc)
    err = press_ctrl_c(process, lambda: list((folder / "state").glob("slot_*")))
    assert "stopped (Ctrl-C): PPO is saved after update" in err, err[-3000:]
    assert 'run_mm_cot_rl.py", line' not in err
    if nproc == 1:
        assert process.returncode == 130 and "Traceback" not in err
        done = int(err.partition("after update ")[2].split()[0])
        saved = [torch.load(slot, weights_only=True)["position"]["done"] for slot in folder.glob("state/slot_*")]
        assert max(saved) == done
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["update"] == done


@pytest.mark.parametrize("phase", ["sampling", "waiting", "predicting"])
def test_ctrl_c_elsewhere_says_to_run_the_same_command_again(phase, world, tmp_path):
    folder = tmp_path / "run"
    if phase == "predicting":
        shutil.copytree(world.tuned, folder)
        process = start("main.py", sft_flags(world, evaluate_dir=folder, epoch=None, final_eval=None, eval_bs=1,
                                             use_generate="", prompt_format="QCM-E", output_len=200))  # fmt: skip
    else:
        process = start("run_mm_cot_rl.py", rl_flags_of(world, folder, bs=1, poll_seconds=30))
    made = {"sampling": "rollouts/round_0/batch_*", "waiting": "rollouts/round_0/collected.json"}
    err = press_ctrl_c(process, lambda: list(folder.glob(made.get(phase, ".predicting_*/rows*"))))
    assert process.returncode == 130 and "Traceback" not in err, err[-3000:]
    assert err.count("stopped (Ctrl-C)") == 1 and "run the same command again" in err


def test_every_stage_ends_with_the_next_command(world, tmp_path, capsys):
    def next_command(*start) -> list[str]:
        out = capsys.readouterr().out
        assert out.count("next:\n") == 1
        words = shlex.split(out.partition("next:\n")[2].splitlines()[0])
        assert words[: len(start)] == [*start]
        return words

    run, sft = tmp_path / "rl", tmp_path / "sft"
    rl_tools.Teacher(run / "questions")
    rl_script.main(rl_flags_of(world, run, rl_epochs=1))
    words = next_command("accelerate", "launch", "main.py")
    assert words[-2:] == ["--evaluate_dir", str(run / "0")]
    sft_script.main(words[3:])
    run_script(*next_command("python", "preprocessing_after_RL/remove_sentence.py")[1:])
    sft_script.main(sft_flags(world, run_dir=sft, prompt_format="QCM-E", use_caption=None))
    words = next_command("accelerate", "launch", "run_mm_cot_lora.py")
    args = lora_script.parse_args(words[3:])
    assert (args.model, args.prompt_format, args.img_type) == (str(sft), "QCM-A", "vit")
    lora_script.main([*words[3:], "--epoch", "1", "--input_len", "48", "--output_len", "8"])
    run_script(*next_command("python", "tools/results.py")[1:])


def test_qcm_a_and_qcmg_a_have_a_folder_each(tmp_path, world):
    model = shutil.copytree(world.tuned, tmp_path / "model")

    def name(prompt_format):
        return lora_script.run_name(lora_script.parse_args(["--model", str(model), "--prompt_format", prompt_format]))

    plain = name("QCM-A")
    assert name("QCMG-A") == plain + "_QCMG-A" and name("QCM-LEA") not in (plain, name("QCMG-A"))
    (model / plain).mkdir()  # one that an earlier version began is continued where it is
    (model / plain / "args.yaml").write_text("output_len: 64\nprompt_format: QCMG-A\nseed: 42\n")
    assert name("QCMG-A") == plain


def test_what_scripts_write_is_ignored_by_git():
    paths = (
        "experiments/r/model.safetensors RL_models/r/0/config.json win_rate/A_vs_B/win_rate.json report.html "
        "report_images/1.png vision_features/vit.npy aokvqa_data/aokvqa/problems.json instruct_captions.json "
        "x/.lock demo_run/x preprocessing_after_RL/0/p0/1/score.txt wandb/x data/captions.json"
    ).split()
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == paths
