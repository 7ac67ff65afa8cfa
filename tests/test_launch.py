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
from tests.conftest import one_line_error, run_script
from tests.rl import rl_tools
from tests.rl.rl_tools import flags as rl_flags_of
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
    assert set(folder.rglob("*")) - before.keys() and not (folder / launch.LOCK).exists()


def test_the_lock_ends_with_its_holder_however_it_ends(tmp_path):
    """A killed holder's file locks nobody out, one that ends removes it, and of many that try at once one has it."""
    import subprocess
    import sys
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / launch.LOCK
    code = f"import os\nfrom ares import launch\nheld = launch.only_one({str(path)!r}, 'x')\nheld.__enter__()\n"
    from tests.conftest import ROOT

    done = subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), 9)"], cwd=ROOT)
    assert done.returncode == -9 and path.exists()
    inside, most = [], []

    def work(i):
        try:
            with launch.only_one(path, "x"):
                inside.append(i)
                most.append(len(inside))
                inside.remove(i)
                return 1
        except UserError:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(400))) >= 1
    assert max(most) == 1 and not path.exists()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"), launch.only_one(path, "x"):
        pass
    assert not (tmp_path / "elsewhere").exists()


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


# -- data that changed since -----------------------------------------------------------------------------


def change_features(data, qid: str | None = None) -> None:
    """Other numbers, same shape: of all images, or of one question's last patch alone."""
    import numpy as np

    path = data / "vision_features/vit.npy"
    array = np.load(path)
    if qid is None:
        array = array[::-1] * 0.5
    else:
        array[json.loads((data / "vision_features/name_map.json").read_text())[qid], -1, -1] += 1
    np.save(path, array)


def change_name_map(data) -> None:
    path = data / "vision_features/name_map.json"
    told = json.loads(path.read_text())
    first, second = list(told)[:2]
    path.write_text(json.dumps({**told, first: told[second], second: told[first]}))


def train_pictured(data) -> str:
    splits = json.loads((data / "scienceqa/pid_splits.json").read_text())
    name_map = json.loads((data / "vision_features/name_map.json").read_text())
    return next(qid for qid in splits["train"] if qid in name_map)


CHANGES = {
    "features": lambda data: change_features(data),
    "one number": lambda data: change_features(data, train_pictured(data)),
    "name map": change_name_map,
}


def forget_fingerprints(folder) -> None:
    """What the version before this one left."""
    import yaml

    if (folder / "args.yaml").exists():
        told = yaml.safe_load((folder / "args.yaml").read_text())
        known = {key: value for key, value in told.items()
                 if key not in ("train_features", "eval_features", "tokenizer_pieces", "features")}  # fmt: skip
        assert len(known) < len(told)
        (folder / "args.yaml").write_text(yaml.safe_dump(known))
    for path in [*folder.glob("predictions_ans_*.json"), *folder.glob("rollouts/*/flags_sampling.json")]:
        told = json.loads(path.read_text())
        part = told.get("settings", told)
        for key in ("features", "tokenizer", "tokenizer_pieces"):
            if part is not told or key != "tokenizer":
                part.pop(key, None)
        path.write_text(json.dumps(told))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stage", ["main.py", "run_mm_cot_lora.py", "run_mm_cot_rl.py"])
def test_changed_features_are_not_the_same_run(stage, change, world, tmp_path, capsys):
    folder, data = tmp_path / "run", tmp_path / "data"
    if "rl" in stage:
        shutil.copytree(world.data, data)
        argv = rl_flags_of(world, folder, phase="collect", data_root=data)
    else:
        shutil.copytree(world.root, data)
        argv = sft_flags(world, run_dir=folder, data_root=data)
    main = SCRIPTS[stage].main
    main(argv)
    main(argv)  # nothing changed: goes on
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    main([*argv, "--data_root", str(moved)])  # nor does moving change anything
    CHANGES[change](data)
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


@pytest.mark.parametrize("change", CHANGES)
def test_predictions_of_changed_features_are_made_anew(change, world, tmp_path, capsys):
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(world.root, data)
    shutil.copytree(world.tuned, folder)
    argv = sft_flags(world, evaluate_dir=folder, data_root=data, epoch=None, final_eval=None)
    splits = json.loads((data / "scienceqa/pid_splits.json").read_text())
    name_map = json.loads((data / "vision_features/name_map.json").read_text())
    tested = [qid for qid in splits["test"] if qid in name_map]
    sft_script.main(argv)
    capsys.readouterr()
    sft_script.main(argv)
    assert "already there" in capsys.readouterr().out
    forget_fingerprints(folder)
    sft_script.main(argv)
    assert "already there" in capsys.readouterr().out
    sft_script.main([*argv, "--overwrite"])
    if change == "one number":
        change_features(data, tested[-1])
    elif change == "name map":  # of two questions that are asked
        told = {**name_map, tested[0]: name_map[tested[1]], tested[1]: name_map[tested[0]]}
        (data / "vision_features/name_map.json").write_text(json.dumps(told))
    else:
        change_features(data)
    capsys.readouterr()
    sft_script.main(argv)
    assert "already there" not in capsys.readouterr().out


def test_another_tokenizer_is_not_the_same_run(world, tmp_path):
    """Equal ids of the prompts, other pieces: what is written means something else."""
    folder, other = tmp_path / "run", tmp_path / "tokenizer"
    argv = sft_flags(world, run_dir=folder, tokenizer=world.tokenizer)
    sft_script.main(argv)
    shutil.copytree(world.tokenizer, other)
    told = json.loads((other / "tokenizer.json").read_text())
    told["model"]["vocab"][31000][0] += "x"  # a piece that no prompt has
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="--tokenizer"):
        sft_script.main([*argv, "--tokenizer", str(other)])


def test_big_features_are_sampled_at_every_row(tmp_path, monkeypatch):
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from vision import features

    monkeypatch.setattr(features, "WHOLE", 0)
    array = np.random.default_rng(0).standard_normal((9, 5, 8)).astype("float32")
    (tmp_path / "vit.json").write_text(json.dumps({"shape": [5, 8]}))
    qids = [str(i) for i in range(10)]  # the last one has no image
    name_map = {qid: row for row, qid in enumerate(qids[:9])}

    def digest(values, map_=name_map, form="npy", order=qids):
        path = tmp_path / f"vit.{form}"
        if form == "npy":
            np.save(path, values)
        elif form == "pth":
            torch.save(torch.from_numpy(values), path)
        else:
            save_file({"x": torch.from_numpy(values)}, path)
        return features.VisionFeatures(path, map_, "vit").digest(order)

    first = digest(array)
    assert digest(array, form="pth") == digest(array, form="safetensors") == first
    turned = {qid: 8 - row for qid, row in name_map.items()}
    assert digest(array[::-1].copy(), turned) == first  # rows in another order, mapped so
    for row in range(9):
        changed = array.copy()
        changed[row] += 1
        assert digest(changed) != first
    assert digest(array, {**name_map, "9": 0}) != first and digest(array, {"0": 0}) != first


# -- Ctrl-C, what comes next, help -----------------------------------------------------------------------


def start(script: str, argv: list[str], nproc: int = 1):
    import subprocess
    import sys

    from tests.conftest import ROOT, _free_port

    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(nproc), "--master_port", str(_free_port())]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *(launcher if nproc > 1 else []), script, *argv], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)  # fmt: skip


def press_ctrl_c(process, until) -> tuple[str, str]:
    """SIGINT to the whole group, as a terminal sends it, once `until()`; a lone process gets a second one at once, as
    torchrun sends its processes."""
    import signal
    import time

    while not until():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    if process.poll() is None and "torch.distributed.run" not in process.args:
        os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=120)


@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_saves_sft(world, tmp_path, nproc):
    folder = tmp_path / "run"
    argv = sft_flags(world, run_dir=folder, epoch=4000, bs=1, lr=1e-4)
    process = start("main.py", argv, nproc)
    said, err = press_ctrl_c(
        process, lambda: (folder / "args.yaml").exists() and list(folder.glob("checkpoint-*/complete"))
    )
    assert "stopped (Ctrl-C): training is saved at step" in err, err[-3000:]
    assert 'main.py", line' not in err and err.count("stopped (Ctrl-C)") == 1
    if nproc == 1:
        assert process.returncode == 130 and "Traceback" not in err
    step = int(err.partition("saved at step ")[2].split()[0])
    assert (folder / f"checkpoint-{step}/complete").exists() and not (folder / "metrics.json").exists()


@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_saves_ppo(world, tmp_path, nproc):
    folder = tmp_path / "run"
    argv = rl_flags_of(world, folder, rl_epochs=4000, lr=1e-5)
    rl_tools.Teacher(folder / "questions")
    process = start("run_mm_cot_rl.py", argv, nproc)
    said, err = press_ctrl_c(process, lambda: list((folder / "state").glob("slot_*")))
    assert "stopped (Ctrl-C): PPO is saved after update" in err, err[-3000:]
    assert 'run_mm_cot_rl.py", line' not in err
    if nproc == 1:
        assert process.returncode == 130 and "Traceback" not in err
        import torch

        done = int(err.partition("after update ")[2].split()[0])
        saved = [torch.load(slot, weights_only=True)["position"]["done"] for slot in folder.glob("state/slot_*")]
        assert max(saved) == done
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["update"] == done


@pytest.mark.parametrize("phase", ["sampling", "waiting", "predicting"])
def test_ctrl_c_elsewhere_says_that_the_same_command_goes_on(phase, world, tmp_path):
    folder = tmp_path / "run"
    if phase == "predicting":
        shutil.copytree(world.tuned, folder)
        argv = sft_flags(world, evaluate_dir=folder, epoch=None, final_eval=None, eval_bs=1, use_generate="",
                         prompt_format="QCM-E", output_len=200)  # fmt: skip
        process = start("main.py", argv)
        until = lambda: list(folder.glob(".predicting_*/rows*"))  # noqa: E731
    else:
        process = start("run_mm_cot_rl.py", rl_flags_of(world, folder, bs=1, poll_seconds=30))
        file = "rollouts/round_0/batch_*" if phase == "sampling" else "rollouts/round_0/collected.json"
        until = lambda: list(folder.glob(file))  # noqa: E731
    said, err = press_ctrl_c(process, until)
    assert process.returncode == 130 and "Traceback" not in err, err[-3000:]
    assert err.count("stopped (Ctrl-C)") == 1 and "run the same command again" in err


def test_every_stage_ends_with_the_next_command(world, tmp_path, capsys):
    import shlex

    def next_command() -> list[str]:
        out = capsys.readouterr().out
        assert out.count("next:\n") == 1
        return shlex.split(out.partition("next:\n")[2].splitlines()[0])

    run = tmp_path / "rl"
    rl_tools.Teacher(run / "questions")
    rl_script.main(rl_flags_of(world, run, rl_epochs=1))
    words = next_command()
    assert words[:3] == ["accelerate", "launch", "main.py"] and words[-2:] == ["--evaluate_dir", str(run / "0")]
    sft_script.main(words[3:])
    words = next_command()
    assert words[:2] == ["python", "preprocessing_after_RL/remove_sentence.py"]
    run_script(*words[1:])
    sft = tmp_path / "sft"
    sft_script.main(sft_flags(world, run_dir=sft, prompt_format="QCM-E", use_caption=None))
    words = next_command()
    assert words[:3] == ["accelerate", "launch", "run_mm_cot_lora.py"]
    args = lora_script.parse_args(words[3:])
    assert (args.model, args.prompt_format, args.img_type) == (str(sft), "QCM-A", "vit")
    lora_script.main([*words[3:], "--epoch", "1", "--input_len", "48", "--output_len", "8"])
    words = next_command()
    assert words[:2] == ["python", "tools/results.py"]
    run_script(*words[1:])


def test_qcm_a_and_qcmg_a_have_a_folder_each(tmp_path, world):
    model = tmp_path / "model"
    shutil.copytree(world.tuned, model)
    names = {fmt: lora_script.run_name(lora_script.parse_args(["--model", str(model), "--prompt_format", fmt]))
             for fmt in ("QCM-A", "QCMG-A", "QCM-LEA")}  # fmt: skip
    assert len(set(names.values())) == 3 and names["QCMG-A"] == names["QCM-A"] + "_QCMG-A"
    # one that an earlier version began goes on where it is
    (model / names["QCM-A"]).mkdir()
    (model / names["QCM-A"] / "args.yaml").write_text("output_len: 64\nprompt_format: QCMG-A\nseed: 42\n")
    args = lora_script.parse_args(["--model", str(model), "--prompt_format", "QCMG-A"])
    assert lora_script.run_name(args) == names["QCM-A"]


def scripts_with_flags() -> list[str]:
    from tests.conftest import ROOT

    found = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("preprocessing_after_RL/*.py")]
             if "ArgumentParser(" in path.read_text() and "__main__" in path.read_text()]  # fmt: skip
    return sorted(str(path.relative_to(ROOT)) for path in found)


@pytest.mark.parametrize("script", scripts_with_flags())
def test_help_shows_every_default(script, monkeypatch):
    """Asked of the parser that the script makes: no default that means something is missing from its help."""
    import argparse
    import importlib.util
    import sys

    from tests.conftest import ROOT

    made = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a, **k: made.append(self) or sys.exit(0))
    spec = importlib.util.spec_from_file_location("script_under_test", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        (getattr(module, "parse_args", None) or module.main)([])
    (parser,) = made[:1]
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        if (
            action.option_strings
            and action.default not in (None, False, "", [], (), argparse.SUPPRESS)
            and action.nargs != 0
        ):
            name = action.option_strings[-1]
            shown = parser.formatter_class("x", width=10_000)._get_help_string(action)
            assert "default" in shown, name
    assert "%(" not in text


@pytest.mark.parametrize(
    "path",
    ["experiments/r/model.safetensors", "RL_models/r/0/config.json", "win_rate/A_vs_B/win_rate.json", "report.html",
     "report_images/1.png", "vision_features/vit.npy", "aokvqa_data/aokvqa/problems.json", "instruct_captions.json",
     "x/.lock", "demo_run/x", "preprocessing_after_RL/0/p0/1/score.txt", "wandb/x", "data/captions.json"],
)  # fmt: skip
def test_what_scripts_write_is_ignored_by_git(path):
    import subprocess

    from tests.conftest import ROOT

    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0
