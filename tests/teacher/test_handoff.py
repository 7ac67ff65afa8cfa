"""What passes between the stages by hand: RL's questions to the Teacher and back, and checkpoints as released.

RL runs here in one process from the released tied checkpoint; the user beside it is a thread that starts the Teacher's
tools as they are typed. In the run's own folder, and replies that never arrive: tests/test_end_to_end.py, tests/rl.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import run_mm_cot_lora
import run_mm_cot_rl
from ares.cli import UserError
from teacher import handoff
from teacher.data_check import RECORD
from tests.conftest import ROOT, one_line_error
from tests.rl import rl_tools
from tests.rl.rl_tools import ROUND_FILES, flags, metrics_of
from tests.teacher.teacher_tools import wait_until

HOW = {"env": {**os.environ, "PYTHON": sys.executable}, "capture_output": True, "text": True}
QUESTIONS = 7  # k = 2 gives 14 rationales; a few hold no sentence, about which the Teacher is not asked


@pytest.fixture(scope="module")
def world(tmp_path_factory, sample, fixtures, t5_tokenizer_dir):
    """`data` (features of the true shape, which no sidecar needs to describe), `base`, `images`, `tokenizer`."""
    data = rl_tools.make_data(tmp_path_factory.mktemp("handoff"), sample, QUESTIONS)
    (data / "vision_features/vit.json").unlink()
    rows = len(json.loads((data / "vision_features/name_map.json").read_text()))
    np.save(data / "vision_features/vit.npy", np.random.default_rng(0).standard_normal((rows, 145, 1024), np.float32))
    base = fixtures / "model/vit_tied"
    return SimpleNamespace(data=data, base=base, images=sample / "images", tokenizer=t5_tokenizer_dir)


def rl(world, run: Path, act) -> None:
    """RL to its end; a user beside it does `act(questions)` once its rationales are exported."""
    questions = run / "questions"

    def user():
        try:
            wait_until(lambda: handoff.exported(questions))
            act(questions)
        finally:
            for action in (0, 1):  # RL must not wait for ever
                handoff.mark_done(questions, action)

    argv = flags(world, run, rl_epochs=1, settle_seconds=0.5, tokenizer=world.tokenizer, lr=1e-4)
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(user)
        try:
            run_mm_cot_rl.main(argv)
        finally:
            acting.result()


def shell(command: str, cwd: Path) -> str:
    """A line as it is typed in bash; returns what it printed."""
    done = subprocess.run(["bash", "-c", command], cwd=cwd, **HOW)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_trained(run: Path) -> int:
    """The round is saved, all rationales were used, every exported sentence was scored; returns what was exported."""
    from model import T5ForMultimodalGeneration

    assert {path.name for path in (run / "0").iterdir()} - {"special_tokens_map.json"} == ROUND_FILES
    (rollout,) = metrics_of(run, "rollout")
    items = handoff.iter_items(run / "questions_round0")
    sentences = sum(len((item.folder / handoff.SCORES).read_text().split()) for item in items)
    assert rollout["sentences"] == sentences > 10 and rollout["rationales"] == 2 * QUESTIONS
    assert 10 <= len(items) <= 2 * QUESTIONS
    model = T5ForMultimodalGeneration.from_pretrained(run / "0")
    assert model.lm_head.weight is model.shared.weight, "still tied"
    return len(items)


def test_by_hand(world, tmp_path, capsys):
    """Copy out, preprocess, haiku, copy back, touch: the released way, with the default folders of every tool."""
    desk, run = tmp_path / "preprocessing_after_RL", tmp_path / "run"
    shutil.copytree(ROOT / "preprocessing_after_RL", desk)  # it holds the scripts themselves
    data = f"--data_root {world.data} --images {world.images}"
    other_data = tmp_path / "other"  # the same question ids
    shutil.copytree(world.data / "scienceqa", other_data / "scienceqa")
    problems = json.loads((other_data / "scienceqa/problems.json").read_text())
    changed = {qid: {**problem, "question": "What is that?"} for qid, problem in problems.items()}
    (other_data / "scienceqa/problems.json").write_text(json.dumps(changed))

    def still_waiting():
        """RL looks every 0.2 s: had it taken something for the end of the feedback, its scores would be there."""
        time.sleep(1.0)
        assert not list(run.glob("rollouts/round_*/scores.json"))

    def act(questions):
        before = {item.folder.relative_to(questions) for item in handoff.iter_items(questions)}
        assert len(json.loads((questions / RECORD).read_text())) == QUESTIONS
        shell(f"cp -r {questions}/* preprocessing_after_RL/", tmp_path)
        script = f"{ROOT}/preprocessing_after_RL/processing_sentence_level_feedback.sh"
        refused = subprocess.run(["bash", script, "--data_root", str(other_data)], cwd=tmp_path, **HOW)
        one_line_error(refused, f"preprocessing_after_RL was not made from {other_data / 'scienceqa'}")
        assert not list(desk.rglob(handoff.REQUEST))
        out = shell(f"bash {script} --problems scienceqa {data}", tmp_path)
        assert f"{len(before)} requests in preprocessing_after_RL" in out
        shell(f"$PYTHON {ROOT}/haiku.py --teacher reference --no-done {data}", tmp_path)
        answered = [item for item in handoff.iter_items(desk) if handoff.has_reply(item.folder)]
        assert {item.folder.relative_to(desk) for item in answered} == before
        assert not list(desk.glob(f"*/{handoff.DONE}")) and not list(questions.rglob(handoff.REPLY))
        shell(f"cp -r preprocessing_after_RL/* {questions}/", tmp_path)
        still_waiting()  # all replies are there, no signal
        shell(f"touch {questions}/0/llm_done.txt", tmp_path)
        still_waiting()  # one signal of two
        shell(f"touch {questions}/1/llm_done.txt", tmp_path)

    rl(world, run, act)
    out = capsys.readouterr()
    said, everything = out.out.splitlines(), check_trained(run)
    assert said.index("Rationale Finished") < said.index("Waiting for the feedback")
    assert f"feedback: {everything} of {everything} rationales answered" in out.out and "dropped" not in out.err
    assert "action 1 has all its replies; `touch" in out.out, "what a user may have forgotten is said"


def test_too_many_missing_stops_before_training_and_the_same_command_goes_on(world, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(UserError) as refusal:
        rl(world, run, lambda questions: rl_tools.answer(questions, skip=lambda item: item.action == 0))
    lost, everything = (len(handoff.iter_items(run / "questions", action)) for action in (0, None))
    for word in (str(run / "questions"), f"{lost} of {everything} replies", "no_reply", "--max_dropped 0.2"):
        assert word in str(refusal.value), word
    assert not (run / "0").exists()
    rl(world, run, rl_tools.answer)
    check_trained(run)
    assert "sampling: " not in capsys.readouterr().err.rpartition("dropped")[2], "nothing was sampled again"


@pytest.mark.parametrize("name", ["vit", "vit_tied"])
def test_lora_on_a_released_checkpoint(name, world, fixtures, tmp_path, capsys):
    """pytorch_model.bin alone in its folder, no tokenizer; the adapter goes into it, and is then evaluated."""
    checkpoint = tmp_path / "released"
    checkpoint.mkdir()
    for file in ("config.json", "pytorch_model.bin", "generation_config.json"):
        shutil.copyfile(fixtures / "model" / name / file, checkpoint / file)
    argv = ["--data_root", str(world.data), "--img_type", "vit", "--model", str(checkpoint), "--bs", "4", "--epoch",
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
