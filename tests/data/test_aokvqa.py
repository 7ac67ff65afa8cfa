"""A-OKVQA from its official files to scores: every stage by its own script, on 40 hand-made questions, drawn images.

The scripts' `main` runs in this process (the real data's launches are in test_end_to_end.py), with a 2-layer T5 of the
real vocabulary and a tiny timm network. The models trained here then answer single questions through tools/predict.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import extract_features
import haiku
import haiku_for_correction_feedback
import main
import preprocessing_for_correction_feedback
import run_mm_cot_lora
import run_mm_cot_rl
from ares import files
from ares.cli import UserError
from demo.make_model import build_t5
from demo.pictures import COLORS, SHAPES, canvas, draw_shape
from preprocessing_after_RL import remove_sentence
from teacher import handoff
from tests.conftest import ROOT
from tools import doctor, predict, prepare_data

TRAIN, VAL = 28, 12


def official_entry(number: int, split: str) -> tuple[dict, tuple]:
    """One question as aokvqa_v1p0_{split}.json holds it, and what its picture shows."""
    color, other = (list(COLORS)[(number + shift) % len(COLORS)] for shift in (0, 1 + number // 20))
    shape = SHAPES[number // 2 % len(SHAPES)]
    choices = [color, other, "white", "black"]
    answer = number % 4
    choices[0], choices[answer] = choices[answer], choices[0]
    entry = {
        "split": split, "image_id": 100_000 + 37 * number, "choices": choices, "correct_choice_idx": answer,
        "question_id": f"{number:02d}Mex{'nkBPpdZGX6sxbxVBH'[number % 9 :]}{number}",
        "question": f"What color is the {shape} at the {'left' if number % 2 else 'right'}, drawing {number}?",
        "direct_answers": [color] * 9 + [f"dark {color}"], "difficult_direct_answer": number % 5 == 0,
        # as annotators write them: three, not all with a full stop
        "rationales": [f"The {shape} is {color}", f"It is not {other}.", f"The answer is {color}."],
    }  # fmt: skip
    return entry, (color, other, shape, number % 2)


def write_official(folder: Path) -> dict[str, list[dict]]:
    """`aokvqa_v1p0/` and `coco/` as the two archives unpack."""
    entries: dict[str, list[dict]] = {"train": [], "val": []}
    for number in range(TRAIN + VAL):
        split = "train" if number < TRAIN else "val"
        entry, (color, other, shape, left) = official_entry(number, split)
        entries[split].append(entry)
        image, draw = canvas()
        draw_shape(draw, shape, 30 if left else 66, 50, 20, COLORS[color])
        draw_shape(draw, "square", 66 if left else 30, 50, 8, COLORS[other])
        target = folder / f"coco/{split}2017/{entry['image_id']:012d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, quality=95)
    hidden = [{key: value for key, value in entries["val"][0].items() if key != "correct_choice_idx"}]
    for split, rows in (*entries.items(), ("test", hidden)):
        files.write_json(folder / f"aokvqa_v1p0/aokvqa_v1p0_{split}.json", rows)
    return entries


def read(path: Path | str):
    return json.loads(Path(path).read_text())


def run(script, *argv) -> None:
    """A script with words and lines of words as its flags."""
    script.main([part for word in argv for part in (str(word).split() if "--" in str(word) else [str(word)])])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


DATA = "--data_root aokvqa_data"
COMMON = f"{DATA} --use_caption --img_type vit"
SFT = f"{COMMON} --use_generate --final_eval --bs 4 --eval_bs 32"
RL = (
    f"{COMMON} --prompt_format QCM-E --base_model_dir base --k_actions 2 --do_sample True --bs 32 --output_len 48 "
    "--epochs 1 --rl_batch_size 8 --ga_step 2 --rl_epochs 1 --lr 1e-3 --run_dir rl --report_to none "
    "--poll_seconds 0.2 --phase"
)


def test_from_the_official_files_to_scores(place, t5_tokenizer_dir, capsys):
    entries = write_official(place)
    train, val = ([entry["question_id"] for entry in entries[split]] for split in ("train", "val"))

    # data, features, captions
    run(prepare_data, "aokvqa", "--source aokvqa_v1p0 --images coco --output aokvqa_data")
    assert "its answers are hidden" in capsys.readouterr().out
    problems, splits = (read(f"aokvqa_data/aokvqa/{name}.json") for name in ("problems", "pid_splits"))
    check_prepared(entries, problems, splits)
    run(extract_features, "--data_root aokvqa_data/images --output_dir aokvqa_data/vision_features",
        "--model_name test_vit --random_weights --workers 0")  # fmt: skip
    assert set(read("aokvqa_data/vision_features/name_map.json")) == set(problems)
    captions = dict.fromkeys(problems, "A drawing of two shapes.")
    files.write_json("aokvqa_data/captions.json", {"captions": captions})

    # a starting rationale model
    build_t5(t5_tokenizer_dir, "t5", d_model=32, heads=4, vocab_size=32128, dropout=0.0)
    rationale = f"{SFT} --prompt_format QCM-E --output_len 48"
    run(main, rationale, "--model t5 --epoch 12 --lr 1e-2 --run_dir base")
    metrics = read("base/metrics.json")
    assert metrics["last_loss"] < metrics["first_loss"] / 2
    data = read("base/predictions_ans_test.json")
    assert data["qids"] == val == read("base/predictions_ans_eval.json")["qids"]
    assert all("Context: A drawing of two shapes." in prompt for prompt in data["prompts"])
    assert set(data["scores"]) == {"rationale"}

    # RL with the reference Teacher
    run(run_mm_cot_rl, RL, "collect")
    shell = ROOT / "preprocessing_after_RL/processing_sentence_level_feedback.sh"
    teacher = f"--questions_dir rl/questions {DATA}"
    subprocess.run(
        ["bash", shell, *teacher.split(), "--problems", "aokvqa"], check=True, capture_output=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    run(haiku, f"--teacher reference {teacher}")
    items = handoff.iter_items("rl/questions")
    assert {item.qid for item in items} == set(train) and len(items) == 2 * TRAIN
    assert all((item.folder / "image.png").is_file() and (item.folder / handoff.SCORES).is_file() for item in items)
    run(run_mm_cot_rl, RL, "train")
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("base", "rl/0"))
    assert not any(torch.equal(after[name], before[name]) for name in after)

    # corrections, SFT
    run(main, rationale, "--evaluate_dir rl/0")
    run(remove_sentence, "--file_path rl/0/predictions_ans_train.json --tokenizer rl/0")
    rationales = f"--rationales rl/0/remove_repetitive_sentences.json {DATA}"
    run(preprocessing_for_correction_feedback, rationales)
    run(haiku_for_correction_feedback, f"--teacher reference {rationales}")
    corrected = read("aokvqa_data/aokvqa/correction.json")
    assert corrected.keys() == problems.keys()
    assert all(corrected[qid]["solution"] == problems[qid]["solution"] for qid in val)
    correction = "--correction True --correction_file aokvqa/correction.json"
    run(main, rationale, f"--model rl/0 {correction} --epoch 1 --lr 1e-3 --run_dir sft")

    # LoRA answers from the rationales, and scores without the rows that do not apply
    le = " ".join(f"--{name}_le sft/predictions_ans_{name}.json" for name in ("train", "eval", "test"))
    answers = f"--prompt_format QCMG-A --output_len 16 {le}"
    run(run_mm_cot_lora, SFT, answers, "--model sft --epoch 2 --lr 2e-2 --run_dir lora")
    data = read("lora/predictions_ans_test.json")
    assert set(data["scores"]["answer"]) == {"acc_has_image", "acc_average"}
    assert all(re.fullmatch(r"\d+\.\d\d", score) for score in data["scores"]["answer"].values())
    assert data["qids"] == val

    capsys.readouterr()
    run(doctor, COMMON, "--model sft --correction_file aokvqa/correction.json")
    assert "sound: " in capsys.readouterr().out
    check_single_questions(val[3], problems, capsys)


def check_prepared(entries, problems, splits) -> None:
    """problems.json, the splits, the id map and the images, against the official entries."""
    everything = entries["train"] + entries["val"]
    assert list(problems) == [entry["question_id"] for entry in everything]
    for entry in everything:
        problem = problems[entry["question_id"]]
        same = {"question": "question", "choices": "choices", "answer": "correct_choice_idx", "split": "split"}
        same |= {name: name for name in ("direct_answers", "difficult_direct_answer")}
        assert {ours: problem[ours] for ours in same} == {ours: entry[theirs] for ours, theirs in same.items()}
        first, *others = entry["rationales"]
        assert problem["solution"] == " ".join([first + ".", *others])  # the full stop that was not there
        assert (problem["image"], problem["hint"], problem["subject"], problem["grade"]) == ("image.png", "", "", "")
        coco = Path(f"coco/{entry['split']}2017/{entry['image_id']:012d}.jpg")
        assert Path(f"aokvqa_data/images/{entry['question_id']}/image.png").samefile(coco)  # linked, not copied
    ids = read("aokvqa_data/aokvqa/id_map.json")
    assert ids == {e["question_id"]: {"question_id": e["question_id"], "image_id": e["image_id"]} for e in everything}
    train, val = ([entry["question_id"] for entry in entries[split]] for split in ("train", "val"))
    assert (splits["train"], splits["val"], splits["test"], splits["trainval"]) == (train, val, val, train + val)
    assert splits["minitrain"] == train and splits["minitest"] == val and splits["miniminival"] == val[:4]


def check_single_questions(qid, problems, capsys) -> None:
    """tools/predict.py gives what the prediction files hold, by id and for the same question typed in."""
    row = read("sft/predictions_ans_test.json")["qids"].index(qid)
    rationale = read("sft/predictions_ans_test.json")["preds"][row]
    letter = read("lora/predictions_ans_test.json")["answers"][row]
    problem = problems[qid]
    chosen = f"Answer: ({letter}) " if letter else "Answer: none; the model wrote "
    by_id = ["--model", "sft", "--qid", qid, *DATA.split()]
    typed = ["--model", "sft", "--question", problem["question"], "--choices", *problem["choices"]]
    typed += ["--caption", "A drawing of two shapes."]

    def said(argv, more="") -> str:
        capsys.readouterr()
        predict.main([*argv, *more.split()])
        out = capsys.readouterr().out
        assert f"Rationale: {rationale}\n" in out, (rationale, out)
        return out

    out = said(by_id, "--lora lora")
    assert chosen in out and "features: aokvqa_data/vision_features/vit.pth" in out
    assert f"Gold: ({'ABCD'[problem['answer']]}) {problem['choices'][problem['answer']]}\n" in out
    out = said(typed, f"--image aokvqa_data/images/{qid}/image.png --lora lora")
    assert chosen in out and "features: test_vit (random weights)" in out and "Gold" not in out
    assert "Answer: none asked for" in said(by_id)
    # a whole model that answers: here one that writes rationales, whose text holds no answer
    Path("answers").mkdir()
    for file in Path("sft").iterdir():
        if file.is_file() and file.name != "args.yaml":
            (Path("answers") / file.name).symlink_to(file.resolve())
    out = said(by_id, "--answer_model answers --answer_format QCMG-A")
    assert "Answer: none; the model wrote" in out

    for argv, words in (
        (["--model", "sft", "--qid", "nobody", *DATA.split()], "--qid: .* has no question nobody"),
        ([*by_id, "--hint", "x"], "--hint has no effect with --qid"),
        (["--model", "sft", "--question", "What?"], "--question needs --choices"),
        ([*typed, "--lora", "base"], "--lora: base holds no adapter_config.json"),
        ([*typed, "--answer_model", "base"], "--answer_model: it was trained for QCM-E, not to answer"),
        ([*typed, "--image", "gone.png"], "--image: gone.png does not exist"),
        ([*typed[:4], "--choices", "one"], "has 1 choices; 2 to 5"),
        ([*typed, "--img_type", "detr"], "image_dense|no weights|hub"),
    ):
        with pytest.raises(UserError, match=words):
            predict.main(argv)
