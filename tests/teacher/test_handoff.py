"""What passes between the stages by hand: RL's questions to the Teacher and back, and checkpoints as released.

RL runs here in one process; the user beside it is a thread that starts the Teacher's tools as they are typed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import run_mm_cot_lora
import run_mm_cot_rl
from ares.cli import UserError
from teacher import handoff
from tests.conftest import ROOT
from tests.rl import rl_tools
from tests.rl.rl_tools import ROUND_FILES, flags, metrics_of

QUESTIONS = 7  # k = 2 gives 14 rationales; a few hold no sentence, about which the Teacher is not asked


@pytest.fixture(scope="module")
def world(tmp_path_factory, sample, t5_tokenizer, t5_tokenizer_dir):
    """`data`, `base` (a tiny multimodal model with tokenizer), `images`, `tokenizer`, `tmp`."""
    tmp = tmp_path_factory.mktemp("handoff")
    data = rl_tools.make_data(tmp, sample, QUESTIONS)
    base = rl_tools.make_model(tmp / "base", data, t5_tokenizer)
    return SimpleNamespace(tmp=tmp, data=data, base=base, images=sample / "images", tokenizer=t5_tokenizer_dir)


class User(threading.Thread):
    """Acts beside RL in this process, once its rationales are out; what went wrong is raised in `finish`."""

    def __init__(self, questions: Path, act):
        super().__init__(daemon=True)
        self.questions, self.act, self.fault = questions, act, None
        self.start()

    def run(self) -> None:
        try:
            while not handoff.exported(self.questions):
                time.sleep(0.05)
            self.act(self.questions)
        except BaseException as fault:
            self.fault = fault
            for action in (0, 1):  # RL must not wait for ever
                handoff.mark_done(self.questions, action)

    def finish(self) -> None:
        self.join(5)
        if self.fault:
            raise self.fault


def rl(world, run: Path, act, **changes) -> None:
    """RL to its end, the user doing `act(questions)` once it waits."""
    user = User(run / "questions", act)
    how = {"rl_epochs": 1, "settle_seconds": 0.5} | changes
    try:
        run_mm_cot_rl.main(flags(world, run, **how))
    finally:
        user.finish()


def shell(command: str, cwd: Path) -> str:
    """A line as it is typed in bash; returns what it printed."""
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def still_waiting(questions: Path) -> None:
    """RL looks every 0.2 s: had it taken something for the end of the feedback, its scores would be there."""
    time.sleep(1.0)
    assert not list(questions.parent.glob("rollouts/round_*/scores.json"))


def check_trained(run: Path) -> dict:
    """The round is saved, every exported sentence was scored; returns the round's line of metrics.jsonl."""
    assert {path.name for path in (run / "0").iterdir()} - {"special_tokens_map.json"} == ROUND_FILES
    (rollout,) = metrics_of(run, "rollout")
    scored = list((run / "questions_round0").glob(f"[01]/p0/*/{handoff.SCORES}"))
    assert rollout["sentences"] == sum(len(path.read_text().split()) for path in scored) > 10
    return rollout


def asked(run: Path) -> list[handoff.Item]:
    items = handoff.iter_items(run / "questions_round0")
    assert 10 <= len(items) <= 2 * QUESTIONS
    return items


# -- questions out, scores back --------------------------------------------------------------------------


def test_by_hand(world, tmp_path, capsys):
    """Copy out, preprocess, haiku, copy back, touch: the released way, with the default folders of every tool."""
    desk = tmp_path / "preprocessing_after_RL"
    shutil.copytree(ROOT / "preprocessing_after_RL", desk)  # it holds the scripts themselves
    run = tmp_path / "run"

    def act(questions):
        before = {item.folder.relative_to(questions) for item in handoff.iter_items(questions)}
        shell(f"cp -r {questions}/* preprocessing_after_RL/", tmp_path)
        out = shell(
            f"bash {ROOT}/preprocessing_after_RL/processing_sentence_level_feedback.sh --problems scienceqa "
            f"--data_root {world.data} --images {world.images}",
            tmp_path,
        )
        assert f"{len(before)} requests in preprocessing_after_RL" in out
        shell(
            f"$PYTHON {ROOT}/haiku.py --teacher reference --no-done --data_root {world.data} --images {world.images}",
            tmp_path,
        )
        assert {item.folder.relative_to(desk) for item in handoff.iter_items(desk) if handoff.has_reply(item.folder)
                } == before  # fmt: skip
        assert not list(desk.glob(f"*/{handoff.DONE}"))
        assert sum(handoff.has_reply(item.folder) for item in handoff.iter_items(questions)) == 0
        shell(f"cp -r preprocessing_after_RL/* {questions}/", tmp_path)
        still_waiting(questions)  # all replies are there, no signal
        shell(f"touch {questions}/0/llm_done.txt", tmp_path)
        still_waiting(questions)  # one signal of two
        shell(f"touch {questions}/1/llm_done.txt", tmp_path)

    rl(world, run, act)
    out = capsys.readouterr()
    said = out.out.splitlines()
    assert said.index("Rationale Finished") < said.index("Waiting for the feedback")
    everything = len(asked(run))
    assert f"feedback: {everything} of {everything} rationales answered" in out.out and "dropped" not in out.err
    assert "action 1 has all its replies; `touch" in out.out, "what a user may have forgotten is said"
    assert check_trained(run)["rationales"] == 2 * QUESTIONS


def test_in_place(world, tmp_path, capsys):
    """The same tools in the run's own folder; haiku.py tells RL itself, action by action."""
    run = tmp_path / "run"

    def act(questions):
        place = f"--questions_dir {questions} --data_root {world.data} --images {world.images}"
        shell(f"bash {ROOT}/preprocessing_after_RL/processing_sentence_level_feedback.sh {place}", tmp_path)
        out = shell(f"$PYTHON {ROOT}/haiku.py --teacher reference --actions 1 {place}", tmp_path)
        assert "action 1: done" in out
        still_waiting(questions)
        shell(f"$PYTHON {ROOT}/haiku.py --teacher reference {place}", tmp_path)

    rl(world, run, act)
    assert f"feedback: {len(asked(run))} of {len(asked(run))} rationales answered" in capsys.readouterr().out
    assert check_trained(run)["rationales"] == 2 * QUESTIONS


def test_signals_before_the_replies(world, tmp_path, capsys):
    """A slow copy brings `llm_done.txt` first: RL waits while replies come in, then drops what is missing."""
    run, times = tmp_path / "run", []

    def act(questions):
        desk = tmp_path / "desk"
        shutil.copytree(questions, desk)
        rl_tools.answer(desk)
        for action in (0, 1):
            handoff.mark_done(questions, action)
        times.append(time.monotonic())
        for item in handoff.iter_items(desk)[2:]:  # the first two never arrive
            time.sleep(0.4)
            shutil.copy(item.folder / handoff.REPLY, questions / item.folder.relative_to(desk))
        times.append(time.monotonic())

    rl(world, run, act, settle_seconds=3)
    assert times[1] - times[0] > 3, "it came in for longer than RL waits for a reply"
    out = capsys.readouterr()
    everything, dropped = len(asked(run)), asked(run)[:2]
    assert f"feedback: {everything - 2} of {everything} rationales answered" in out.out
    assert f"2 rationales without a reply are dropped (no new reply for 3 s after {handoff.DONE})" in out.err
    assert f"the first is {str(dropped[0].folder).replace('questions_round0', 'questions')}" in out.err
    rollout = check_trained(run)
    assert rollout["rationales"] == 12 and rollout["dropped_no_reply"] == 2
    assert all("no_reply" in (item.folder / handoff.REASON).read_text() for item in dropped)


def test_too_many_missing_stops_before_training_and_the_same_command_goes_on(world, tmp_path, capsys):
    run = tmp_path / "run"

    def signals_only(questions):
        for action in (0, 1):
            handoff.mark_done(questions, action)
        rl_tools.answer(questions, skip=lambda item: item.action == 0)

    with pytest.raises(UserError) as refusal:
        rl(world, run, signals_only)
    lost, everything = (len(handoff.iter_items(run / "questions", action)) for action in (0, None))
    for word in (str(run / "questions"), f"{lost} of {everything} replies", "no_reply", "--max_dropped 0.2"):
        assert word in str(refusal.value), word
    assert not (run / "0").exists()
    rl(world, run, lambda questions: rl_tools.answer(questions))
    assert check_trained(run)["rationales"] == 2 * QUESTIONS
    assert "sampling: " not in capsys.readouterr().err.rpartition("dropped")[2], "nothing was sampled again"


# -- checkpoints as released -----------------------------------------------------------------------------
# main.py --evaluate_dir: tests/sft/test_sft.py, both kinds; run_mm_cot_rl.py with vit: tests/rl/test_rl.py


@pytest.fixture(scope="module")
def true_shape(world):
    """The same questions with features of the true shape, which no sidecar needs to tell."""
    data = world.tmp / "true_shape"
    shutil.copytree(world.data, data)
    (data / "vision_features/vit.json").unlink()
    rows = len(json.loads((data / "vision_features/name_map.json").read_text()))
    np.save(data / "vision_features/vit.npy", np.random.default_rng(0).standard_normal((rows, 145, 1024), np.float32))
    return data


def test_rl_starts_from_a_released_tied_checkpoint(world, true_shape, fixtures, tmp_path):
    from model import T5ForMultimodalGeneration

    run, checkpoint = tmp_path / "run", fixtures / "model/vit_tied"
    rl(
        world, run, lambda questions: rl_tools.answer(questions), data_root=true_shape, base_model_dir=checkpoint,
        ref_model=checkpoint, tokenizer=world.tokenizer, lr=1e-4,
    )  # fmt: skip
    check_trained(run)
    model = T5ForMultimodalGeneration.from_pretrained(run / "0")
    assert model.lm_head.weight is model.shared.weight, "still tied"


@pytest.mark.parametrize("name", ["vit", "vit_tied"])
def test_lora_on_a_released_checkpoint(name, world, true_shape, fixtures, tmp_path, capsys):
    """pytorch_model.bin alone in its folder, no tokenizer; the adapter goes into it, and is then evaluated."""
    checkpoint = tmp_path / "released"
    checkpoint.mkdir()
    for file in ("config.json", "pytorch_model.bin", "generation_config.json"):
        shutil.copyfile(fixtures / "model" / name / file, checkpoint / file)
    argv = ["--data_root", str(true_shape), "--img_type", "vit", "--model", str(checkpoint), "--bs", "4", "--epoch",
            "1", "--lr", "0.01", "--output_len", "12", "--use_generate", "--final_eval"]  # fmt: skip
    with pytest.raises(UserError, match="--tokenizer"):
        run_mm_cot_lora.main(argv)
    run_mm_cot_lora.main([*argv, "--tokenizer", str(world.tokenizer)])
    (adapter,) = (path for path in checkpoint.iterdir() if path.is_dir())
    assert adapter.name == "mm_cot_lora_r32_a64_d0.05_s42_lr0.01_bs4_e1_len12"
    out = json.loads((adapter / "predictions_ans_test.json").read_text())
    assert len(out["preds"]) == 2 and ("tied" in capsys.readouterr().out) == (name == "vit_tied")

    moved = tmp_path / "adapter"  # the tokenizer was saved with it
    shutil.copytree(adapter, moved, ignore=shutil.ignore_patterns("predictions*", "checkpoint-*"))
    run_mm_cot_lora.main([*argv, "--evaluate_dir", str(moved)])
    assert json.loads((moved / "predictions_ans_test.json").read_text())["preds"] == out["preds"]
