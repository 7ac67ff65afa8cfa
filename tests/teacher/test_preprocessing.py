"""The two preprocessing scripts, run as a user runs them, on real questions and images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ares.cli import UserError
from teacher.handoff import (
    DONE,
    IMAGE,
    RATIONALE,
    REASON,
    REPLY,
    REQUEST,
    SCORES,
    SIDECAR,
    is_done,
    mark_done,
    mark_exported,
    place_images,
    prepare_request,
    question_dir,
    read_rationale,
    read_rationales,
    write_rationale,
    write_request,
)  # fmt: skip
from teacher.prompts import correction_request, scoring_request
from tests.conftest import ROOT, one_line_error, run_script

SH = ROOT / "preprocessing_after_RL" / "processing_sentence_level_feedback.sh"
SENTENCES = ['The colony is "Maryland".', "So it is {A}: the first."]


@pytest.fixture(scope="module")
def data_root(sample) -> Path:
    return sample / "ScienceQA/data"


@pytest.fixture(scope="module")
def problems(data_root) -> dict:
    return json.loads((data_root / "scienceqa/problems.json").read_text())


@pytest.fixture(scope="module")
def pictured(sample, problems) -> list[str]:
    """Test questions with image.png, and one with choice images only."""
    folders = sorted((sample / "images").iterdir())
    images = [folder.name for folder in folders if (folder / "image.png").exists()]
    choices = [folder.name for folder in folders if not (folder / "image.png").exists()]
    return [*images[:2], choices[0]]


def export(questions: Path, qids, actions=(0, 1)) -> None:
    for action in actions:
        for qid in qids:
            write_rationale(question_dir(questions, action, 0, qid), SENTENCES)
    mark_exported(questions)


def shell(*argv, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """The .sh as a user calls it."""
    return subprocess.run(
        ["bash", str(SH), *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
    )


def flags(sample, data_root) -> list:
    return ["--data_root", data_root, "--images", sample / "images"]


def listing(folder: Path) -> dict[str, tuple]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_every_action_gets_request_and_images(tmp_path, sample, data_root, problems, pictured):
    text_only = next(qid for qid, problem in problems.items() if problem["image"] is None)
    questions = tmp_path / "questions"
    export(questions, [*pictured, text_only])
    (question_dir(questions, 0, 0, "half")).mkdir()  # RL is still at it: no rationale, no request
    done = shell(*flags(sample, data_root), "--questions_dir", questions, "--problems", "scienceqa", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 requests" in done.stdout and "6 with images" in done.stdout and "warning" not in done.stderr
    for action in (0, 1):  # the released code gave images to the first action only
        for qid in [*pictured, text_only]:
            folder = question_dir(questions, action, 0, qid)
            assert (folder / REQUEST).read_text() == scoring_request(problems[qid], SENTENCES)
            source = (
                {p.name: p.read_bytes() for p in (sample / "images" / qid).glob("*.png")} if qid in pictured else {}
            )
            assert {p.name: p.read_bytes() for p in folder.glob("*.png")} == source
    assert (question_dir(questions, 1, 0, pictured[0]) / IMAGE).exists()
    assert (question_dir(questions, 1, 0, pictured[2]) / "choice_0.png").exists()
    assert not (question_dir(questions, 0, 0, "half") / REQUEST).exists()

    before = listing(questions)
    again = shell(*flags(sample, data_root), "--questions_dir", questions)
    assert again.returncode == 0 and listing(questions) == before  # nothing touched
    write_rationale(question_dir(questions, 0, 0, "half"), SENTENCES)
    missing = shell(*flags(sample, data_root), "--questions_dir", questions)
    one_line_error(missing, "question half", "not in problems.json", "--data_root")


def test_requests_name_the_correct_answer_and_an_image_only_if_there_is_one(problems):
    for problem in problems.values():
        gold = problem["answer"]
        for text in (scoring_request(problem, SENTENCES), correction_request(problem, "It is so.")):
            assert f"\nCorrect answer: ({'ABCDE'[gold]}) {problem['choices'][gold]}\n" in text
            assert ("its context, the image and the correct answer" in text) == (problem["image"] is not None)
    assert {problem["answer"] for problem in problems.values()} >= {0, 1, 2, 3}


def test_the_manual_copy_and_a_second_round(tmp_path, sample, data_root, problems, pictured):
    """`cp -r {run}/questions/*` into a folder that still holds last round's replies and signals."""
    qid = pictured[0]
    desk = tmp_path / "preprocessing_after_RL"
    desk.mkdir()
    for number, sentences in enumerate((SENTENCES, ["Another thought.", "So it is (B)."])):
        run = tmp_path / f"run{number}" / "questions"
        for k in range(2):
            write_rationale(question_dir(run, k, 0, qid), sentences)
        write_rationale(question_dir(run, 0, 0, pictured[1]), SENTENCES)  # the same words in both rounds
        mark_exported(run)
        subprocess.run(f"cp -r {run}/* {desk}/", shell=True, check=True)
        done = shell(*flags(sample, data_root), cwd=tmp_path)  # the default --questions_dir
        assert done.returncode == 0, done.stderr
        folder = question_dir(desk, 0, 0, qid)
        assert (folder / REQUEST).read_text() == scoring_request(problems[qid], sentences)
        if number == 0:
            for k in range(2):
                for name in (REPLY, SIDECAR, SCORES, REASON):
                    (question_dir(desk, k, 0, qid) / name).write_text(f"reply of round {number}")
                mark_done(desk, k)
            (question_dir(desk, 0, 0, pictured[1]) / REPLY).write_text("still good")
            assert is_done(desk, 0)
    assert "2 replies to older rationales set aside" in done.stdout
    for k in range(2):
        folder = question_dir(desk, k, 0, qid)
        assert not any((folder / name).exists() for name in (REPLY, SIDECAR, SCORES, REASON))
        assert (folder / f"older_{REPLY}").read_text() == "reply of round 0"  # paid for: kept
        assert not (desk / str(k) / DONE).exists()
    assert (question_dir(desk, 0, 0, pictured[1]) / REPLY).read_text() == "still good"
    # a new wording of the request does not void what was paid for
    (folder / REPLY).write_text("new")
    (folder / REQUEST).write_text((folder / REQUEST).read_text().replace("You grade", "You rate"))
    done = shell(*flags(sample, data_root), cwd=tmp_path)
    assert (folder / REPLY).read_text() == "new" and "set aside" not in done.stdout


@pytest.mark.parametrize("sentences", [SENTENCES[:1], SENTENCES[::-1], [*SENTENCES, SENTENCES[0]]])
def test_a_reply_to_the_same_sentences_in_another_number_or_order_is_outdated(tmp_path, sentences):
    """The next round's rationale is often a part of the last one: the old scores are not its scores."""
    problem = {"question": "Q?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None}
    assert not prepare_request(tmp_path, scoring_request(problem, SENTENCES), SENTENCES, [])
    (tmp_path / REPLY).write_text('{"scores": [0.1, 0.9]}')
    assert not prepare_request(tmp_path, scoring_request(problem, SENTENCES), SENTENCES, [])
    assert prepare_request(tmp_path, scoring_request(problem, sentences), sentences, [])
    assert not (tmp_path / REPLY).exists() and (tmp_path / f"older_{REPLY}").exists()


def test_absent_images_and_bad_forms(tmp_path, sample, data_root, problems):
    train = next(qid for qid, p in problems.items() if p["image"] and not (sample / "images" / qid).exists())
    questions = tmp_path / "questions"
    export(questions, [train])
    argv = [*flags(sample, data_root), "--questions_dir", questions]
    done = shell(*argv)
    assert done.returncode == 0
    assert f"1 of 1 questions name an image that is not under {sample / 'images'}, first {train}" in done.stderr
    assert (question_dir(questions, 0, 0, train) / REQUEST).exists()
    one_line_error(shell(*argv, "--strict"), "--strict", train, "--images")
    (question_dir(questions, 0, 0, train) / RATIONALE).write_text("no form")
    write_rationale(question_dir(questions, 1, 0, train), [])
    write_rationale(question_dir(questions, 2, 0, train), SENTENCES)
    done = shell(*argv)
    assert done.returncode == 0 and "2 rationales get no request" in done.stderr and "1 requests" in done.stdout


def test_one_line_errors(tmp_path, sample, data_root):
    argv = flags(sample, data_root)
    one_line_error(shell(*argv, cwd=tmp_path), "--questions_dir", "preprocessing_after_RL", "copy {run}/questions/*")
    export(tmp_path / "questions", ["1"])
    one_line_error(shell(*argv, "--questions_dir", tmp_path), "did you mean", f"{tmp_path}/questions")
    questions = ["--questions_dir", tmp_path / "questions"]
    one_line_error(shell("--data_root", tmp_path / "none", *questions), "--data_root")
    one_line_error(shell(*argv, *questions, "--problems", "aokvqa"), "aokvqa")
    one_line_error(shell(*argv, *questions, "--problems", "aokvqa", "--dataset", "scienceqa"), "same flag")
    assert "--questions_dir" in shell("--help").stdout


def test_images_are_linked_or_copied_and_replaced_when_they_change(tmp_path):
    source, folder = tmp_path / "image.png", tmp_path / "q"
    folder.mkdir()
    source.write_bytes(b"one")
    place_images(folder, [source])
    assert os.path.samefile(source, folder / "image.png")
    shutil.copy(source, tmp_path / "other")
    os.replace(tmp_path / "other", source)  # the data set was made anew: same size, other file
    source.write_bytes(b"two")
    place_images(folder, [source])
    assert (folder / "image.png").read_bytes() == b"two"
    link = tmp_path / "choice_0.png"
    link.symlink_to(source)
    place_images(folder, [link])
    assert not (folder / "choice_0.png").is_symlink() and (folder / "choice_0.png").read_bytes() == b"two"
    assert sorted(p.name for p in folder.iterdir()) == ["choice_0.png", "image.png"]
    with pytest.raises(UserError, match="absent.png is no regular file"):
        write_request(folder, "text", [tmp_path / "absent.png"])
    assert not (folder / REQUEST).exists()  # it would say that the folder is ready


def test_images_are_copied_where_links_are_refused(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source, folder = tmp_path / "image.png", tmp_path / "q"
    folder.mkdir()
    source.write_bytes(b"one")
    place_images(folder, [source])
    inode = (folder / "image.png").stat().st_ino
    place_images(folder, [source])
    assert (folder / "image.png").read_bytes() == b"one" and (folder / "image.png").stat().st_ino == inode


# -- corrections -----------------------------------------------------------------------------------------


def correction(tmp_path, sample, data_root, rationales: dict, *argv, check=True) -> subprocess.CompletedProcess:
    path = tmp_path / "remove_repetitive_sentences.json"
    path.write_text(json.dumps(rationales))
    script = ROOT / "preprocessing_for_correction_feedback.py"
    return run_script(script, "--rationales", path, *flags(sample, data_root), *argv, cwd=tmp_path, check=check)


def test_correction_requests(tmp_path, sample, data_root, problems):
    splits = json.loads((data_root / "scienceqa/pid_splits.json").read_text())
    qids = splits["train"][:3]
    preds = ['Plants make "food": sugar.', "It is {B}.\nSo there.", ""]
    done = correction(tmp_path, sample, data_root, {"preds": preds, "qids": qids})
    assert f"covers 3 of {len(splits['train'])} train questions" in done.stdout and "3 requests" in done.stdout
    for qid, text in zip(qids, preds, strict=True):
        folder = tmp_path / "preprocessing_after_RL/correction/0/p0" / qid
        assert read_rationale(folder) == [" ".join(text.split())]
        assert (folder / REQUEST).read_text() == correction_request(problems[qid], text)
        (folder / REPLY).write_text("paid for")
    before = listing(tmp_path / "preprocessing_after_RL")
    correction(tmp_path, sample, data_root, {"preds": preds, "qids": qids})
    assert listing(tmp_path / "preprocessing_after_RL") == before
    # the next round's rationales come to the same folders
    preds[0] = "Plants make sugar."
    done = correction(tmp_path, sample, data_root, {"preds": preds, "qids": qids})
    assert "1 replies to older rationales set aside" in done.stdout
    folder = tmp_path / "preprocessing_after_RL/correction/0/p0" / qids[0]
    assert not (folder / REPLY).exists() and (folder / f"older_{REPLY}").exists()
    assert read_rationale(folder) == [preds[0]]


def test_correction_in_split_order_with_images(tmp_path, sample, data_root, pictured):
    """A data set whose train questions have images here, and a predictions file of the released form."""
    root = tmp_path / "data"
    shutil.copytree(data_root / "scienceqa", root / "scienceqa")
    (root / "scienceqa/pid_splits.json").write_text(json.dumps({"minitrain": pictured}))
    split = ["--train_split", "minitrain", "--correction_dir", "out"]
    done = correction(tmp_path, sample, root, {"preds": ["One.", "Two.", "Three."]}, *split)
    assert "3 requests in out, 3 with images" in done.stdout and "covers" not in done.stdout
    assert read_rationale(tmp_path / "out/0/p0" / pictured[1]) == ["Two."]
    assert (tmp_path / "out/0/p0" / pictured[1] / IMAGE).exists()
    assert (tmp_path / "out/0/p0" / pictured[2] / "choice_0.png").exists()


def test_correction_one_line_errors(tmp_path, sample, data_root, problems):
    def run(rationales, *argv):
        return correction(tmp_path, sample, data_root, rationales, *argv, check=False)

    test_qid = next(qid for qid, problem in problems.items() if problem["split"] == "test")
    one_line_error(run({"preds": ["A."]}), "1 rationales but the split", "--train_split")
    one_line_error(run({"preds": ["A."], "qids": [test_qid]}), f"question {test_qid}", "not in the train split")
    one_line_error(run({"preds": ["A."]}, "--train_split", "nope"), "--train_split", "nope")
    assert not (tmp_path / "preprocessing_after_RL").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"preds": "x"}, "must hold"),
        ([], "must hold"),
        ({"preds": ["a", None], "qids": ["1", "2"]}, "must hold"),
        ({"preds": ["a"], "qids": ["1", "2"]}, "do not match"),
        ({"preds": ["a", "b"], "qids": ["1", "1"]}, "twice"),
        ({"preds": ["a", "b"], "qids": "12"}, "do not match"),
    ],
)
def test_rationales_file_is_checked(tmp_path, content, words):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_rationales(path, ["1", "2"])


def test_rationales_by_id_never_by_place(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"preds": ["b", "a"], "qids": [2, "1"]}))
    assert read_rationales(path, ["1", "2", "3"]) == {"2": "b", "1": "a"}
    path.write_text(json.dumps({"preds": ["a", "b"]}))
    assert read_rationales(path, ["1", "2"]) == {"1": "a", "2": "b"}
