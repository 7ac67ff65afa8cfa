"""The whole loop with the scripts that users start: once on real ScienceQA, once as the demo at its smallest size.

On real input: the users' commands with a 2-layer T5 of the real vocabulary, features of the true shape, k = 2 and one
epoch each, RL in two processes, and the Teacher's scripts in its questions folder while it waits. Each stage is a
test; a stage that fails makes the later ones fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ares import files
from demo.make_model import build_t5
from teacher import handoff
from tests.conftest import ROOT, run_script
from tests.tools.report_tools import parts_of

pytestmark = pytest.mark.slow

RL_RUN = (
    "base_neutral0.5_k2_rlb8_cl0.2_rle1_lr2e-05_vlr1.0_g1.0_l0.95_fGPT4V_seed42_kl0.0001_ga8"
    "_dosampleTrue_advTrue_tk50_ref"
)
SPLITS = {"train": "minitrain", "eval": "miniminival", "test": "minitest"}  # of predictions_ans_{...}.json
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PREDICTIONS = {f"predictions_ans_{name}.json" for name in SPLITS}
TRAINED = {"args.yaml", "metrics.json", "trainer_state.json"}
OPTIONAL = {"special_tokens_map.json", "spiece.model", "README.md"}  # as the versions of the libraries have it


# -- the user's machine ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def user(tmp_path_factory, sample, t5_tokenizer_dir):
    """A working folder as a user has it: `data/` (real questions, cut features), `t5/`; paths as they type them."""
    folder = tmp_path_factory.mktemp("user")
    data = folder / "data"
    shutil.copytree(sample / "ScienceQA/data/scienceqa", data / "scienceqa")
    problems, splits = (read(data / f"scienceqa/{name}.json") for name in ("problems", "pid_splits"))
    known = read(sample / "name_map.json")
    rows = [qid for split in SPLITS.values() for qid in splits[split] if qid in known]
    files.write_json(data / "vision_features/name_map.json", {qid: row for row, qid in enumerate(rows)})
    features = np.random.default_rng(0).standard_normal((len(rows), 145, 1024), np.float32)
    np.save(data / "vision_features/vit.npy", features.astype(np.float16))

    # A 2-layer model learns nothing of real rationales in a minute: its starting rationales are two plain sentences,
    # so that it writes sentences and stops, long before the 512 tokens of --output_len.
    def plain(problem):
        answer = problem["choices"][problem["answer"]].split()[0].strip(".,")
        return f"This is a question of {problem['subject']}. The answer is {answer}."

    plain_problems = {qid: {**problems[qid], "solution": plain(problems[qid])} for qid in splits["minitrain"]}
    files.write_json(data / "scienceqa/plain.json", plain_problems)
    build_t5(t5_tokenizer_dir, folder / "t5", d_model=32, layers=2, heads=4, vocab_size=32128)

    common = ["--data_root", "data", "--caption_file", str(sample / "instruct_captions.json"), "--use_caption"]
    common += ["--img_type", "vit", "--train_split", "minitrain"]
    common_sft = [*common, "--val_split", "miniminival", "--test_split", "minitest", "--use_generate", "--final_eval"]
    return SimpleNamespace(
        folder=folder,
        problems=problems,
        splits={name: splits[split] for name, split in SPLITS.items()},
        common=common,
        common_sft=[*common_sft, "--eval_bs", "64"],
        teacher=["--data_root", "data", "--images", str(sample / "images")],
        base=folder / "base",
        run=folder / "RL_models" / RL_RUN,
        sft=folder / "experiments" / f"baseline_RL_models-{RL_RUN}-0_vit_QCM-E_lr8e-05_bs8_op512_ep1_seed42"
        "_scienceqa-correction",
    )  # fmt: skip


def script(user, name: str, *argv, **how):
    """Start a script of the project in the user's folder."""
    return run_script(ROOT / name, *argv, cwd=user.folder, **how)


def read(path: Path):
    return json.loads(path.read_text())


def names(folder: Path) -> set[str]:
    """What a folder holds besides checkpoints for resuming."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} - OPTIONAL


def unmoved(before: Path, after: Path) -> list[str]:
    """Tensors of model folder `after` that are equal in `before`, or not in it at all."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return [name for name in new if name not in old or torch.equal(old[name], new[name])]


def check_predictions(user, folder: Path, which=("train", "eval", "test")) -> None:
    """By question id, in split order, prompts and targets being those of their own questions."""
    for name in which:
        data = read(folder / f"predictions_ans_{name}.json")
        assert data["qids"] == user.splits[name]
        keys = {"preds", "labels", "qids", "prompts", "answers", "settings"}
        assert set(data) == keys | ({"num_fail", "scores"} if name == "test" else set())
        assert {len(data[key]) for key in ("preds", "labels", "prompts", "answers")} == {len(data["qids"])}
        for qid, prompt in zip(data["qids"], data["prompts"], strict=True):
            assert prompt.startswith("Question: " + " ".join(user.problems[qid]["question"].split())[:60])


# -- the stages ------------------------------------------------------------------------------------------


def test_1_starting_rationale_model(user):
    """main.py from a plain T5, as flan-alpaca is one: the image layers start fresh."""
    script(
        user, "main.py", *user.common_sft, "--model", "t5", "--prompt_format", "QCM-E", "--output_len", "512",
        "--correction", "True", "--correction_file", "scienceqa/plain.json", "--bs", "4", "--epoch", "4",
        "--lr", "1e-2", "--run_dir", "base",
    )  # fmt: skip
    assert names(user.base) == MODEL | TRAINED | PREDICTIONS
    check_predictions(user, user.base)
    assert set(unmoved(user.folder / "t5", user.base)) == {
        f"encoder.{layer}"
        for layer in (
            "image_dense.weight", "image_dense.bias", "mha_layer.in_proj_weight", "mha_layer.in_proj_bias",
            "mha_layer.out_proj.weight", "mha_layer.out_proj.bias", "gate_dense.weight", "gate_dense.bias",
        )
    }, "only what the plain T5 lacks"  # fmt: skip
    metrics = read(user.base / "metrics.json")
    assert metrics["steps"] == 4 * 64 / 4 and metrics["last_loss"] < metrics["first_loss"]
    preds = read(user.base / "predictions_ans_train.json")["preds"]
    assert np.mean([pred.endswith(".") and len(pred.split()) < 100 for pred in preds]) > 0.9


RL = (
    "--prompt_format QCM-E --base_model_dir base --ref_model base --k_actions 2 --bs 64 --output_len 512 "
    "--rl_batch_size 8 --init_kl_coef 0.0001 --top_k 50 --rl_epochs 1 --lr 2e-5 --clip_range 0.2 --epochs 1 "
    "--ga_step 8 --gamma 1.0 --adv_normalization True --do_sample True --continue_train False"
).split()


def test_2_rl_in_two_processes_with_the_teacher_in_place(user):
    questions = user.run / "questions"
    with ThreadPoolExecutor(1) as pool:
        rl = pool.submit(script, user, "run_mm_cot_rl.py", *user.common, *RL, "--poll_seconds", "1", nproc=2)
        while not handoff.exported(questions) and not rl.done():
            time.sleep(0.2)
        if not rl.done():  # it waits: the Teacher's tools work in its folder
            prepared = subprocess.run(
                ["bash", ROOT / "preprocessing_after_RL/processing_sentence_level_feedback.sh",
                 "--questions_dir", questions, *user.teacher],
                cwd=user.folder, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable},
            )  # fmt: skip
            assert prepared.returncode == 0, prepared.stderr[-3000:]
            assert not any(handoff.is_done(questions, action) for action in (0, 1))
            haiku = script(user, "haiku.py", "--teacher", "reference", "--questions_dir", questions, *user.teacher)
            assert haiku.stdout.count("llm_done.txt written") == 2
        done = rl.result()
    said = done.stdout.splitlines()
    assert said.index("Rationale Finished") < said.index("Waiting for the feedback")
    assert "64 questions, 2 process(es) on cpu" in done.stdout

    assert [path.name for path in (user.folder / "RL_models").iterdir()] == [RL_RUN]
    outputs = {
        "0",
        "args.yaml",
        "metrics.jsonl",
        "samples_round_0.jsonl",
        "questions_round0",
        "rollouts",
        "tensorboard",
    }
    assert names(user.run) == outputs
    assert names(user.run / "0") == MODEL | {"args.yaml", "value_function.pth", "optimizer_state.pth"}

    # two ranks sampled, every question twice; what was exported is what was scored
    items = handoff.iter_items(user.run / "questions_round0")
    stored = read(user.run / "rollouts/round_0/collected.json")
    assert stored["samples"] == 128
    by_rank = {rank: {item.qid for item in items if item.rank == rank} for rank in (0, 1)}
    assert {item.rank for item in items} == {0, 1} and {item.action for item in items} == {0, 1}
    assert min(map(len, by_rank.values())) > 16 and not by_rank[0] & by_rank[1]
    assert by_rank[0] | by_rank[1] <= set(user.splits["train"])
    exported = scored = 0
    for item in items:
        wanted = {handoff.RATIONALE, handoff.REQUEST, handoff.REPLY, handoff.SIDECAR, handoff.SCORES}
        assert names(item.folder) == wanted, "no train image is in the sample"
        assert read(item.folder / handoff.SIDECAR)["teacher"] == "reference"
        exported += len(handoff.read_rationale(item.folder))
        scored += len((item.folder / handoff.SCORES).read_text().split())
    metrics = [json.loads(line) for line in (user.run / "metrics.jsonl").read_text().splitlines()]
    (rollout,) = (line for line in metrics if line["kind"] == "rollout")
    assert 128 < exported == scored == stored["sentences"] == rollout["sentences"]
    assert rollout["rationales"] == 128 and rollout["share_dropped"] == 0
    # 128 samples in minibatches of 8, 8 of them accumulated, 2 processes: one optimizer step
    (update,) = (line for line in metrics if line["kind"] == "update")
    assert all(np.isfinite(value) for value in update.values() if isinstance(value, float))

    assert unmoved(user.base, user.run / "0") == []
    value = torch.load(user.run / "0/value_function.pth", weights_only=True)
    base = load_file(user.base / "model.safetensors")
    still = {name for name in base if torch.equal(base[name], value[name])}
    assert still == {"lm_head.weight"}, "the value function trains all but its unused head"
    state = torch.load(user.run / "0/optimizer_state.pth", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state.values()} == {1}


def test_3_rationales_of_the_rl_model(user):
    trained = user.run / "0"
    before = names(trained)
    done = script(
        user, "main.py", *user.common_sft, "--prompt_format", "QCM-E", "--output_len", "512", "--bs", "8", "--lr",
        "8e-5", "--evaluate_dir", trained,
    )  # fmt: skip
    assert "no effect under --evaluate_dir: --bs --final_eval --lr" in done.stdout
    assert names(trained) == before | PREDICTIONS
    check_predictions(user, trained)
    data = read(trained / "predictions_ans_test.json")
    assert data["num_fail"] is None and set(data["answers"]) == {None}  # QCM-E asks for no answer
    assert set(data["scores"]) == {"rationale"}
    assert {"bleu1", "bleu4", "rouge"} <= set(data["scores"]["rationale"]) <= {"bleu1", "bleu4", "rouge", "similarity"}
    assert all(0 <= value <= 100 for value in data["scores"]["rationale"].values())

    script(
        user, "preprocessing_after_RL/remove_sentence.py", "--file_path", trained / "predictions_ans_train.json",
        "--tokenizer", trained,
    )  # fmt: skip
    kept = read(trained / "remove_repetitive_sentences.json")
    assert kept["qids"] == user.splits["train"] and len(kept["preds"]) == 64
    assert not any(pred.startswith("Solution:") for pred in kept["preds"])


def test_4_corrections(user):
    rationales = user.run / "0/remove_repetitive_sentences.json"
    split = ["--train_split", "minitrain", "--rationales", rationales]
    script(user, "preprocessing_for_correction_feedback.py", *split, *user.teacher)
    items = handoff.iter_items(user.folder / "preprocessing_after_RL/correction")
    assert [item.qid for item in items] == sorted(user.splits["train"], key=int)
    script(user, "haiku_for_correction_feedback.py", "--teacher", "reference", *split, *user.teacher)
    assert all(read(item.folder / handoff.SIDECAR)["teacher"] == "reference" for item in items)
    corrected = read(user.folder / "data/scienceqa/correction.json")
    assert corrected.keys() == user.problems.keys()
    given = dict(zip(*(read(rationales)[key] for key in ("qids", "preds")), strict=True))
    train = set(user.splits["train"])
    for qid, problem in corrected.items():
        assert {**problem, "solution": ""} == {**user.problems[qid], "solution": ""}
        if qid not in train:
            assert problem["solution"] == user.problems[qid]["solution"]
    solutions = {qid: corrected[qid]["solution"] for qid in user.splits["train"]}
    assert all(solutions.values()) and solutions != {qid: user.problems[qid]["solution"] for qid in solutions}
    assert sum(solutions[qid] != given[qid] for qid in solutions) > 32, "an untaught model leaves much to correct"


def test_5_sft_on_the_corrections(user):
    script(
        user, "main.py", *user.common_sft, "--model", f"RL_models/{RL_RUN}/0", "--prompt_format", "QCM-E",
        "--correction", "True", "--correction_file", "scienceqa/correction.json", "--bs", "8", "--epoch", "1",
        "--lr", "8e-5", "--output_len", "512",
    )  # fmt: skip
    assert [path.name for path in (user.folder / "experiments").iterdir()] == [user.sft.name]
    assert names(user.sft) == MODEL | TRAINED | PREDICTIONS
    check_predictions(user, user.sft)
    metrics = read(user.sft / "metrics.json")
    assert metrics["steps"] == 64 / 8 and 0 < metrics["last_loss"] < np.log(32128)
    assert unmoved(user.run / "0", user.sft) == []
    # its targets are the corrections; test and val keep the gold rationales
    corrected = read(user.folder / "data/scienceqa/correction.json")
    for name, source in (("train", corrected), ("test", user.problems)):
        data = read(user.sft / f"predictions_ans_{name}.json")
        same = [
            letters(label) == letters("Solution: " + source[qid]["solution"].replace("\n", "\\n"))
            for qid, label in zip(data["qids"], data["labels"], strict=True)
        ]
        assert np.mean(same) > 0.9, name  # some hold a character that the tokenizer does not know, or are cut at 512


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.replace("\\n", "n").lower())


def test_6_lora_answers(user):
    before = load_file(user.sft / "model.safetensors")
    done = script(
        user, "run_mm_cot_lora.py", *user.common_sft, "--model", user.sft, "--correction", "False", "--prompt_format",
        "QCM-A", "--bs", "16", "--epoch", "1", "--lr", "8e-5", "--output_len", "64", "--lora_r", "64",
        "--lora_alpha", "128", "--lora_dropout", "0.05", "--eval_le", user.sft / "predictions_ans_eval.json",
        "--test_le", user.sft / "predictions_ans_test.json",
    )  # fmt: skip
    assert "--eval_le" in done.stdout and "QCMG-A" in done.stdout  # QCM-A does not read them: said plainly
    folder = user.sft / "mm_cot_lora_r64_a128_d0.05_s42_lr8e-05_bs16_e1_len64"
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert names(folder) == TRAINED | tokenizer | adapter | {"predictions_ans_test.json"}
    check_predictions(user, folder, ["test"])
    moved = load_file(folder / "adapter_model.safetensors")
    assert moved and all(tensor.abs().max() > 0 for name, tensor in moved.items() if "lora_B" in name)
    after = load_file(user.sft / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before), "the model itself stays as it is"
    data = read(folder / "predictions_ans_test.json")
    rows = "natural social language has_text has_image no_context grade_1_6 grade_7_12 average".split()
    assert list(data["scores"]["answer"]) == [f"acc_{row}" for row in rows]
    assert all(re.fullmatch(r"\d+\.\d\d", text) for text in data["scores"]["answer"].values())
    assert data["num_fail"] == data["answers"].count(None) and set(data["scores"]) == {"answer"}


# -- the demo --------------------------------------------------------------------------------------------

DEMO_FILES = {
    "data": {"captions.json", "scienceqa/problems.json", "scienceqa/pid_splits.json", "name_map.json"},
    "tokenizer": {"tokenizer.json"},
    "vision_features": {"vit.json", "name_map.json"},
    "models/t5": {"config.json", "model.safetensors"},
    "models/rationale": MODEL | TRAINED | PREDICTIONS,
    "RL_models/demo": {"metrics.jsonl", "args.yaml", "questions_round0/mmcot_finished_signal.txt"},
    "RL_models/demo/0": MODEL | {"value_function.pth", "optimizer_state.pth"},
    "RL_models/demo/1": MODEL | PREDICTIONS | {"value_function.pth", "remove_repetitive_sentences.json"},
    "correction": {"correction.json"},
    "models/sft": MODEL | TRAINED | PREDICTIONS,
    **{f"models/lora_{stage}_{form}": {"adapter_config.json", "adapter_model.safetensors", "predictions_ans_test.json"}
       for stage in ("start", "RL", "SFT") for form in ("QCMG-A", "QCM-A")},
}  # fmt: skip


def test_demo_at_its_smallest(tmp_path):
    output = tmp_path / "demo run"  # a blank in the path: users have them
    done = run_script("demo/run.py", "--size", "smoke", "--output", output)
    for place, names in DEMO_FILES.items():
        for name in names:
            assert (output / place / name).is_file(), f"{place}/{name}"
    for number in (0, 1):
        items = handoff.iter_items(output / f"RL_models/demo/questions_round{number}")
        assert {item.action for item in items} == {0, 1}
        assert all((item.folder / handoff.SCORES).exists() for item in items)
    assert len(handoff.iter_items(output / "correction")) == 32

    table, text = read(output / "table.json"), (output / "table.txt").read_text()
    assert text.rstrip() in done.stdout
    assert set(table["rationales"]) == {"starting model", "after RL", "after SFT"}
    figures = {"score", "repeated", "unfinished", "words", "rouge_l", "covered", "only_option"}
    figures |= {"concludes", "no_conclusion"}
    assert all(set(row) == figures for row in table["rationales"].values())
    systems = [f"{stage}, {form}" for stage in table["rationales"] for form in ("QCMG-A", "QCM-A")]
    assert list(table["answers"]) == systems and list(table["folders"]) == [*table["rationales"], *systems]
    assert all((output / place).is_dir() for place in table["folders"].values())
    for row in table["answers"].values():
        assert row["against the start"]["low"] <= row["against the start"]["difference"] <= 100
    assert set(table["changes"]) == {
        "after RL - starting model", "after SFT - after RL", "after SFT - starting model"
    }  # fmt: skip
    for name, change in table["changes"].items():
        ours, theirs = name.split(" - ")
        for key in ("concludes", "covered"):
            want = table["rationales"][ours][key] - table["rationales"][theirs][key]
            assert change[key]["difference"] == pytest.approx(want)
            holds_0 = change[key]["low"] <= 0 <= change[key]["high"]
            assert ("not distinguishable" in change[key]["text"]) == holds_0
    assert len(table["seconds"]) == 8 and all(seconds > 0 for seconds in table["seconds"].values())
    for word in ("sentence score", "QCMG-A", "in all", "RL_models/demo/1", "95 %"):
        assert word in text
    check_demo_report(output, table)
    assert done.stdout.rstrip().endswith(f"{output}/report.html")

    def stamps():
        return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    before = stamps()
    again = run_script("demo/run.py", "--size", "smoke", "--output", output)
    assert again.stdout.count("done before") == 9 and text.rstrip() in again.stdout
    changed = {path.name for path, stamp in stamps().items() if before.get(path) != stamp}
    assert changed <= {"table.json", "table.txt"}
    other = run_script("demo/run.py", "--size", "smoke", "--output", output, "--seed", "1", check=False)
    assert other.returncode == 2 and "--fresh" in other.stderr and "seed" in other.stderr


def check_demo_report(output, table):
    """The demo's report holds its table's numbers, every sample with its tokens, and the images."""
    parts = parts_of((output / "report.html").read_text(encoding="utf-8"))
    figures = parts["main"]["overview"]["figures"]
    for data, figure in zip(table["rationales"].values(), figures, strict=False):
        assert {**figure["rationale"], "rouge_l": figure["scores"]["rouge"]} == pytest.approx(data)
    for figure, name in zip(figures[3:], ("starting model", "after RL", "after SFT"), strict=True):
        assert figure["scores"]["acc_average"] == pytest.approx(
            table["answers"][f"{name}, QCMG-A"]["accuracy"], abs=0.01
        )
    samples = [each for many in parts["details"]["samples"].values() for each in many]
    assert len(samples) == 64 * len(parts["main"]["rounds"]) and len(parts["details"]["corrections"]) == 32
    for each in samples:
        assert sum(each["rewards"]) == pytest.approx(each["reward"], abs=len(each["rewards"]))
    assert parts["images"]["of"]
    # a model that learned nothing gives no answers that can be read; nothing else is to be noted
    assert [note for note in parts["main"]["notes"] if "could not be read" not in note] == []


def test_demo_script_explains_itself(tmp_path):
    """`--help` needs neither .venv nor any package."""
    for name in ("run_demo.sh", "run_tests.sh"):
        done = subprocess.run(["bash", ROOT / name, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert "--output" not in done.stdout
    help_text = subprocess.run(["bash", ROOT / "run_demo.sh", "--help"], capture_output=True, text=True).stdout
    assert "--output" in help_text and "--seed" in help_text
