"""RL end to end on real questions with tiny models: flags, files, equality over processes, resuming, learning signals.

Runs with one process call `main` here; those with two, and those that are killed, are real launches.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import run_mm_cot_rl
from ares import files
from ares.cli import UserError
from rl import flags as rl_flags
from rl import minibatches, ppo, rollouts, run_folder
from teacher import handoff
from tests.conftest import ROOT, one_line_error, run_script
from tests.rl import rl_tools
from tests.rl.rl_tools import (
    DIAGNOSTICS,
    ROUND_FILES,
    flags,
    launch,
    metrics_of,
    optimizer_of,
    random_rollouts,
    weights,
    weights_of_base,
)

QUESTIONS = 7  # k = 2 gives 14 rationales: no multiple of any step below
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
ENVIRONMENT = {**os.environ, **ONE_THREAD, "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def world(rl_world):
    return rl_world


@pytest.fixture(scope="module")
def collected(world):
    """A run folder after `--phase collect` in one process, answered."""
    run = world.tmp / "collected"
    launch(world, run, phase="collect")
    rl_tools.answer(run / "questions")
    return run


def copy(collected: Path, to: Path) -> Path:
    shutil.copytree(collected, to)  # copies modification times: the signals stay younger than the export
    return to


# -- flags -----------------------------------------------------------------------------------------------

BASE_COMMAND = (
    "--k_actions 4 --bs 64 --output_len 512 --rl_batch_size 8 --init_kl_coef 0.0001 --top_k 50 --rl_epochs 10 "
    "--lr 2e-5 --clip_range 0.2 --epochs 1 --ga_step 8 --gamma 1.0 --adv_normalization True --do_sample True "
    "--continue_train False"
).split()
LARGE_CHANGES = (
    "--model_type large --bs 32 --rl_batch_size 2 --rl_epochs 5 --ga_step 16 --adv_normalization False".split()
)


def test_folder_names_of_the_users_commands(tmp_path):
    models = ["--base_model_dir", str(tmp_path), "--ref_model", str(tmp_path)]
    args = run_mm_cot_rl.parse_args([*BASE_COMMAND, *models])
    assert str(run_folder.run_folder(args)) == (
        "RL_models/base_neutral0.5_k4_rlb8_cl0.2_rle10_lr2e-05_vlr1.0_g1.0_l0.95_fGPT4V_seed42_kl0.0001_ga8"
        "_dosampleTrue_advTrue_tk50_ref"
    )
    args = run_mm_cot_rl.parse_args([*BASE_COMMAND, *LARGE_CHANGES, *models[:2]])
    assert run_folder.run_name(args) == (
        "large_neutral0.5_k4_rlb2_cl0.2_rle5_lr2e-05_vlr1.0_g1.0_l0.95_fGPT4V_seed42_kl0.0001_ga16"
        "_dosampleTrue_advFalse_tk50_no_ref"
    )
    args = run_mm_cot_rl.parse_args([*BASE_COMMAND, *models, "--feedback", "x" * 300])
    assert len(run_folder.run_name(args).encode()) <= 255


def test_defaults_are_the_released_ones(tmp_path):
    args = run_mm_cot_rl.parse_args(["--base_model_dir", str(tmp_path)])
    released = {
        "output_len": 512, "lr": 1e-5, "model_type": "base", "k_actions": 3, "rl_batch_size": 6, "rl_epochs": 3,
        "epochs": 3, "ga_step": 4, "init_kl_coef": 0.05, "clip_range": 0.2, "vf_coef": 1.0, "gamma": 0.99,
        "gae_lambda": 0.95, "adv_normalization": True, "neutral_score": 0.5, "do_sample": False, "top_k": 20,
        "top_p": 1.0, "algo": "ppo", "feedback": "GPT4V", "log_term": 200, "continue_train": False, "bs": 16,
        "seed": 42, "train_split": "train", "prompt_format": "QCM-A", "input_len": 512, "ref_model": None,
    }  # fmt: skip
    assert {key: getattr(args, key) for key in released} == released


def test_the_flag_table_has_every_flag_of_the_parser_once(tmp_path):
    args = vars(run_mm_cot_rl.parse_args(["--base_model_dir", str(tmp_path)]))
    assert sorted(flag.name for flag in rl_flags.FLAGS) == sorted(args)


OTHER_VALUES = {
    "rollouts": dict(
        use_caption=True, img_type="vit", train_split="minitrain", train_le="x", options=["A"], prompt_format="QCM-E",
        input_len=9, output_len=9, bs=9, seed=9, k_actions=9, do_sample=True, top_k=9, top_p=0.9, algo="rloo",
        value_init="zero",
    ),
    "updates": dict(
        lr=9.0, seed=9, rl_batch_size=9, rl_epochs=9, ga_step=9, init_kl_coef=0.9, clip_range=0.9, vf_coef=0.9,
        gamma=0.9, gae_lambda=0.9, adv_normalization=False, neutral_score=0.9, max_grad_norm=9.0,
        lr_scheduler="linear", target_kl=9.0, early_stop_kl=9.0, entropy_coef=0.9, vf_clip_range=0.9, precision="bf16",
        rloo_baseline="sentence", group_by_question=True, value_warmup=9, value_init="zero", vf_lr=9.0, adam_eps=9.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER_VALUES)
def test_a_changed_flag_is_refused_where_rollouts_or_updates_depend_on_it(what, tmp_path):
    args = run_mm_cot_rl.parse_args(["--base_model_dir", str(tmp_path)])
    args.reference, args.precision = str(tmp_path), "fp32"  # as `set_up` resolves them

    def identity():
        return run_folder.ppo_identity(args) if what == "updates" else run_folder.sampling_identity(args, tmp_path, 0)

    files.write_json(tmp_path / "known.json", identity())
    run_folder.refuse_changes(tmp_path / "known.json", identity())
    for name, value in OTHER_VALUES[what].items():
        before = getattr(args, name)
        setattr(args, name, value)
        with pytest.raises(UserError, match=f"--{name} was"):
            run_folder.refuse_changes(tmp_path / "known.json", identity())
        setattr(args, name, before)
    models = {"base_model_dir", "ref_model", *run_folder.CONTENTS} if what == "rollouts" else set()
    assert identity().keys() == OTHER_VALUES[what].keys() | models


def test_bad_flags_are_refused_together(tmp_path):
    with pytest.raises(UserError) as refusal:
        run_mm_cot_rl.parse_args(
            "--base_model_dir nowhere --ref_model nowhere2 --final_eval --eval_le x.json --k_actions 0 --lr nan "
            "--gamma 2 --top_p 0 --overwrite --phase train --train_le x.json --seed 9223372036854775808 "
            "--pass_tokens 0".split()
        )
    words = "base_model_dir nowhere2 final_eval eval_le k_actions lr gamma top_p overwrite train_le QCMG seed "
    words += "pass_tokens"
    for word in words.split():
        assert word in str(refusal.value), word
    with pytest.raises(UserError, match="no folder {run}"):
        run_mm_cot_rl.parse_args(["--base_model_dir", str(tmp_path), "--continue_train", "yes"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_dir": "gone"}, ["--base_model_dir", "gone"]),
        ({"img_type": None}, ["--base_model_dir", "img_type"]),
        ({"img_type": "detr"}, ["vision_features", "detr"]),
        ({"caption_file": "gone.json"}, ["--caption_file", "gone.json"]),
        ({"train_split": "hardtrain"}, ["hardtrain"]),
        ({"run_dir": "/proc/no"}, ["--run_dir", "/proc/no"]),
        ({"phase": "train"}, ["--phase train", "collect"]),
    ],
)
def test_bad_input_ends_with_one_line(world, tmp_path, changes, words):
    with pytest.raises(UserError) as refusal:
        launch(world, tmp_path / "run", **changes)
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)


def test_a_folder_without_weights_exits_with_two(world, tmp_path):
    shutil.copytree(world.base, tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    done = run_script(
        "run_mm_cot_rl.py", *flags(world, tmp_path / "run", base_model_dir=tmp_path / "base"), check=False
    )
    one_line_error(done, "--base_model_dir", "no weights")
    assert not (tmp_path / "run").exists()


# -- the whole path --------------------------------------------------------------------------------------


def test_two_processes_then_a_second_round(world, collected, tmp_path):
    """Waits for a Teacher; the same command again does nothing; --continue_train goes on, two replies lost."""
    run = tmp_path / "run"
    teacher = rl_tools.Teacher(run / "questions")
    done = run_script("run_mm_cot_rl.py", *flags(world, run, report_to=None), nproc=2, env=ONE_THREAD)
    said = done.stdout.splitlines()
    assert said.index("Rationale Finished") < said.index("Waiting for the feedback")
    assert "2 process(es) on cpu" in done.stdout
    assert {path.name for path in run.iterdir()} == {
        "0", "args.yaml", "metrics.jsonl", "questions_round0", "rollouts", "samples_round_0.jsonl", "tensorboard"
    }  # fmt: skip
    assert {path.name for path in (run / "0").iterdir()} - {"special_tokens_map.json"} == ROUND_FILES
    items = handoff.iter_items(run / "questions_round0")
    assert {item.rank for item in items} == {0, 1} and {item.action for item in items} == {0, 1}
    assert sum(len((item.folder / handoff.SCORES).read_text().split()) for item in items) == teacher.sentences > 10

    # who samples a batch makes no difference
    one, two = rollouts.RolloutStore(collected, 0).load(), rollouts.RolloutStore(run, 0).load()
    assert one.keys() == two.keys() and torch.equal(one.tokens, two.tokens)
    torch.testing.assert_close(one.logprobs, two.logprobs, atol=1e-5, rtol=1e-5)
    assert set(one.rank) == {0} and set(two.rank) == {0, 1}

    before, after = weights_of_base(world.base), weights(run / "0")
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == [], "every parameter of the policy moves"
    updates, epochs, (rollout,) = metrics_of(run, "update"), metrics_of(run, "epoch"), metrics_of(run, "rollout")
    assert len(epochs) == 2 and len(updates) == 2 * math.ceil(14 / (2 * 2 * 2))
    for line in updates + epochs:
        assert all(math.isfinite(line[name]) for name in DIAGNOSTICS), line
    assert rollout["sentences"] == teacher.sentences and rollout["rationales"] == 14
    assert updates[0]["approx_kl"] < 1e-6 and updates[0]["clipfrac"] == 0  # the first update is on policy
    assert updates[0]["kl_ref"] < 1e-6 < updates[-1]["kl_ref"]  # and the reference is where it started
    assert list((run / "tensorboard").iterdir())

    launch(world, run)
    assert weights(run / "0").keys() == after.keys() and not (run / "questions").exists()

    lost = []
    teacher = rl_tools.Teacher(run / "questions", skip=lambda item: len(lost) < 2 and not lost.append(item.qid))
    launch(world, run, base_model_dir=run / "0", continue_train=True, run_dir=None, ref_model=None)
    teacher.join(5)
    assert {path.name for path in run.iterdir()} >= {"0", "1", "questions_round0", "questions_round1"}
    second = [line for line in metrics_of(run, "rollout") if line["round"] == 1][0]
    assert second["rationales"] == 12 and second["dropped_no_reply"] == 2
    assert second["share_dropped"] == pytest.approx(2 / 14)
    assert f"reference: {world.base}" in (run / "1/args.yaml").read_text()  # still the first round's reference
    steps = {int(state["step"]) for state in optimizer_of(run / "1")["state"].values()}
    assert steps == {4 + 2 * math.ceil(12 / 4)}, "the optimizer went on from round 0"


PASSES = {"minibatches": {}, "warm-up": {"value_warmup": 1, "vf_lr": 2e-3}, "joined": {"pass_tokens": 10**6}}
ONE_UPDATE = {"phase": "train", "rl_epochs": 1, "rl_batch_size": 5}


@pytest.fixture(scope="module")
def by_two(world, collected):
    """Runs of PASSES by two processes, one after the other in the same two."""
    runs = {name: copy(collected, world.tmp / f"two {name}") for name in PASSES}
    argv = [flags(world, runs[name], ga_step=2, **ONE_UPDATE, **passes) for name, passes in PASSES.items()]
    code = (
        "import accelerate, run_mm_cot_rl, torch\n"
        "accelerate.Accelerator.end_training = lambda self: None\n"  # the next run uses the same process group
        f"for argv in {argv!r}: run_mm_cot_rl.main(argv)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    files.write_text(world.tmp / "by_two.py", code)
    run_script(world.tmp / "by_two.py", nproc=2, env=ONE_THREAD | {"PYTHONPATH": str(ROOT)})
    return runs


@pytest.mark.parametrize("name", PASSES)
def test_one_process_and_two_make_the_same_update(world, collected, by_two, tmp_path, name):
    """1 process x 4 accumulation steps = 2 x 2, on 14 rationales in minibatches of 5, 5 and 4: the second process has
    one real minibatch and one that weighs nothing, or, joined, 5 rows where the first has 9.

    float32 sums taken in another order: gradients agree to 1e-5 of their norm (1e-7 was seen), weights to 2e-6, where
    lr 1e-3 moves them by up to 1e-3; after a warm-up, whose step was rounded too, to 2e-5 (1e-5 was seen).
    """
    one, two = copy(collected, tmp_path / "one"), by_two[name]
    launch(world, one, ga_step=4, **ONE_UPDATE, **(PASSES[name] if name != "joined" else {}))
    a, b, start = weights(one / "0"), weights(two / "0"), weights_of_base(world.base)
    assert max(float((a[name] - start[name]).abs().max()) for name in start) > 9e-4
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=2e-5 if name == "warm-up" else 2e-6, rtol=0, msg=key)
    left, right = optimizer_of(one / "0"), optimizer_of(two / "0")
    assert left["names"] == right["names"]
    for place, name in enumerate(left["names"]):
        x, y = (saved["state"][place]["exp_avg"] for saved in (left, right))  # 0.1 x the gradient
        assert float((x - y).norm()) <= 1e-5 * float(x.norm()), name
    ((x,), (y,)) = metrics_of(one, "update"), metrics_of(two, "update")
    for name in DIAGNOSTICS:
        assert x[name] == pytest.approx(y[name], rel=1e-5, abs=1e-6), name


# -- kills and changed minds -----------------------------------------------------------------------------


def test_killed_in_ppo_and_again_gives_the_same_weights(world, collected, tmp_path):
    whole, cut = copy(collected, tmp_path / "whole"), copy(collected, tmp_path / "cut")
    how = {"phase": "train", "save_minutes": 0, "rl_epochs": 3}
    launch(world, whole, **how)
    command = [sys.executable, "run_mm_cot_rl.py", *flags(world, cut, **how, log_term=1)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    for line in process.stdout:
        if "update 6:" in line:  # of 12: in the middle of the second epoch
            process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and list((cut / "state").glob("slot_*.pth"))
    assert not (cut / "0").exists()
    with pytest.raises(UserError, match="--lr was 0.001, is 0.01"):
        launch(world, cut, **how | {"lr": 1e-2})
    launch(world, cut, **how)
    a, b = weights(whole / "0"), weights(cut / "0")
    assert all(torch.equal(a[name], b[name]) for name in a), "bit-equal on one thread of one CPU"
    for kind in ("rollout", "update", "epoch"):
        assert metrics_of(whole, kind) == metrics_of(cut, kind)
    assert not (cut / "state").exists()


def test_another_experiment_in_the_same_folder_is_refused(world, collected, tmp_path):
    run = copy(collected, tmp_path / "run")
    with pytest.raises(UserError, match="--top_k was 50, is 20"):
        launch(world, run, top_k=20, phase="train")
    problems = files.read_json(world.data / "scienceqa/problems.json", "test")
    problems[next(iter(problems))]["question"] += " Really?"
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    files.write_json(data / "scienceqa/problems.json", problems)
    with pytest.raises(UserError, match="prompts are not those of the rollouts"):
        launch(world, run, data_root=data, phase="train")


def test_overwrite_starts_anew_and_keeps_paid_replies(world, collected, tmp_path):
    run = copy(collected, tmp_path / "run")
    launch(world, run, overwrite="", phase="collect", top_k=20)
    (aside,) = run.glob("overwritten_*")
    assert len(list(aside.glob("questions/*/p0/*/output_from_llm.txt"))) > 5
    assert not list(run.glob("questions/*/p0/*/output_from_llm.txt"))


def test_the_commands_after_collecting_name_the_data(tmp_path):
    argv = f"--base_model_dir {tmp_path} --data_root data --dataset aokvqa --images pictures --phase collect".split()
    first, second, third = run_folder.next_commands(run_mm_cot_rl.parse_args(argv), tmp_path, argv)
    for command in (first, second):
        assert command[-6:] == "--data_root data --dataset aokvqa --images pictures".split()
    assert third[-4:] == "--images pictures --phase train".split() and "collect" not in third


def test_a_round_that_others_wrote_and_the_model_to_start_from_are_never_in_the_way(world, tmp_path):
    """The released code gives its runs the same names; --overwrite must not move the new run's own model."""
    run = tmp_path / "run"
    shutil.copytree(world.base, run / "0")
    with pytest.raises(UserError, match="run/0 was not written by this version.*--overwrite"):
        launch(world, run, phase="collect")
    with pytest.raises(UserError, match="--overwrite would move --base_model_dir"):
        launch(world, run, phase="collect", overwrite="", base_model_dir=run / "0")
    assert weights_of_base(run / "0") and not (run / "rollouts").exists()


def test_a_batch_that_is_deleted_as_told_is_sampled_again(world, collected, tmp_path, capsys):
    run = copy(collected, tmp_path / "run")
    shard = rollouts.RolloutStore(run, 0).shard(1)
    before = rollouts.Rollouts.load(shard).tokens.clone()  # mapped
    shard.write_text("torn")
    with pytest.raises(UserError, match="batch_000001.safetensors: not a rollout file .*delete it and run again"):
        launch(world, run)
    shard.unlink()
    launch(world, run, rl_epochs=1)
    assert "sampled again" in capsys.readouterr().err
    assert torch.equal(rollouts.Rollouts.load(shard).tokens, before) and (run / "0").exists()


def test_a_kill_at_the_end_of_a_round_leaves_no_state_behind(tmp_path, monkeypatch):
    for name in ("0/args.yaml", "questions/0/llm_done.txt", "state/slot_0.pth"):
        files.write_text(tmp_path / name, "x")
    monkeypatch.setattr(run_folder.shutil, "rmtree", lambda *args, **how: 1 / 0)  # killed in it
    with pytest.raises(ZeroDivisionError):
        run_folder.tidy(tmp_path, 1)
    monkeypatch.undo()
    run_folder.tidy(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "questions_round0"}


def test_train_alone_says_what_is_missing(world, tmp_path, capsys):
    run = tmp_path / "run"
    launch(world, run, phase="collect", img_type=None, base_model_dir=plain(world), ref_model=None)
    said = capsys.readouterr().out
    for word in ("processing_sentence_level_feedback", "haiku.py", "--phase train", str(run / "questions")):
        assert word in said
    with pytest.raises(UserError, match="llm_done.txt for action 0, 1 .0 of"):
        launch(world, run, phase="train", img_type=None, base_model_dir=plain(world), ref_model=None)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_an_optimizer_that_fits_no_model_is_refused_before_anyone_is_paid(world, fixtures, tmp_path, kind):
    """PPO's for `--algo rloo`, and the released code's, which holds no names; its own is taken."""
    import model
    from rl.actor_critic import ActorCritic
    from rl.optimizer import check_optimizer, make_optimizer, optimizer_state

    folder = tmp_path / "run/0"
    shutil.copytree(world.base if kind == "untied" else fixtures / "model/vit_tied", folder)
    policy = model.T5ForMultimodalGeneration.from_pretrained(folder)
    value = model.T5ForMultimodalGenerationValueFunction.from_pretrained(folder)
    model.save_value_function(value, folder)
    made = make_optimizer(ActorCritic(policy, value), SimpleNamespace(lr=1e-3, vf_lr=None, adam_eps=1e-8))
    torch.save(optimizer_state(*made), folder / "optimizer_state.pth")
    info = model.check_checkpoint(folder, policy.config.patch_size)
    check_optimizer(folder / "optimizer_state.pth", info, with_value=True)
    with pytest.raises(UserError, match="--algo"):
        check_optimizer(folder / "optimizer_state.pth", info, with_value=False)
    if kind == "untied":
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer_state.pth")
        with pytest.raises(UserError, match="optimizer_state.pth was not written by this version"):
            launch(world, tmp_path / "run", base_model_dir=folder, continue_train=True, phase="collect")
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"0"}


# -- other kinds of run ----------------------------------------------------------------------------------


def plain(world) -> Path:
    """A text-only model: a plain T5 without image layers."""
    folder = world.tmp / "plain"
    if not folder.exists():
        from transformers import AutoTokenizer

        rl_tools.make_model(folder, world.data, AutoTokenizer.from_pretrained(world.tokenizer), patch_size=None)
    return folder


def test_text_only_greedy_two_rounds(world, tmp_path, capsys):
    """No images, no reference, `--do_sample False` with k > 1, two rounds in one command, no launcher."""
    run = tmp_path / "run"

    class TwoRounds(rl_tools.Teacher):
        def run(self):
            for number in range(2):
                while not handoff.exported(self.questions):
                    time.sleep(0.05)
                rl_tools.answer(self.questions)
                while not (run / f"questions_round{number}").exists():
                    time.sleep(0.05)

    TwoRounds(run / "questions")
    launch(
        world, run, img_type=None, base_model_dir=plain(world), ref_model=None, do_sample=False, epochs=2, rl_epochs=1,
        use_caption=None, caption_file=None,
    )  # fmt: skip
    out = capsys.readouterr()
    assert "sampling one" in out.err
    assert {item.action for item in handoff.iter_items(run / "questions_round1")} == {0}
    assert (run / "1/model.safetensors").exists() and len(rollouts.RolloutStore(run, 1).load()) == QUESTIONS
    assert {int(state["step"]) for state in optimizer_of(run / "1")["state"].values()} == {4}


@pytest.mark.parametrize("named", ["default", "another way", "a copy"])
def test_the_starting_model_as_the_reference_is_loaded_once(world, tmp_path, monkeypatch, named):
    """Two models instead of three, and a KL of exactly 0 at sampling; a copy elsewhere is another model."""
    loaded, load = [], run_mm_cot_rl.load_frozen
    monkeypatch.setattr(run_mm_cot_rl, "load_frozen", lambda *a, **k: loaded.append(a[1:]) or load(*a, **k))
    (tmp_path / "link").symlink_to(world.base)
    shutil.copytree(world.base, tmp_path / "copied")
    reference = {"another way": tmp_path / "link", "a copy": tmp_path / "copied"}.get(named)
    launch(world, tmp_path / "run", phase="collect", ref_model=reference)
    rows = rollouts.RolloutStore(tmp_path / "run", 0).load()
    assert len(loaded) == (3 if named == "a copy" else 2)
    assert torch.equal(rows.logprobs, rows.ref_logprobs) == (named != "a copy")
    torch.testing.assert_close(rows.logprobs, rows.ref_logprobs, atol=1e-5, rtol=0)


def test_released_checkpoint_is_accepted(world, fixtures, tmp_path):
    """A checkpoint folder as the released code wrote it, the true ViT shape, the tokenizer named by a flag."""
    import numpy as np

    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    (data / "vision_features/vit.json").unlink()
    rows = len(files.read_json(data / "vision_features/name_map.json", "test"))
    np.save(data / "vision_features/vit.npy", np.random.default_rng(0).standard_normal((rows, 145, 1024), np.float32))
    checkpoint = fixtures / "model/vit"
    run = tmp_path / "run"
    how = {
        "data_root": data, "base_model_dir": checkpoint, "ref_model": checkpoint, "tokenizer": world.tokenizer,
        "lr": 1e-5, "rl_epochs": 1,
    }  # fmt: skip
    launch(world, run, **how, phase="collect")
    rl_tools.answer(run / "questions")
    launch(world, run, **how, phase="train")
    assert {path.name for path in (run / "0").iterdir()} - {"special_tokens_map.json"} == ROUND_FILES


def test_without_reward_the_policy_only_decays(world, collected, tmp_path):
    """Scores all neutral, KL 0, a value function that says 0, no whitening: advantages are 0."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(world.base, base)
    import model

    value = model.T5ForMultimodalGenerationValueFunction.from_pretrained(base)
    torch.nn.init.zeros_(value.v_head[2].weight), torch.nn.init.zeros_(value.v_head[2].bias)
    model.save_value_function(value, base)
    how = {"base_model_dir": base, "init_kl_coef": 0, "adv_normalization": False, "rl_epochs": 1}
    launch(world, run, **how, phase="collect")
    rl_tools.answer(run / "questions", scorer=lambda sentence: 0.5)
    launch(world, run, **how, phase="train")
    before, after = weights_of_base(base), weights(run / "0")
    shrunk = (1 - 1e-3 * 0.01) ** 4
    for name, tensor in before.items():
        decays = tensor.ndim > 1 and "bias" not in name
        torch.testing.assert_close(after[name], tensor * shrunk if decays else tensor, atol=1e-7, rtol=1e-6, msg=name)
    assert all(line["kl_ref"] == pytest.approx(0, abs=1e-4) for line in metrics_of(run, "update"))


# -- the parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "processes", "accumulation"), [(14, 1, 4), (14, 2, 2), (3, 4, 2), (17, 3, 1), (1, 2, 8)]
)
def test_plan_covers_every_row_once_and_keeps_processes_in_step(rows, processes, accumulation):
    lengths = [((7 * i) % 13 + 1, (5 * i) % 11 + 1) for i in range(rows)]
    plan = minibatches.plan_epoch(lengths, 2, processes, accumulation, seed=5)
    flat = [row for step in plan for group in step for minibatch in group for row in minibatch]
    assert sorted(flat) == list(range(rows))
    assert all(len(group) == processes for step in plan for group in step)  # nobody runs more minibatches than others
    assert all(len(minibatch) <= 2 for step in plan for group in step for minibatch in group)
    size = 2 * processes * accumulation
    assert [sum(len(m) for g in step for m in g) for step in plan[:-1]] == [size] * (len(plan) - 1)
    assert len(plan) == math.ceil(rows / size)
    same = minibatches.plan_epoch(lengths, 2, 1, processes * accumulation, seed=5)
    sets = [[{r for g in step for m in g for r in m} for step in one] for one in (plan, same)]
    assert sets[0] == sets[1]  # which rows share a step depends on its size alone
    if rows > size:
        other = minibatches.plan_epoch(lengths, 2, processes, accumulation, seed=6)
        assert sets[0] != [{r for g in step for m in g for r in m} for step in other]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("tokens", [0, 100, 1000, 10**6])
def test_passes_hold_the_rows_of_their_update_within_the_tokens_given(processes, tokens):
    lengths = [((7 * i) % 53 + 1, (5 * i) % 41 + 1) for i in range(43)]

    def padded(rows) -> int:
        return len(rows) * (max(lengths[r][0] for r in rows) + max(lengths[r][1] for r in rows)) if rows else 0

    for step in minibatches.plan_epoch(lengths, 3, processes, 4, seed=5):
        found = minibatches.micro_batches(step, lengths, tokens)
        for process in range(processes):
            assert [r for group in found for r in group[process]] == [r for group in step for r in group[process]]
        for group in found:
            assert group in step or max(map(padded, group)) <= tokens
        for group, following in zip(found, found[1:], strict=False):  # no room was left
            assert max(padded(group[p] + following[p]) for p in range(processes)) > tokens or tokens == 0
        assert len(found) == (len(step) if tokens == 0 else 1 if tokens == 10**6 else len(found))


def test_in_the_last_step_every_process_has_equally_many_minibatches():
    """5 rows, one a minibatch, 3 processes: two groups of three, the last of them with an empty minibatch."""
    [step] = minibatches.plan_epoch([(4, 4)] * 5, 1, 3, 2, seed=0)
    assert [len(group) for group in step] == [3, 3] and step[1][2] == []
    assert sorted(row for group in step for rows in group for row in rows) == [0, 1, 2, 3, 4]


def test_passes_use_the_whole_limit():
    step, lengths = [[[0, 1]], [[2]], [[3]]], [(3, 7)] * 4  # 10 tokens a row
    assert minibatches.micro_batches(step, lengths, 30) == [[[0, 1, 2]], [[3]]]
    assert minibatches.micro_batches(step, lengths, 29) == [[[0, 1]], [[2, 3]]]


def test_rows_of_like_length_share_a_minibatch():
    """Padding of rationales and prompts, against minibatches in the shuffle's order and by rationale alone."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 200, (256, 2), generator=g).tolist()

    def padded(minibatches) -> int:
        weights = (3, 2)  # a token of the rationale, one of the prompt
        return sum(len(m) * sum(w * max(lengths[r][i] for r in m) for i, w in enumerate(weights)) for m in minibatches)

    shuffled = by_rationale = ours = 0
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3)).tolist()
    for begin, step in zip(range(0, 256, 64), minibatches.plan_epoch(lengths, 8, 1, 8, seed=3), strict=True):
        rows = order[begin : begin + 64]
        shuffled += padded([rows[i : i + 8] for i in range(0, 64, 8)])
        rows = sorted(rows, key=lambda row: lengths[row][0])
        by_rationale += padded([rows[i : i + 8] for i in range(0, 64, 8)])
        ours += padded([m for group in step for m in group])
    real = sum(3 * a + 2 * b for a, b in lengths)
    assert real < ours < 0.95 * by_rationale < 0.8 * shuffled, (real, ours, by_rationale, shuffled)


def test_advantages_agree_with_a_plain_loop(monkeypatch):
    """Rewards, GAE and returns of ragged rows in float64, position by position."""
    rows = random_rollouts(9)
    scores = [[0.1 * (i + j) % 1 for j in range(int(n))] for i, n in enumerate(rows.sentence_counts)]
    args = SimpleNamespace(neutral_score=0.5, init_kl_coef=0.3, gamma=0.9, gae_lambda=0.8, algo="ppo")
    monkeypatch.setattr(ppo, "CHUNK_ROWS", 4)
    data = ppo.compute_advantages(rows, scores, args, 0.3)
    for row in range(9):
        begin, n = int(rows.offsets[row]), int(rows.lengths[row])
        logp, ref, values = (
            getattr(rows, f)[begin : begin + n].double() for f in ("logprobs", "ref_logprobs", "values")
        )
        reward = [-0.3 * float(logp[t] - ref[t]) for t in range(n)]
        for column, score in zip(rows.row_columns(row), scores[row], strict=True):
            reward[column - 1] += score - 0.5
        ahead = 0.0
        for t in reversed(range(n)):
            value_next = float(values[t + 1]) if t + 1 < n else 0.0
            ahead = reward[t] + 0.9 * value_next - float(values[t]) + 0.9 * 0.8 * ahead
            assert float(data.advantages[begin + t]) == pytest.approx(ahead, abs=1e-5)
            assert float(data.returns[begin + t]) == pytest.approx(ahead + float(values[t]), abs=1e-5)
        assert float(data.sentence_reward[row]) == pytest.approx(sum(s - 0.5 for s in scores[row]), abs=1e-5)


def test_metrics_are_rewound_to_where_training_goes_on(tmp_path):
    from rl.metrics import Metrics

    log = Metrics(tmp_path, "none", {})
    for number in (0, 1):
        log.log("rollout", number, 0, {"x": math.nan})
        for update in (1, 2, 3):
            log.log("update", number, update, {"x": 1.0}, epoch=0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "upd')  # killed while it wrote
    log.rewind(1, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["update"]) for line in lines] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert lines[0]["x"] is None
    log.rewind(1, None)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_wandb_is_asked_for_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where the package is absent
    with pytest.raises(UserError, match="--report_to wandb.*pip install wandb"):
        run_mm_cot_rl.parse_args(["--base_model_dir", str(tmp_path), "--report_to", "wandb"])


def test_wandb_offline_goes_on_with_its_run(tmp_path, monkeypatch):
    """Needs the package, which no requirement brings: pip install wandb."""
    pytest.importorskip("wandb")
    from rl.metrics import Metrics

    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for update in (1, 2):
        log = Metrics(tmp_path, "wandb", {"lr": 1e-5})
        log.log("update", 0, update, {"loss": 1.0, "explained_variance": math.nan}, epoch=0)
        ids.append(log.wandb.id)
        log.close()
    assert ids[0] == ids[1] and len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_teacher_client_that_started_first_stops_nothing(world, tmp_path):
    """`haiku.py --watch` makes questions/teacher/ before RL exports; its files and those in writing stay."""
    run = tmp_path / "run"
    teacher = run / "questions/teacher"
    teacher.mkdir(parents=True)
    for name in ("lock", ".tmp-7-7", "run.json"):
        (teacher / name).write_text("the client's")
    launch(world, run, phase="collect")
    assert {path.name for path in teacher.iterdir()} == {"lock", ".tmp-7-7", "run.json"}
    assert handoff.exported(run / "questions")


def test_an_export_without_its_rollouts_ends_every_rank(world, tmp_path):
    (tmp_path / "other/questions/0/p0/1").mkdir(parents=True)  # the rationales without the signal
    with pytest.raises(UserError, match="without its rollouts"):
        launch(world, tmp_path / "other", phase="collect")
    run = tmp_path / "run"
    files.write_text(run / "questions/mmcot_finished_signal.txt", "")
    done = run_script("run_mm_cot_rl.py", *flags(world, run, phase="collect"), nproc=2, check=False,
                      env=ONE_THREAD, timeout=120)  # fmt: skip
    assert done.returncode != 0 and done.stderr.count("without its rollouts") == 1
    assert not list(run.glob("rollouts/*/batch_*")) and 'run_mm_cot_rl.py", line' not in done.stderr


def test_a_process_that_waits_for_files_ends_with_the_one_that_failed(tmp_path, monkeypatch):
    store = rollouts.RolloutStore(tmp_path, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="no reply"), store.failure_shared():
        raise UserError("no reply can be used")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="no reply can be used"):
        store.wait_for(store.scores_file, 0.01)
