"""Whatever a user can have wrong ends in one line that names it, with status 2, before a model is loaded.

Every fault goes through every script that reads what is faulty: `main(argv)` in this process, some as real launches.
Faults of single flags, files and fields are tested where they are checked (test_data.py, test_model.py, ...).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import haiku
import haiku_for_correction_feedback
import main
import preprocessing_for_correction_feedback
import run_mm_cot_lora
import run_mm_cot_rl
from ares.cli import UserError
from tests.conftest import one_line_error, run_script
from tests.tiny import PATCHES, write

TRAINING = {"main": main, "rl": run_mm_cot_rl, "lora": run_mm_cot_lora}
ALL = {
    **TRAINING,
    "haiku": haiku,
    "correct": haiku_for_correction_feedback,
    "prepare": preprocessing_for_correction_feedback,
}
MODEL = {"main": "--model", "rl": "--base_model_dir", "lora": "--model"}  # the flag of the model's folder


@pytest.fixture
def place(ready, tmp_path, monkeypatch):
    """The folder in which every script would run, for one test to change; loading a model there fails the test."""
    import model

    def loaded(cls, *args, **kwargs):
        raise AssertionError("a model was loaded")

    for cls in (model.T5ForMultimodalGeneration, model.T5ForMultimodalGenerationValueFunction):
        monkeypatch.setattr(cls, "from_pretrained", classmethod(loaded))
    folder = shutil.copytree(ready, tmp_path / "place")
    monkeypatch.chdir(folder)  # output folders are relative; their making would show
    return folder


def flags(script: str, folder: Path) -> list[str]:
    """A command line of `script` with which nothing is wrong."""
    data = f"--data_root {folder}/data"
    training = f"{data} --caption_file {folder}/data/captions.json --use_caption --img_type vit"
    correction = f"--correction_dir {folder}/correction --rationales {folder}/rationales.json {data}"
    return {
        "main": f"{training} --model {folder}/model --prompt_format QCMG-E",
        "rl": f"{training} --base_model_dir {folder}/model --prompt_format QCMG-E",
        "lora": f"{training} --model {folder}/model --prompt_format QCMG-A",
        "haiku": f"--teacher reference --questions_dir {folder}/questions {data}",
        "correct": f"--teacher reference {correction}",
        "prepare": correction,
    }[script].split()


def read(path: Path):
    return json.loads(path.read_text())


def refused(script: str, folder: Path, extra: str, *words: str) -> None:
    """`script` stops with one line that holds `words`, and has written nothing."""
    before = set(folder.rglob("*"))
    with pytest.raises(UserError) as refusal:
        ALL[script].main([*flags(script, folder), *extra.split()])
    said = str(refusal.value)
    assert "\n" not in said and len(said) < 400, said
    assert all(word in said for word in words), (words, said)
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize("script", ALL)
def test_problems(script, place):
    path = place / "data/scienceqa/problems.json"
    problems = read(path)
    qid = list(problems)[3]
    for changed, words in (
        ({**problems[qid], "answer": 5}, [f"question {qid}", "answer 5"]),
        ({**problems[qid], "choices": "yes"}, [f"question {qid}", "choices"]),
        ({key: value for key, value in problems[qid].items() if key != "hint"}, [qid, "hint"]),
    ):
        write(path, {**problems, qid: changed})
        refused(script, place, "", "problems.json", *words)
    path.write_text(json.dumps(problems)[:5000])
    refused(script, place, "", "problems.json is not JSON", "line 1")
    path.unlink()
    refused(script, place, "", "--data_root", "problems.json")
    refused(script, place, "--data_root gone", "--data_root", "gone")


@pytest.mark.parametrize("script", [name for name in ALL if name != "haiku"])  # haiku.py reads no splits
def test_splits(script, place):
    path = place / "data/scienceqa/pid_splits.json"
    splits = read(path)
    write(path, {**splits, "train": [*splits["train"], "987654"]})
    refused(script, place, "", "pid_splits.json", "split train", "987654")
    del splits["train"]
    write(path, splits)
    refused(script, place, "", "--train_split", "no split train")
    path.unlink()
    refused(script, place, "", "pid_splits.json", "does not exist")


@pytest.mark.parametrize("script", TRAINING)
def test_captions_and_features(script, place):
    # the other tests of this file say something only if this passes: without a fault a model is loaded
    with pytest.raises(AssertionError, match="a model was loaded"):
        TRAINING[script].main([*flags(script, place), *(["--epoch", "1"] if script != "rl" else [])])
    shutil.rmtree(place / "RL_models", ignore_errors=True)
    refused(script, place, "--caption_file gone.json", "--caption_file", "gone.json")
    folder = place / "data/vision_features"
    rows = read(folder / "name_map.json")
    qid = next(iter(rows))
    write(folder / "name_map.json", {**rows, qid: 5000})
    refused(script, place, "", "--name_map", "row 5000", f"question {qid}", f"only {len(rows)} rows")
    write(folder / "name_map.json", rows)
    (folder / "vit.json").unlink()  # now (N, 5, 8) claims to be ViT's
    refused(script, place, "", "vit.npy", "(N, 145, 1024)", str((len(rows), *PATCHES)))
    refused(script, place, "--img_type clip", "--vision_features", "clip", "extract_features.py")
    (folder / "vit.npy").write_bytes((folder / "vit.npy").read_bytes()[:1000])
    refused(script, place, "", "vit.npy")
    (place / "data/captions.json").unlink()
    (place / "other").mkdir()
    default = "--caption_file data/captions.json"
    refused(script, place, default, "--caption_file", "instruct_captions.json", "--use_caption")


@pytest.mark.parametrize("script", TRAINING)
def test_models_and_tokenizers(script, place):
    flag = MODEL[script]
    rows = len(read(place / "data/vision_features/name_map.json"))
    np.save(place / "data/vision_features/detr.npy", np.zeros((rows, 100, 256), np.float32))
    refused(script, place, "--img_type detr", flag, "image_dense", "--img_type detr", "256")
    text_only = [word for word in flags(script, place) if word not in ("--img_type", "vit")]
    with pytest.raises(UserError, match=f"{flag}.*no --img_type is given"):
        TRAINING[script].main(text_only)
    with pytest.raises(SystemExit) as exit_:  # argparse's own: usage and one line
        TRAINING[script].main([*flags(script, place), "--img_type", "swin"])
    assert exit_.value.code == 2
    refused(script, place, f"{flag} ./gone", flag, "gone")
    refused(script, place, "--tokenizer data", "--tokenizer", "data")
    shutil.copytree(place / "model", place / "half")
    (place / "half/model.safetensors").unlink()
    refused(script, place, f"{flag} half", flag, "half", "no weights")
    (place / "half/config.json").unlink()
    refused(script, place, f"{flag} half", flag, "half", "config.json")
    if script == "rl":
        refused(script, place, "--ref_model ./gone", "--ref_model", "gone")
    else:
        refused(script, place, "--evaluate_dir ./gone", "--evaluate_dir", "gone")
        (place / "empty").mkdir()
        refused(script, place, "--evaluate_dir empty", "--evaluate_dir", "empty")
    for path in place.glob("model/*token*"):
        path.rename(place / path.name)
    refused(script, place, "--model ./model" if script == "rl" else "", "--tokenizer", "model")
    for path in place.glob("*token*"):
        path.rename(place / "model" / path.name)
    weights = place / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(script, place, "", "model.safetensors")


@pytest.mark.parametrize("script", ["main", "lora"])
def test_correction_file(script, place):
    corrected = read(place / "data/scienceqa/correction.json")
    lost = read(place / "data/scienceqa/pid_splits.json")["train"][2]
    del corrected[lost]
    write(place / "data/scienceqa/correction.json", corrected)
    given = "--correction True"
    refused(script, place, f"{given} --correction_file scienceqa/correction.json", "lacks 1 of 6", lost)
    refused(script, place, f"{given} --correction_file gone.json", "--correction_file", "gone.json")
    refused(script, place, given, "--correction_file")


@pytest.mark.parametrize(("script", "flag"), [("main", "eval"), ("lora", "eval"), ("lora", "test"), ("rl", "train")])
def test_given_rationales(script, flag, place):
    name = f"--{flag}_le"
    count = len(read(place / "data/scienceqa/pid_splits.json")[{"eval": "val"}.get(flag, flag)])
    write(place / "short.json", {"preds": ["One."] * (count - 1)})
    words = (name, "short.json", f"{count - 1} rationales", f"{count} questions")
    refused(script, place, f"{name} short.json", *words)
    write(place / "other.json", {"preds": ["One."] * count, "qids": [str(i) for i in range(900000, 900000 + count)]})
    refused(script, place, f"{name} other.json", name, f"lacks {count}")
    refused(script, place, f"{name} gone.json", name, "gone.json")


def test_output_that_cannot_be_written(place):
    (place / "a_file").touch()
    for script, extra in (
        ("main", "--run_dir /proc/none/run"),
        ("rl", "--run_dir a_file/run"),
        ("lora", "--run_dir a_file/run"),
        ("prepare", "--correction_dir a_file/x"),
        ("correct", "--output a_file/correction.json"),
    ):
        refused(script, place, extra, *extra.replace("/correction.json", "").split())
    refused("main", place, "--output_dir a_file", "a_file")


@pytest.mark.parametrize("script", ALL)
def test_every_script_ends_in_one_line(script):
    """Its entry point is `cli.run`, which turns a UserError into one line and status 2: see the launches below."""
    assert re.search(r'\n\nif __name__ == "__main__":\n    (cli\.)?run\(main', Path(ALL[script].__file__).read_text())


def test_status_and_line_of_a_real_launch(place):
    problems = read(place / "data/scienceqa/problems.json")
    qid = list(problems)[5]
    problems[qid]["choices"] = []
    write(place / "data/scienceqa/problems.json", problems)
    done = run_script("haiku.py", *flags("haiku", place), check=False)
    one_line_error(done, "haiku.py: error: --data_root", f"question {qid}", "0 choices")


def test_two_processes_say_it_once(ready, tmp_path):
    """The launcher adds its own report; ours is one line, from rank 0 (another rank's would name the rank)."""
    done = run_script("main.py", *flags("main", ready), "--data_root", tmp_path / "gone", nproc=2, check=False)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("main.py: error:")]
    assert len(ours) == 1 and str(tmp_path / "gone") in ours[0], done.stderr[-3000:]
