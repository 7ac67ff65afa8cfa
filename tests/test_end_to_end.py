"""The whole loop with the commands that users type: the README's three steps on real questions.

The README's steps run in a copy of the repository with seven questions, features and a tiny rationale model. The
reference Teacher scores in RL's questions folder while RL waits.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo.make_model import build_t5
from teacher import handoff
from tests.commands import Command, blocks_of, commands_of
from tests.conftest import ROOT, run_script
from tests.rl import rl_tools
from tests.tiny import predictions

pytestmark = pytest.mark.slow

MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PREDICTIONS = {f"predictions_ans_{name}.json" for name in ("train", "eval", "test")}
TRAINED = {"args.yaml", "metrics.json", "trainer_state.json"}
OPTIONAL = {"special_tokens_map.json", "spiece.model", "README.md"}  # as the versions of the libraries have it
# appended to a script's command: the flags of a small run, and the offline Teacher
SMALL = {
    "run_mm_cot_rl.py": "--bs 4 --output_len 24 --rl_batch_size 4 --rl_epochs 1 --ga_step 2 --poll_seconds 0.2 "
    "--settle_seconds 0.5 --report_to none",
    "haiku.py": "--teacher reference",
    "haiku_for_correction_feedback.py": "--teacher reference",
    "main.py": "--bs 4 --epoch 1 --output_len 24",
    "run_mm_cot_lora.py": "--bs 4 --epoch 1 --output_len 8",
}
RL_RUN = (
    "base_neutral0.5_k4_rlb4_cl0.2_rle1_lr2e-05_vlr1.0_g1.0_l0.95_fGPT4V_seed1_kl0.0001_ga2"
    "_dosampleTrue_advTrue_tk50_ref"
)


def read(path: Path):
    return json.loads(path.read_text())


def names(folder: Path) -> set[str]:
    """The files and folders in a folder, without checkpoints for resuming."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} - OPTIONAL


def unmoved(before: Path, after: Path) -> list[str]:
    """Tensors of model folder `after` that are equal in `before`, or not in it at all."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return [name for name in new if name not in old or torch.equal(old[name], new[name])]


class User:
    """Follows the README in a copy of the repository with seven questions and a tiny rationale model."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.printed = {}  # script -> what its last start as a process printed
        self.problems = read(folder / "data/scienceqa/problems.json")
        splits = read(folder / "data/scienceqa/pid_splits.json")
        self.splits = {"train": splits["train"], "eval": splits["val"], "test": splits["test"]}

    def small(self, command: Command) -> tuple[str, str]:
        """(script or "", the command with the flags of a small run)."""
        script = next((word for word in command.words() if re.search(r"\.(py|sh)$", word)), "")
        return script, f"{command.text} {SMALL.get(script, '')}"

    def type(self, command: Command) -> None:
        """Run a command in bash as it is typed."""
        script, text = self.small(command)
        how = dict(cwd=self.folder, env=self.environment, capture_output=True, text=True)
        done = subprocess.run(["bash", "-c", text], **how)
        assert done.returncode == 0, f"{command.where}: {text}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
        self.printed[script] = done.stdout

    def train(self, command: Command, nproc: int = 1) -> None:
        """Run the script of an `accelerate launch`: in this process, which has loaded torch, or in two real ones."""
        script, text = self.small(command)
        for name, value in self.environment.items():
            text = re.sub(rf"\${name}\b", value, text)
        words = shlex.split(text)
        assert words[:3] == ["accelerate", "launch", script]
        if nproc > 1:
            self.printed[script] = run_script(ROOT / script, *words[3:], cwd=self.folder, nproc=nproc).stdout
        else:
            importlib.import_module(script.removesuffix(".py")).main(words[3:])

    def rl(self, command: Command, feedback: list[Command], *flags: str, nproc: int = 1) -> Path:
        """RL, and the commands of `feedback` beside it once it waits. Returns its run folder, $RUN from then on."""
        runs = self.folder / "RL_models"
        before, faults = set(runs.glob("*")), []

        def teacher() -> None:
            run = None
            try:
                while not (run and handoff.exported(run / "questions")):
                    run = next(iter(set(runs.glob("*")) - before), None)
                    time.sleep(0.1)
                self.environment["RUN"] = str(run.relative_to(self.folder))
                for each in feedback:
                    self.type(each)
            except BaseException as fault:
                faults.append(fault)
            for action in range(4) if faults and run else ():  # RL must not wait for ever
                handoff.mark_done(run / "questions", action)

        beside = threading.Thread(target=teacher, daemon=True)
        beside.start()
        try:
            self.train(Command(" ".join([command.text, *flags]), command.where), nproc)
        finally:
            beside.join(5)
            if faults:
                raise faults[0]
        return self.folder / self.environment["RUN"]


@pytest.fixture
def user(tmp_path, monkeypatch, sample, t5_tokenizer, t5_tokenizer_dir):
    for path in ROOT.iterdir():  # data and results are in the copy, code is the repository's
        if path.suffix == ".py" or path.name in ("ares", "rl", "sft", "teacher", "tools", "vision"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "preprocessing_after_RL", tmp_path / "preprocessing_after_RL")
    data = rl_tools.make_data(tmp_path, sample, 7)
    (data / "captions.json").rename(data / "instruct_captions.json")
    (data / "images").symlink_to(sample / "images")
    rl_tools.make_model(tmp_path / "models/mm-cot-base-rationale", data, t5_tokenizer)
    build_t5(t5_tokenizer_dir, tmp_path / "t5", d_model=32, layers=2, heads=4, vocab_size=32128)
    monkeypatch.chdir(tmp_path)
    return User(tmp_path)


def test_the_three_steps_of_the_readme_run(user):
    section = "## The three steps on real data"
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(section)[2].partition("\n## ")[0]
    _, ([rl], in_place, by_hand), ([generate, *clean_and_correct, tune],), ([lora],) = (
        blocks_of(step, "README.md") for step in text.split("\n### ")
    )
    base = user.folder / "models/mm-cot-base-rationale"

    user.rl(rl, by_hand)
    assert user.printed["haiku.py"].count("llm_done.txt written") == 4
    run = user.rl(rl, in_place, "--seed", "1", nproc=2)
    assert run.name == RL_RUN
    for each in (user.folder / "RL_models").iterdir():
        check_rl(user, base, each, nproc=2 if each == run else 1)
    printed = user.printed["run_mm_cot_rl.py"].splitlines()
    assert printed.index("Rationale Finished") < printed.index("Waiting for the feedback")

    user.train(generate)
    assert names(run / "0") == rl_tools.ROUND_FILES | PREDICTIONS
    check_predictions(user, run / "0")
    data = predictions(run / "0")
    assert data["num_fail"] is None and set(data["answers"]) == {None}  # QCM-E asks for no answer
    assert set(data["scores"]) == {"rationale"}
    assert {"bleu1", "bleu4", "rouge"} <= set(data["scores"]["rationale"]) <= {"bleu1", "bleu4", "rouge", "similarity"}
    assert all(0 <= value <= 100 for value in data["scores"]["rationale"].values())
    for command in clean_and_correct:
        user.type(command)
    check_corrections(user, run / "0/remove_repetitive_sentences.json")

    user.train(tune)
    (sft,) = (user.folder / "experiments").iterdir()
    assert sft.name == (f"baseline_RL_models-{RL_RUN}-0_vit_QCM-E_lr8e-05_bs4_op24_ep1_seed42_scienceqa-correction")
    check_sft(user, run / "0", sft)
    user.environment["SFT"] = str(sft.relative_to(user.folder))
    user.train(lora)
    check_lora(user, sft, sft / "mm_cot_lora_r64_a128_d0.05_s42_lr8e-05_bs4_e1_len8")


def check_rl(user, base: Path, run: Path, nproc: int) -> None:
    """What was exported is what was scored, by all ranks, and what was trained on; every parameter moved."""
    outputs = {"0", "args.yaml", "metrics.jsonl", "samples_round_0.jsonl", "questions_round0", "rollouts"}
    assert names(run) == outputs and names(run / "0") == rl_tools.ROUND_FILES | (PREDICTIONS & names(run / "0"))
    items = handoff.iter_items(run / "questions_round0")
    by_rank = [{item.qid for item in items if item.rank == rank} for rank in range(nproc)]
    assert 20 < len(items) <= 28  # a text without a sentence is not exported
    assert sorted(qid for qids in by_rank for qid in qids) == sorted(user.splits["train"])
    assert all(by_rank) and {item.action for item in items} == {0, 1, 2, 3}
    exported = scored = 0
    for item in items:
        assert {handoff.RATIONALE, handoff.REQUEST, handoff.REPLY, handoff.SIDECAR, handoff.SCORES} <= names(
            item.folder
        )
        assert read(item.folder / handoff.SIDECAR)["teacher"] == "reference"
        exported += len(handoff.read_rationale(item.folder))
        scored += len((item.folder / handoff.SCORES).read_text().split())
    stored = read(run / "rollouts/round_0/collected.json")
    (rollout,) = rl_tools.metrics_of(run, "rollout")
    assert stored["samples"] == rollout["rationales"] == 28 and rollout["share_dropped"] == 0
    assert len(items) < exported == scored == stored["sentences"] == rollout["sentences"]
    updates = rl_tools.metrics_of(run, "update")
    assert all(np.isfinite(value) for update in updates for value in update.values() if isinstance(value, float))
    assert unmoved(base, run / "0") == []
    value, policy = torch.load(run / "0/value_function.pth", weights_only=True), load_file(base / "model.safetensors")
    still = {name for name in policy if torch.equal(policy[name], value[name])}
    assert still == {"lm_head.weight"}, "the value function trains all but its unused head"
    state = rl_tools.optimizer_of(run / "0")["state"]
    # 28 samples in minibatches of 4, 2 of them accumulated
    assert {int(entry["step"]) for entry in state.values()} == {len(updates)} == {4 // nproc}


def check_predictions(user, folder: Path, which=("train", "eval", "test")) -> None:
    """By question id, in split order, prompts and targets being those of their own questions."""
    for name in which:
        data = predictions(folder, name)
        assert data["qids"] == user.splits[name]
        keys = {"preds", "labels", "qids", "prompts", "answers", "settings"}
        assert set(data) == keys | ({"num_fail", "scores"} if name == "test" else set())
        assert {len(data[key]) for key in ("preds", "labels", "prompts", "answers")} == {len(data["qids"])}
        for qid, prompt in zip(data["qids"], data["prompts"], strict=True):
            assert prompt.startswith("Question: " + " ".join(user.problems[qid]["question"].split())[:60])


def check_corrections(user, rationales: Path) -> None:
    """Sentences are kept by question; the train solutions alone are replaced, and nothing else of a question."""
    kept = read(rationales)
    assert kept["qids"] == user.splits["train"] and len(kept["preds"]) == 7
    assert not any(pred.startswith("Solution:") for pred in kept["preds"])
    items = handoff.iter_items(user.folder / "preprocessing_after_RL/correction")
    assert [item.qid for item in items] == sorted(user.splits["train"], key=int)
    assert all(read(item.folder / handoff.SIDECAR)["teacher"] == "reference" for item in items)
    corrected = read(user.folder / "data/scienceqa/correction.json")
    assert corrected.keys() == user.problems.keys()
    for qid, problem in corrected.items():
        assert {**problem, "solution": ""} == {**user.problems[qid], "solution": ""}
        assert qid in user.splits["train"] or problem["solution"] == user.problems[qid]["solution"]
    solutions = [corrected[qid]["solution"] for qid in user.splits["train"]]
    assert all(solutions) and solutions != [user.problems[qid]["solution"] for qid in user.splits["train"]]
    assert sum(a != b for a, b in zip(solutions, kept["preds"], strict=True)) >= 3, (
        "a tiny model leaves much to correct"
    )


def check_sft(user, start: Path, sft: Path) -> None:
    assert names(sft) == MODEL | TRAINED | PREDICTIONS and unmoved(start, sft) == []
    check_predictions(user, sft)
    metrics = read(sft / "metrics.json")
    assert metrics["steps"] == 2 and 0 < metrics["last_loss"] < np.log(32128)
    # its targets are the corrections; val and test keep the gold rationales
    corrected = read(user.folder / "data/scienceqa/correction.json")
    for name, source in (("train", corrected), ("eval", user.problems), ("test", user.problems)):
        data = predictions(sft, name)
        for qid, label in zip(data["qids"], data["labels"], strict=True):  # cut at --output_len
            assert letters("Solution: " + source[qid]["solution"].replace("\n", "\\n")).startswith(letters(label)[:40])


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.replace("\\n", "n").lower())


def check_lora(user, sft: Path, folder: Path) -> None:
    adapter = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names(folder) == TRAINED | adapter | {"predictions_ans_test.json"}
    assert names(sft) == MODEL | TRAINED | PREDICTIONS | {folder.name}
    check_predictions(user, folder, ["test"])
    moved = load_file(folder / "adapter_model.safetensors")
    assert moved and all(tensor.abs().max() > 0 for name, tensor in moved.items() if "lora_B" in name)
    data = predictions(folder)
    assert data["num_fail"] == data["answers"].count(None) and set(data["scores"]) == {"answer"}
    assert all(re.fullmatch(r"\d+\.\d\d", text) for text in data["scores"]["answer"].values())


def test_the_command_for_a_starting_model_runs(user):
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("## The starting rationale model")[2]
    command = blocks_of(text, "docs/data.md")[0][0]
    user.train(Command(f"{command.text} --model t5", command.where))
    folder = user.folder / "models/rationale"
    assert names(folder) == MODEL | TRAINED | PREDICTIONS
    check_predictions(user, folder)
    fresh = {
        name
        for name in unmoved(user.folder / "t5", folder)
        if name not in load_file(user.folder / "t5/model.safetensors")
    }
    assert {name.split(".")[1] for name in fresh} == {"image_dense", "mha_layer", "gate_dense"}
    # RL accepts it: after its checks of flags, data and checkpoints it writes the run folder
    rl = next(command for command in commands_of("README.md") if "run_mm_cot_rl.py" in command.text)
    flags = "--base_model_dir models/rationale --ref_model models/rationale --phase collect"
    user.train(Command(f"{rl.text} {flags}", rl.where))
    (run,) = (user.folder / "RL_models").iterdir()
    assert handoff.exported(run / "questions")


def test_demo_script_explains_itself(tmp_path):
    """`--help` needs neither .venv nor any package."""
    for name in ("run_demo.sh", "run_tests.sh"):
        done = subprocess.run(["bash", ROOT / name, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert "--output" not in done.stdout
    help_text = subprocess.run(["bash", ROOT / "run_demo.sh", "--help"], capture_output=True, text=True).stdout
    assert "--output" in help_text and "--seed" in help_text
